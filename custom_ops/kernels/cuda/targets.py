"""Every kind of target as the weights y_k that the classes of a row have in a sum over all of them.

probabilities    y_k = ỹ_k = w_k ((1 − ε) y_k + ε/C)
labels           y_k = w_k, to be taken ε/C times; what the label names comes by itself
"""

import triton
import triton.language as tl

from custom_ops.kernels.cuda.arithmetic import scalar
from custom_ops.kernels.cuda.rows import cells, dense

__all__ = ["label_mass", "share"]


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
        at = cells(r, k, inner, dense(classes, inner))
        y = tl.load(target + at, mask=inside, other=0.0).to(ACC)
        if SMOOTHING != "none":
            y = tl.where(inside, y * scalar(rest, ACC) + scalar(even, ACC), 0.0)
    if weight is not None:
        y *= tl.load(weight + k, mask=k < classes, other=0.0).to(ACC)[None, :]
    return y


@triton.jit
def label_mass(
    weight,
    mean_weight,
    t,
    bad,
    wanted,
    numbers,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return (1 − ε) w_t and Σ_k ỹ_k of each row's label t; the sum is NaN if t is no class."""
    rest, _, _, _, _ = numbers
    m = tl.full((ROWS,), 1.0, ACC)
    if weight is not None:
        m = tl.load(weight + t, mask=wanted, other=0.0).to(ACC)
    named = scalar(rest, ACC) * m
    if mean_weight is not None:  # Σ_k ỹ_k = (1 − ε) w_t + ε Σ_k w_k / C
        m = scalar(rest, ACC) * m + (1.0 - scalar(rest, ACC)) * tl.load(mean_weight)
    return named, tl.where(bad, float("nan"), m)
