"""Labels out of range: found before anything is read through them.

An operator of its own, so that the check also runs inside a compiled or exported graph, where
Python's `if` on a value cannot: there a bad label reads outside the logits with torch's built-in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from custom_ops.surroundings import is_onnx_tracing

__all__ = ["checked_labels", "labels_reported", "reported", "set_report"]

torch.library.define(
    "custom_ops::checked_labels", "(Tensor target, SymInt classes, int ignore_index) -> Tensor"
)


def checked_labels(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Return the labels as int64, or raise IndexError for the first one out of range.

    `target` has any integer dtype and any shape. On a device other than the CPU nothing is raised,
    because reading the answer would wait for the device; there a bad label makes its row NaN, and
    the Triton kernels raise at the next call.
    """
    if is_onnx_tracing():  # whose graph has no exceptions
        return target.to(torch.int64)
    return torch.ops.custom_ops.checked_labels(target, classes, ignore_index)


@torch.library.impl("custom_ops::checked_labels", "CompositeExplicitAutograd")
def _checked(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    _report(target, classes, ignore_index)
    labels = target.to(torch.int64, copy=True)
    if target.device.type == "cpu":
        bad = (labels < 0) | (labels >= classes)
        if bad.any():  # then the ignored ones are set apart, which most batches have none of
            if target.dtype != torch.uint64:  # its values beyond int64 are negative here
                bad &= labels != ignore_index
            if bad.any():
                raise IndexError(_sentence(target, bad, classes, ignore_index))
    return labels


_reports: dict[str, Callable[[Tensor, int, int], None]] = {}


def set_report(device: str, report: Callable[[Tensor, int, int], None]) -> None:
    """Have devices of this type write a bad label down by report(target, classes, ignore_index)."""
    _reports[device] = report


_here = threading.local()


@contextmanager
def reported() -> Iterator[None]:
    """Say that the labels of the calls inside are parts of what `checked_labels` has seen.

    A device then writes no bad label down a second time, with its place in its part.
    """
    before, _here.reported = labels_reported(), True
    try:
        yield
    finally:
        _here.reported = before


def labels_reported() -> bool:
    """Whether this thread is inside of `reported`."""
    return getattr(_here, "reported", False)


def _report(target: Tensor, classes: int, ignore_index: int) -> None:
    if report := _reports.get(target.device.type):
        report(target, classes, ignore_index)


@torch.library.register_fake("custom_ops::checked_labels")
def _(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    return torch.empty_like(target, dtype=torch.int64)


@torch.library.register_vmap("custom_ops::checked_labels")
def _(info, in_dims, target, classes, ignore_index):  # type: ignore[no-untyped-def]
    return checked_labels(target, classes, ignore_index), in_dims[0]


def _sentence(target: Tensor, bad: Tensor, classes: int, ignore_index: int) -> str:
    position = bad.nonzero()[0].tolist()
    where = f"[{', '.join(map(str, position))}]" if position else ""
    labels = f"0 to {classes - 1}, or " if classes else ""
    return (
        f"target{where} is {target[tuple(position)].item()}, out of range for {classes} classes "
        f"({labels}ignore_index={ignore_index})"
    )
