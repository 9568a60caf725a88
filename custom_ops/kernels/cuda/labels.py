"""Labels as the kernels read them, and what a kernel does about one that is no class.

It reads nothing through such a label, makes its row NaN, and leaves a record in the host's memory
(`record.py`), where the next call finds it without waiting for the device.
"""

import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.launch import launch, on_device
from custom_ops.kernels.cuda.record import (
    CLASSES,
    DIMS,
    IGNORE_INDEX,
    LABEL,
    POSITION,
    READY,
    TAKEN,
    record_of,
)
from custom_ops.kernels.cuda.tiles import ceil_div

__all__ = ["read_labels", "recorded", "report"]

LABELS = 1024  # that a program of `labels_reported` looks at

NOWHERE: tl.constexpr = tl.constexpr(2**63 - 1)  # no row has this number
_READY: tl.constexpr = tl.constexpr(READY)
_POSITION: tl.constexpr = tl.constexpr(POSITION)
_LABEL: tl.constexpr = tl.constexpr(LABEL)
_CLASSES: tl.constexpr = tl.constexpr(CLASSES)
_IGNORE_INDEX: tl.constexpr = tl.constexpr(IGNORE_INDEX)
_DIMS: tl.constexpr = tl.constexpr(DIMS)
_TAKEN: tl.constexpr = tl.constexpr(TAKEN)


@triton.jit
def read_labels(target, r, rows, classes, ignore_index):
    """The labels, as classes (0 where they are none), which are ignored, and which out of range."""
    label = tl.load(target + r, mask=r < rows, other=0).to(tl.int64)
    inside = label.to(tl.uint64) < tl.cast(classes, tl.uint64)  # a negative one is a large one
    t = tl.where(inside, label.to(tl.int32), 0)
    ignored = label == ignore_index
    return label, t, ignored, (inside | ignored) == 0


@triton.jit
def recorded(record, r, label, bad, classes, ignore_index, dims):
    """Leave the first bad label of this tile in the record, unless another program has."""
    r = r.to(tl.int64)
    position = tl.min(tl.where(bad, r, NOWHERE), 0)
    # one `if` with `and` would take the record in any case: both sides are evaluated
    if position < NOWHERE:  # noqa: SIM102
        if tl.atomic_xchg(record + _TAKEN, tl.full((), 1, tl.int64), scope="sys") == 0:
            tl.store(record + _POSITION, position)
            tl.store(record + _LABEL, tl.sum(tl.where(r == position, label, 0), 0))
            tl.store(record + _CLASSES, tl.cast(classes, tl.int64))
            tl.store(record + _IGNORE_INDEX, tl.cast(ignore_index, tl.int64))
            tl.store(record + _DIMS, tl.cast(dims, tl.int64))
            # released to the host last, who looks at the rest only then
            tl.atomic_xchg(record + _READY, tl.full((), 1, tl.int64), sem="release", scope="sys")


@triton.jit(do_not_specialize=["rows", "classes", "ignore_index", "dims"])
def labels_reported(target, record, dims, rows, classes, ignore_index, BLOCK: tl.constexpr):
    """Leave the first bad label in the record, whatever is computed from the labels later."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label, _, _, bad = read_labels(target, r, rows, classes, ignore_index)
    recorded(record, r, label, bad & (r < rows), classes, ignore_index, dims)


def report(target: Tensor, classes: int, ignore_index: int) -> None:
    """Look at all labels at once: who takes them in blocks knows no label's place among all."""
    record = record_of(target)
    record.check()
    if target.numel() == 0:
        return
    sizes = (target.dim(), target.numel(), classes, ignore_index)
    programs = ceil_div(target.numel(), LABELS)
    with on_device(target):
        launch(labels_reported, programs, 4, target.contiguous(), record.host, *sizes, LABELS)
