"""What a piece of work costs when nothing else runs: its time, and its peak of memory."""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

ENOUGH_SECONDS = 10.0

Work = Callable[[], object]
Result = TypeVar("Result")
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds until `seconds` have gone by, at least `least` of them."""

    warm_up: int  #: rounds that do not count; the first compiles
    least: int
    most: int
    seconds: float


def in_turns(clocks: Mapping[Name, Callable[[], float]], effort: Effort) -> dict[Name, list[float]]:
    """Return what each clock shows, a number a round: a slow moment of the machine hits all alike.

    The order changes from round to round, so that each follows each of the others now and then.
    """
    order, shuffle = list(clocks), random.Random(0).shuffle
    for _ in range(effort.warm_up):
        for name in order:
            clocks[name]()
    shown: dict[Name, list[float]] = {name: [] for name in clocks}
    began, rounds = time.perf_counter(), 0
    while rounds < effort.least or (
        rounds < effort.most and time.perf_counter() - began < effort.seconds
    ):
        shuffle(order)
        for name in order:
            shown[name].append(clocks[name]())
        rounds += 1
    return shown


def seconds_in_turns(
    works: Mapping[str, Work], device: torch.device, rounds: int = 200
) -> dict[str, list[float]]:
    """Return the times of each work, taken in turns.

    Slow works get fewer rounds, as many as begin within `ENOUGH_SECONDS`.
    """

    def clock(work: Work) -> Callable[[], float]:
        return lambda: timed(work, device)[0]

    clocks = {name: clock(work) for name, work in works.items()}
    seconds = in_turns(clocks, Effort(0, 1, rounds, ENOUGH_SECONDS))
    # The first tenth, but for a single round, warms up.
    return {name: v[-(-len(v) // 10) :] or v for name, v in seconds.items()}


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Return the seconds until the device has done the work, and what it returned."""
    _wait(device)
    began = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - began, result


def peak_bytes(work: Work, device: torch.device) -> int:
    """Return by how many bytes the tensors alive during `work()` at most exceeded those before it.

    On CUDA the caching allocator keeps the count; on the CPU the profiler records each allocation.
    What libraries take past torch's allocator (oneDNN's scratch pads, say) is not in it. The
    process's resident set would be the other measure on a CPU; it is a matter of pages, never
    shrinks, and is lost in the 400 MB of an imported torch.

    The work is done twice and the second time counts: what the first allocates and keeps, momentum
    buffers say, is not the peak of a step.

    >>> def work():
    ...     return torch.ones(1000).add(1).sum()
    >>> peak_bytes(work, torch.device("cpu")) // 1000
    8
    """
    return _peak_on_cuda(work, device) if device.type == "cuda" else _peak_on_cpu(work)


def _peak_on_cuda(work: Work, device: torch.device) -> int:
    work()
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(work: Work) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints two lines at every use
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
        with record_function("second"):
            work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    began = min(event["ts"] for event in events if event.get("name") == "second")
    memory = sorted(
        (event["ts"], event["args"]["Total Allocated"])
        for event in events
        if event.get("name") == "[memory]"
    )
    before = [allocated for ts, allocated in memory if ts < began]
    during = [allocated for ts, allocated in memory if ts >= began]
    base = before[-1] if before else 0
    return max([base, *during]) - base


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
