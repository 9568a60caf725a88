"""Two clocks for a GPU: what its kernels take, and what passes on the wall."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.contestants import COMPILED, Contestant
from benchmarks.rivals import RIVALS

FLUSH_BYTES = 512 << 20  # ten times the largest cache
#: Cycles that a device idles before the work, about half a millisecond: the host is ahead of it
#: then, and no launch of a short kernel is waited for.
HEAD_START = 1_000_000


class EventClock:
    """The seconds between two events on the device's stream, its caches holding nothing of use."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.zeros(FLUSH_BYTES // 4, device=device)

    def __call__(self, contestant: Contestant, calls: int) -> float:
        """Return the time of `calls` calls, each of them with cold caches."""
        return sum(self._once(contestant) for _ in range(calls))

    def _once(self, contestant: Contestant) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepared = contestant.prepare()
        self.flush.sum()  # read, not written: what is left to write back would be timed
        torch.cuda._sleep(HEAD_START)
        began.record()
        contestant.work(prepared)
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3


class WallClock:
    """The seconds that the host and the device take together, step after step."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait

    def __call__(self, contestant: Contestant, calls: int) -> float:
        """Return the time of `calls` calls one after the other."""
        prepared = contestant.prepare()
        self.wait()
        began = time.perf_counter()
        for _ in range(calls):
            contestant.work(prepared)
        self.wait()
        return time.perf_counter() - began


def admit(
    contestants: Mapping[str, Contestant], wait: Callable[[], None]
) -> tuple[dict[str, Contestant], dict[str, float], dict[str, str]]:
    """Call everybody once; return who can go on, the seconds of that call, and what stopped whom.

    A first call compiles, and an autotuner tries its variants in it. Nobody's lack of memory, no
    compiler's and no other library's error ends the run.
    """
    wall = WallClock(wait)
    able, seconds, failed = {}, {}, {}
    for name, contestant in contestants.items():
        try:
            seconds[name] = wall(contestant, 1)
        except torch.OutOfMemoryError:
            failed[name] = "out of memory"
        except Exception as error:
            if name not in (COMPILED, *RIVALS):
                raise
            failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            able[name] = contestant
    return able, seconds, failed


def ratios(
    seconds: Mapping[str, Mapping[str, Any]], over: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Return by contestant how many times as fast as each of `over` it is, by measure."""
    return {
        name: {
            measure: seconds[other]["median"] / times["median"]
            for measure, other in over.items()
            if other in seconds
        }
        for name, times in seconds.items()
    }
