"""The arithmetic that Triton's language does not have, or not as it is meant here."""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

__all__ = ["divided", "finite", "product", "scalar", "stored", "tanh", "vanishing_exp"]

COMPILED: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def scalar(x, ACC: tl.constexpr):
    """An option's number, handed over in float64, in the dtype of the computation."""
    return tl.full((), x, ACC)


@triton.jit
def vanishing_exp(x):
    """eˣ, with subnormal results flushed to 0. Two instructions instead of five.

    Not for probabilities that the caller returns: their logarithm may be taken.
    """
    if COMPILED and x.dtype == tl.float32:
        return libdevice.fast_expf(x)
    return tl.exp(x)


@triton.jit
def divided(x, y):
    """x/y as torch divides; Triton's own division in float32 is an approximation."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def stored(x, to):
    """x as it can be stored at `to`: Triton has no step from float64 to bfloat16."""
    if x.dtype == tl.float64 and to.dtype.element_ty.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x


@triton.jit
def finite(m):
    """A number to shift a row by: its maximum m, or 0 where all of it is −inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def product(y, x):
    """y·x with 0 · ±inf = 0: a class without weight adds nothing, even at −inf."""
    return y * tl.where((y == 0) & (tl.abs(x) == float("inf")), 0.0, x)


@triton.jit
def tanh(x):
    """tanh x: near 0 by Cephes' rational form (Moshier, 1989), which loses no digit there."""
    s = x * x
    p = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3
    q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s
    small = x + x * s * (p / (q + 4.84406305325125486048e3))
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))
