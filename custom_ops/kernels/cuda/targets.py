"""Every kind of target as ỹ, the weights that the classes of a row have in its loss.

probabilities    ỹ_k = w_k ((1 − ε) y_k + ε/C)
labels           ỹ_k = (1 − ε) w_t [k = t] + (ε/C) w_k
"""

import triton
import triton.language as tl

from custom_ops.kernels.cuda.arithmetic import scalar
from custom_ops.kernels.cuda.parameters import Target
from custom_ops.kernels.cuda.rows import cells, dense

__all__ = ["label_mass", "scaled_target", "share"]


@triton.jit
def share(y: Target, r, k, inside, shape, numbers, KIND: tl.constexpr):
    """Return what every class of a tile has, 0 in the padding: ỹ_k, or w_k for labels.

    The share of a label's class comes from `label_mass`, that of the others is (ε/C) w_k.
    """
    _, classes, inner, _ = shape
    rest, even, _, _, _ = numbers
    ACC: tl.constexpr = KIND.ACC
    found = tl.where(inside, tl.full((), 1.0, ACC), 0.0)
    if KIND.SOFT:
        at = cells(r, k, inner, dense(classes, inner))
        found = tl.load(y.target + at, mask=inside, other=0.0).to(ACC)
        if KIND.SMOOTHING != "none":
            found = tl.where(inside, found * scalar(rest, ACC) + scalar(even, ACC), 0.0)
    if y.weight is not None:
        found *= tl.load(y.weight + k, mask=(k >= 0) & (k < classes), other=0.0).to(ACC)
    return found


@triton.jit
def label_mass(y: Target, t, bad, wanted, numbers, KIND: tl.constexpr):
    """Return (1 − ε) w_t and m = Σ_k ỹ_k of each row's label t; m is NaN if t is no class."""
    rest, _, _, _, _ = numbers
    ACC: tl.constexpr = KIND.ACC
    m = tl.full((KIND.ROWS,), 1.0, ACC)
    if y.weight is not None:
        m = tl.load(y.weight + t, mask=wanted, other=0.0).to(ACC)
    named = scalar(rest, ACC) * m
    if y.mean_weight is not None:  # m = (1 − ε) w_t + ε Σ_k w_k / C
        m = scalar(rest, ACC) * m + (1.0 - scalar(rest, ACC)) * tl.load(y.mean_weight)
    return named, tl.where(bad, float("nan"), m)


@triton.jit
def scaled_target(shares, t, named, G, k, wanted, numbers, KIND: tl.constexpr):
    """Return g·ỹ of a tile, from what `share` and `label_mass` found."""
    if KIND.SOFT:
        return G[:, None] * shares
    found = tl.where(k == t[:, None], (G * named)[:, None], 0.0)
    if KIND.SMOOTHING != "none":
        even = scalar(numbers[1], KIND.ACC) * G
        found += tl.where(wanted[:, None], even[:, None] * shares, 0.0)
    return found
