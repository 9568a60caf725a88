"""The same bits again, and with another number of threads."""

from __future__ import annotations

import torch

from custom_ops.testing.compare import differing, owed, run
from custom_ops.testing.entry import Check
from custom_ops.testing.rows import batch
from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import Fault

__all__ = ["CHECKS"]


def twice(subject: Subject) -> str:
    """Two runs of the same numbers give the same bits."""
    found = differing(run(subject), run(subject), owed(subject))
    if found is not None:
        raise Fault(f"{found} the second time: two runs differ", "not deterministic")
    return "the same bits"


def thread_count(subject: Subject) -> str:
    """One thread and two give the same bits, for many rows where rows are independent."""
    positions = batch(subject)
    if positions is not None:
        rows = torch.arange(2048) % subject.inputs[positions[0]].shape[0]
        subject = subject.with_inputs(
            [
                x.detach()[rows].clone() if i in positions else x
                for i, x in enumerate(subject.inputs)
            ]
        )
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs.append(run(subject))
    finally:
        torch.set_num_threads(before)
    found = differing(runs[1], runs[0], owed(subject), 64)
    if found is not None:
        raise Fault(f"{found} with one thread, with two", "thread count")
    same = differing(runs[1], runs[0], owed(subject)) is None
    return "the same bits" if same else "within the rounding of another order"


CHECKS = (
    Check("determinism", "two runs", twice),
    Check("determinism", "thread count", thread_count),
)
