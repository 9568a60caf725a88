"""The peak of memory beyond what is given, each contestant in a process of its own.

Two measures, as each leaves something out, and the larger is held against the goal. The resident
set is what the process holds of the machine: also what a kernel takes past torch's allocator. It is
a matter of whole pages (2 MiB where they are huge), and Linux counts it in batches, right to about
0.1 MiB a core. torch's allocator is right to the byte, of what passes through it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import contestants, last_layer
from benchmarks.cases import Case
from benchmarks.contestants import BUILTIN, IN_PLACE, OURS, Contestant
from benchmarks.goals import judge
from benchmarks.last_layer import LastLayer
from training.measurement import peak_bytes

#: Who is measured.
CONTESTANTS = (BUILTIN, OURS, IN_PLACE)

_RESET = Path("/proc/self/clear_refs")  # Linux's; elsewhere the high-water mark only grows
_RESET_HIGH_WATER_MARK = "5"


def peaks(case: Case, threads: int) -> dict[str, Any]:
    """Measure the contestants, and hold them against the goals."""
    found = _in_fresh_processes(case, CONTESTANTS, threads)
    logits = case.elements * case.dtype.itemsize
    ratios = {name: _ratios(bytes, logits) for name, bytes in found.items()}
    return {
        "name": case.name,
        "logits_bytes": logits,
        "bytes": found,
        "ratios": ratios,
        "claims": judge(case.goals, ratios),
    }


def last_layer_peaks(case: LastLayer, threads: int) -> dict[str, Any]:
    """Measure the last layer's, beyond the gradients, and hold them against the goals."""
    found = _in_fresh_processes(case, last_layer.MEMORY_OF, threads)
    beyond = {
        name: {by: None if n is None else n - case.gradient_bytes for by, n in counts.items()}
        for name, counts in found.items()
    }
    logits = case.elements * case.dtype.itemsize
    ratios = {name: _ratios(counts, logits) for name, counts in beyond.items()}
    return {
        "name": case.name,
        "logits_bytes": logits,
        "bytes": beyond,
        "ratios": ratios,
        "claims": judge([goal for goal in case.goals if goal.measure == "MiB"], ratios),
    }


def _in_fresh_processes(
    case: Case | LastLayer, names: Sequence[str], threads: int
) -> dict[str, dict[str, int | None]]:
    # A fresh process each: what another left in the heap would be used again, and not be seen.
    with ProcessPoolExecutor(
        len(names), multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as executor:
        futures = {name: executor.submit(_peak, case, name, threads) for name in names}
        return {name: future.result() for name, future in futures.items()}


def _ratios(bytes: dict[str, int | None], logits: int) -> dict[str, float]:
    largest = max(count for count in bytes.values() if count is not None)
    return {"logits": largest / logits, "MiB": largest / 2**20}


def _peak(case: Case | LastLayer, name: str, threads: int) -> dict[str, int | None]:
    torch.set_num_threads(threads)
    if isinstance(case, LastLayer):
        contestant = last_layer.enter(case, [name])[name]
    else:
        contestant = contestants.enter(case, [name])[name]
    contestant.work(contestant.prepare())  # code and threads take memory once, and are not counted
    resident = _resident(contestant) if _RESET.exists() else None
    allocated = peak_bytes(lambda: contestant.work(contestant.prepare()), torch.device("cpu"))
    return {"resident": resident, "allocated": allocated}


def _resident(contestant: Contestant) -> int:
    logits = contestant.prepare()
    ctypes.CDLL(None).malloc_trim(0)  # else the work would be given what the first one freed
    _RESET.write_text(_RESET_HIGH_WATER_MARK)
    before = _status("VmRSS")
    contestant.work(logits)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
