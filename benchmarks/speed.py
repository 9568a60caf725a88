"""The times: of each case on two heaps, along the curve of class counts, and by threads."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import contestants
from benchmarks.cases import Case
from benchmarks.contestants import BUILTIN, COMPILED, COPY, OURS, Contestant
from benchmarks.goals import judge
from benchmarks.timing import Effort, in_turns

#: glibc's heap gives no memory back to the system, so that no page is zeroed anew.
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


def row(case: Case, effort: Effort) -> dict[str, Any]:
    """Time everybody on one case, and hold the ratios against its goals."""
    seconds = in_turns(contestants.enter(case, contestants.of(case)), effort, case.calls)
    medians = {name: times["median"] for name, times in seconds.items()}
    ratios = {
        name: {
            "over builtin": medians[BUILTIN] / median,
            "over compiled": medians[COMPILED] / median,
            "copies": median / medians[COPY],
        }
        for name, median in medians.items()
    }
    return {
        "name": case.name,
        "op": case.op,
        "size": case.size,
        "shape": case.shape,
        "calls": case.calls,
        "seconds": seconds,
        "ratios": ratios,
        "claims": judge(case.goals, ratios),
    }


def row_on_kept_heap(case: Case, effort: Effort, threads: int) -> dict[str, Any]:
    """Do the same in a process whose heap keeps its memory; the goals are not for it."""
    with (
        patch.dict(os.environ, KEEPS_MEMORY),  # read when a process starts
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor,
    ):
        return executor.submit(_row, replace(case, goals=()), effort, threads).result()


def _row(case: Case, effort: Effort, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return row(case, effort)


def point(case: Case, effort: Effort) -> dict[str, Any]:
    """Return the nanoseconds of an element."""
    seconds = in_turns(contestants.enter(case, (COPY, BUILTIN, OURS)), effort)
    scale = 1e9 / case.elements
    return {
        "classes": case.shape[1],
        "elements": case.elements,
        "nanoseconds": {name: scale * times["median"] for name, times in seconds.items()},
        "seconds": seconds,
    }


def scaling(case: Case, effort: Effort, threads: int) -> dict[str, Any]:
    """Time one thread and several, in turns as well."""
    counts = (1, threads)
    entered = contestants.enter(case, (BUILTIN, OURS))
    try:
        seconds = in_turns(
            {(name, n): _with_threads(entered[name], n) for name in entered for n in counts}, effort
        )
    finally:
        torch.set_num_threads(threads)
    return {
        "name": case.name,
        "threads": counts,
        "seconds": {name: [seconds[name, n] for n in counts] for name in entered},
    }


def _with_threads(contestant: Contestant, threads: int) -> Contestant:
    def prepare() -> Tensor:
        torch.set_num_threads(threads)
        return contestant.prepare()  # its copy wakes the threads before the clock runs

    return Contestant(prepare, contestant.work)
