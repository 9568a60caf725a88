"""Every kind of target as the weights y_k that the classes of a row have in a sum over all of them.

probabilities    y_k = ỹ_k = w_k ((1 − ε) y_k + ε/C)
labels           y_k = w_k, to be taken ε/C times; what the label names comes by itself
"""

import triton
import triton.language as tl

from custom_ops.kernels.cuda.arithmetic import scalar
from custom_ops.kernels.cuda.rows import row_starts

__all__ = ["share"]


@triton.jit
def share(
    target,
    weight,
    r,
    k,
    inside,
    shape,
    numbers,
    SOFT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return y_k of a tile, 0 in the padding."""
    _, classes, inner, _ = shape
    rest, even, _, _, _ = numbers
    y = tl.where(inside, tl.full((), 1.0, ACC), 0.0)
    if SOFT:
        starts = row_starts(r, inner, tl.cast(classes, tl.int64) * inner)
        at = starts[:, None] + (k.to(tl.int64) * inner)[None, :]
        y = tl.load(target + at, mask=inside, other=0.0).to(ACC)
        if SMOOTHING != "none":
            y = tl.where(inside, y * scalar(rest, ACC) + scalar(even, ACC), 0.0)
    if weight is not None:
        y *= tl.load(weight + k, mask=k < classes, other=0.0).to(ACC)[None, :]
    return y
