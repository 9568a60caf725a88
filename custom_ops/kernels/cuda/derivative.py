"""dz = a·p − g·ỹ with a = g·c + q and c = m + 2λ·lse: the derivative of a row's loss and lse."""

import triton
import triton.language as tl

from custom_ops.kernels.cuda.arithmetic import scalar
from custom_ops.kernels.cuda.parameters import Upstream

__all__ = ["factors", "row_derivative"]


@triton.jit
def factors(rows: Upstream, G, m, lse, r, wanted, numbers, KIND: tl.constexpr):
    """Return a and c of each row."""
    c = m
    if KIND.Z_LOSS:
        c += 2.0 * scalar(numbers[2], KIND.ACC) * lse
    a = G * c
    if rows.q is not None:
        a += tl.load(rows.q + r, mask=wanted, other=0.0).to(KIND.ACC)
    return a, c


@triton.jit
def row_derivative(a, p, gy):
    """dz of a tile; gy is g·ỹ."""
    return a[:, None] * p - gy
