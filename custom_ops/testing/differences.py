"""Numerical derivatives in float64 with a bound on their error.

With D(h) = (f(x + h) − f(x − h)) / 2h = f′ + h²/6 f‴ + O(h⁴), Richardson's step takes the first
error term away:  R = (4 D(h/2) − D(h)) / 3.  What |D(h) − R| says about the terms left out, and
the rounding of f at the step that divides it, make the bound. At a kink the second difference
shrinks with h, where that of a smooth function shrinks with h²; on a staircase the slope at a tiny
step is another. Such entries get the bound ∞.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Difference", "difference", "jacobian"]

STEP = 2.0**-9
SMALLER = 2.0**-7  # a second try where the first step is too long
TINY = 2.0**-12  # of a step: a staircase has another slope there
EPS = 2.0**-52


@dataclass
class Difference:
    """A derivative and a bound on its error, both of f's shape; ∞ where there is none."""

    value: Tensor
    error: Tensor


def difference(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Difference:
    """Return the derivative of `f` at `x` along `direction`, which has entries of about 1.

    Args:
        f: takes a tensor like `x` and returns a 1-D float64 tensor.
        x: float64, any shape.
        direction: float64, the shape of `x`.

    >>> d = difference(lambda x: x**3, torch.tensor([2.0], dtype=torch.float64), torch.ones(1))
    >>> bool((d.value - 12).abs() <= d.error), bool(d.error < 1e-8)
    (True, True)
    """
    h = STEP * max(1.0, (x * (direction != 0)).abs().max().item() if x.numel() else 1.0)
    first = _at_step(f, x, direction, h)
    if (first.error <= 1e-7 * (1 + first.value.abs())).all():
        return first
    second = _at_step(f, x, direction, h * SMALLER)
    better = second.error < first.error
    return Difference(
        torch.where(better, second.value, first.value),
        torch.where(better, second.error, first.error),
    )


def _at_step(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, h: float) -> Difference:
    here = f(x)
    plus, minus = f(x + h * direction), f(x - h * direction)
    plus2, minus2 = f(x + h / 2 * direction), f(x - h / 2 * direction)
    D1, D2 = (plus - minus) / (2 * h), (plus2 - minus2) / h
    R = (4 * D2 - D1) / 3
    size = torch.stack([plus, minus, here]).abs().amax(0) if here.numel() else here
    noise = (f(x * (1 + 4 * EPS)) - here).abs()  # of an ill-conditioned f more than its rounding
    rounding = (32 * EPS * size + 4 * noise) / h
    error = (R - D2).abs() + rounding
    bend1, bend2 = (plus - 2 * here + minus).abs() / h, (plus2 - 2 * here + minus2).abs() * 2 / h
    kink = (bend2 > 0.75 * bend1) & (bend2 > 8 * rounding)
    tiny = h * TINY
    D3 = (f(x + tiny * direction) - f(x - tiny * direction)) / (2 * tiny)
    jump = (D3 - R).abs() > 16 * (error + rounding / TINY) + 1e-4 * R.abs()
    usable = torch.isfinite(R) & ~kink & ~jump
    return Difference(
        torch.where(usable, R, torch.zeros_like(R)),
        torch.where(usable, error, torch.full_like(R, torch.inf)),
    )


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor, entries: Sequence[int]) -> Difference:
    """Return ∂f_k/∂x_s for the flat positions s in `entries`: M × len(entries)."""
    columns = []
    for s in entries:
        direction = torch.zeros(x.numel(), dtype=x.dtype)
        direction[s] = 1.0
        columns.append(difference(f, x, direction.view(x.shape)))
    return Difference(
        torch.stack([c.value for c in columns], -1), torch.stack([c.error for c in columns], -1)
    )
