"""Times taken in turns, so that a slow moment of the machine hits every contestant alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median, quantiles
from typing import Any, TypeVar

from benchmarks.contestants import Contestant
from training import measurement
from training.measurement import Effort

__all__ = ["Effort", "Seconds", "host_seconds", "in_turns"]

Name = TypeVar("Name", bound=Hashable)

#: A clock: the seconds of so many calls of a contestant.
Seconds = Callable[[Contestant, int], float]


def host_seconds(contestant: Contestant, calls: int) -> float:
    """Return the time of `calls` calls that follow one of the same contestant, as in a loop.

    That first call takes up the memory that the others left and frees it for the second. A virtual
    machine may hand free pages to its host within a second, and getting them back is the host's
    time: 300 ms for 500 MB, seen where the same call in a loop takes 30.
    """
    if calls == 1:
        contestant.work(contestant.prepare())
    logits = contestant.prepare()
    gc.disable()
    try:
        began = time.perf_counter()
        for _ in range(calls):
            result = contestant.work(logits)
        elapsed = time.perf_counter() - began
    finally:
        gc.enable()
    del result  # the last gradient is freed outside of the clock, as the caller would
    return elapsed


def in_turns(
    contestants: Mapping[Name, Contestant],
    effort: Effort,
    calls: int = 1,
    seconds: Seconds = host_seconds,
) -> dict[Name, dict[str, Any]]:
    """Return the seconds of a call, by contestant: median, quartiles and every sample."""

    def clock(contestant: Contestant) -> Callable[[], float]:
        return lambda: seconds(contestant, calls) / calls

    clocks = {name: clock(contestant) for name, contestant in contestants.items()}
    return {name: _summary(s) for name, s in measurement.in_turns(clocks, effort).items()}


def _summary(samples: list[float]) -> dict[str, Any]:
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return {"median": median(samples), "quartiles": [low, high], "samples": samples}
