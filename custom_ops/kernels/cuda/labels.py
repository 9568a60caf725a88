"""Labels as the kernels read them, and what a kernel does about one that is no class.

It reads nothing through such a label, makes its row NaN, and leaves a record in the host's memory
(`record.py`), where the next call finds it without waiting for the device.
"""

import triton
import triton.language as tl

from custom_ops.kernels.cuda.record import (
    CLASSES,
    DIMS,
    IGNORE_INDEX,
    LABEL,
    POSITION,
    READY,
)

__all__ = ["read_labels", "recorded"]

NOWHERE: tl.constexpr = tl.constexpr(2**63 - 1)  # no row has this number
_READY: tl.constexpr = tl.constexpr(READY)
_POSITION: tl.constexpr = tl.constexpr(POSITION)
_LABEL: tl.constexpr = tl.constexpr(LABEL)
_CLASSES: tl.constexpr = tl.constexpr(CLASSES)
_IGNORE_INDEX: tl.constexpr = tl.constexpr(IGNORE_INDEX)
_DIMS: tl.constexpr = tl.constexpr(DIMS)


@triton.jit
def read_labels(target, r, rows, classes, ignore_index):
    """The labels, the class nearest to each, and which are ignored or else out of range."""
    label = tl.load(target + r, mask=r < rows, other=0).to(tl.int64)
    t = tl.minimum(tl.maximum(label, 0), tl.cast(classes, tl.int64) - 1)
    ignored = label == ignore_index
    return label, t, ignored, (t != label) & (ignored == 0)


@triton.jit
def recorded(record, taken, r, label, bad, classes, ignore_index, dims):
    """Leave the first bad label of this tile in the record, unless another program has."""
    r = r.to(tl.int64)
    position = tl.min(tl.where(bad, r, NOWHERE), 0)
    # one `if` with `and` would take the record in any case: both sides are evaluated
    if position < NOWHERE:  # noqa: SIM102
        if tl.atomic_xchg(taken, 1) == 0:
            tl.store(record + _POSITION, position)
            tl.store(record + _LABEL, tl.sum(tl.where(r == position, label, 0), 0))
            tl.store(record + _CLASSES, tl.cast(classes, tl.int64))
            tl.store(record + _IGNORE_INDEX, tl.cast(ignore_index, tl.int64))
            tl.store(record + _DIMS, tl.cast(dims, tl.int64))
            # released to the host last, who looks at the rest only then
            tl.atomic_xchg(record + _READY, tl.full((), 1, tl.int64), sem="release", scope="sys")
