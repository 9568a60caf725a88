"""Labels as the kernels read them, and what a kernel does about one that is no class.

It reads nothing through such a label, makes its row NaN, and leaves a record in the host's memory
(`record.py`), where the next call finds it without waiting for the device.
"""

import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arithmetic import COMPILED
from custom_ops.kernels.cuda.launch import launch, on_device
from custom_ops.kernels.cuda.record import (
    CLASSES,
    DIMS,
    IGNORE_INDEX,
    LABEL,
    POSITION,
    READY,
    Memory,
    record_of,
)
from custom_ops.kernels.cuda.tiles import ceil_div

__all__ = ["read_labels", "recorded", "report"]

LABELS = 1024  # that a program of `labels_looked_at` looks at

NOWHERE: tl.constexpr = tl.constexpr(2**63 - 1)  # no row has this number
_READY: tl.constexpr = tl.constexpr(READY)
_POSITION: tl.constexpr = tl.constexpr(POSITION)
_LABEL: tl.constexpr = tl.constexpr(LABEL)
_CLASSES: tl.constexpr = tl.constexpr(CLASSES)
_IGNORE_INDEX: tl.constexpr = tl.constexpr(IGNORE_INDEX)
_DIMS: tl.constexpr = tl.constexpr(DIMS)


@triton.jit
def read_labels(target, r, rows, classes, ignore_index):
    """The labels, as classes (0 where they are none), which are ignored, and which out of range."""
    label = tl.load(target + r, mask=r < rows, other=0).to(tl.int64)
    inside = label.to(tl.uint64) < tl.cast(classes, tl.uint64)  # a negative one is a large one
    t = tl.where(inside, label.to(tl.int32), 0)
    ignored = label == ignore_index
    return label, t, ignored, (inside | ignored) == 0


RELEASE: tl.constexpr = tl.constexpr(
    """{
        .reg .pred first;
        mov.u32 $0, %tid.x;
        setp.eq.u32 first, $0, 0;
        @first st.release.sys.global.s64 [$1], $2;
    }"""
)


@triton.jit
def released(to, value):
    """Store the value at `to`, behind all that the program has stored, for the host to see.

    A plain store that releases, where Triton's language has an atomic exchange alone: on a device
    without atomic operations on the host's memory that is a fault.
    """
    if COMPILED:
        tl.debug_barrier()  # what other threads have stored comes first, too
        address = to.to(tl.int64)
        tl.inline_asm_elementwise(RELEASE, "=r,l,l", [address, value], tl.int32, False, 1)
    else:
        tl.store(to, value)


@triton.jit
def recorded(record: Memory, r, label, bad, classes, ignore_index, dims):
    """Leave the first bad label of this tile in the record, unless another program has."""
    r = r.to(tl.int64)
    position = tl.min(tl.where(bad, r, NOWHERE), 0)
    # one `if` with `and` would take the record in any case: both sides are evaluated
    if position < NOWHERE:  # noqa: SIM102
        if tl.atomic_xchg(record.taken, 1) == 0:
            tl.store(record.host + _POSITION, position)
            tl.store(record.host + _LABEL, tl.sum(tl.where(r == position, label, 0), 0))
            tl.store(record.host + _CLASSES, tl.cast(classes, tl.int64))
            tl.store(record.host + _IGNORE_INDEX, tl.cast(ignore_index, tl.int64))
            tl.store(record.host + _DIMS, tl.cast(dims, tl.int64))
            released(record.host + _READY, tl.full((), 1, tl.int64))


@triton.jit(do_not_specialize=["rows", "classes", "ignore_index", "dims"])
def labels_looked_at(
    target, record: Memory, dims, rows, classes, ignore_index, BLOCK: tl.constexpr
):
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
        launch(labels_looked_at, programs, 4, target.contiguous(), record.memory, *sizes, LABELS)
