"""The derivatives of one row's cross-entropy as plain algebra: every formula once.

The letters are those of `custom_ops.cross_entropy`, whose docstring derives the formulas. This is
what forward mode computes, and what autograd is given where a derivative is differentiated again;
the last layer (`custom_ops.linear_cross_entropy`) asks for the same, a block of rows at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from custom_ops.kernels import Options, eager, targets
from custom_ops.softmax import contract

__all__ = ["Row", "RowCotangents", "blank_ignored", "ignored_rows"]


def blank_ignored(input: Tensor, target: Tensor, o: Options) -> Tensor:
    """Return the input with 0 in the rows that are ignored: no NaN of theirs meets a derivative."""
    ignored = ignored_rows(target, o)
    return input if ignored is None else input.masked_fill(ignored, 0.0)


def ignored_rows(target: Tensor, o: Options) -> Tensor | None:
    """Return which rows are ignored, the class dimension kept; None for probabilities."""
    if target.is_floating_point():
        return None
    return targets.ignored_rows(target, o).unsqueeze(o.dim)


class Row(NamedTuple):
    """The formulas' letters as plain differentiable algebra, the class dimension kept.

    Ignored rows are looked at nowhere: their logits stand as 0, and whatever is summed over a row
    or multiplied with it passes through `counted` first.
    """

    s: Tensor
    y: Tensor
    p: Tensor
    surprisal: Tensor  # lse − z_k = −log p_k
    c: Tensor
    slope: Tensor | float  # z'(x)
    bend: Tensor | float  # z''(x)
    ignored: Tensor | None
    o: Options

    @staticmethod
    def of(input: Tensor, target: Tensor, weight: Tensor | None, o: Options) -> Row:
        """Work the letters out."""
        ignored = ignored_rows(target, o)
        z, slope, bend = eager.capped(blank_ignored(input, target, o), o)
        M, L = eager.statistics(z, o.dim)
        s = targets.smoothed(target, z.shape[o.dim], o)
        y = targets.weighted(s, weight, o)
        if ignored is not None:
            y = y.masked_fill(s == 0, 0.0)  # the weight of a class that no label names is not read
        c = y.sum(o.dim, keepdim=True) + 2 * o.z_loss * (M + L)
        return Row(s, y, ((z - M) - L).exp(), (M - z) + L, c, slope, bend, ignored, o)

    def sum(self, x: Tensor) -> Tensor:
        """Σ_k x_k."""
        return x.sum(self.o.dim, keepdim=True)

    def counted(self, x: Tensor) -> Tensor:
        """Return x with 0 in the rows that are ignored."""
        return x if self.ignored is None else x.masked_fill(self.ignored, 0.0)

    def upstream(self, x: Tensor | None) -> Tensor:
        """One number a row; 0 for none, and in a row that is ignored."""
        if x is None:
            return torch.zeros_like(self.c)
        return self.counted(x.to(self.o.dtype).unsqueeze(self.o.dim))

    def into_logits(self, v: Tensor) -> Tensor:
        """A tangent or cotangent of x as one of z: z'(x) ⊙ v."""
        return self.slope * self.counted(v.to(self.o.dtype))

    def hessian_product(self, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        """∂⟨v, dx⟩/∂x = z' ⊙ (a·J u + 2λ·g·⟨p, u⟩·p) + z'' ⊙ v ⊙ dz, with u = z' ⊙ v."""
        u = self.into_logits(v)
        a = g * self.c + h
        Hu = a * contract(self.p, u, self.o.dim)
        if self.o.z_loss:
            Hu = Hu + 2 * self.o.z_loss * g * self.sum(self.p * u) * self.p
        product = self.slope * Hu
        if self.o.softcap is not None:
            product = product + self.bend * self.counted(v.to(self.o.dtype)) * (
                a * self.p - g * self.y
            )
        return product

    def gradient(self, g: Tensor, h: Tensor) -> Tensor:
        """dx = z' ⊙ (a·p − g·ỹ)."""
        return self.slope * ((g * self.c + h) * self.p - g * self.y)

    def gradient_vjp(self, v: Tensor, g: Tensor, h: Tensor) -> RowCotangents:
        """What v, a cotangent of dx, is to x, g, h and ỹ."""
        u = self.into_logits(v)
        pu = self.sum(self.p * u)
        d_g = self.c * pu - self.sum(targets.product(self.y, u))
        return RowCotangents(self.hessian_product(v, g, h), d_g, pu, g * (pu - u))

    def gradient_jvp(
        self,
        dx: Tensor | None,
        dy: Tensor | None,
        g: Tensor,
        h: Tensor,
        dg: Tensor | None,
        dh: Tensor | None,
    ) -> Tensor:
        """The tangent of dx along those of x, ỹ, g and h."""
        out = torch.zeros_like(self.p) if dx is None else self.hessian_product(dx, g, h)
        d_a = self.c * self.upstream(dg) + self.upstream(dh)
        d_gy = self.upstream(dg) * self.y
        if dy is not None:
            d_a, d_gy = d_a + g * self.sum(dy), d_gy + g * dy
        return out + self.slope * (d_a * self.p - d_gy)

    def loss_jvp(self, dx: Tensor | None, dy: Tensor | None) -> tuple[Tensor, Tensor]:
        """The tangents of ℓ and lse along those of x and ỹ, one a row."""
        d_loss = d_lse = self.sum(torch.zeros_like(self.p))
        if dx is not None:
            dz = self.into_logits(dx)
            d_lse = self.sum(self.p * dz)  # ∂lse/∂z_s = p_s
            d_loss = self.c * d_lse - self.sum(targets.product(self.y, dz))
        if dy is not None:
            d_loss = d_loss + self.sum(targets.product(dy, self.surprisal))
        return d_loss.squeeze(self.o.dim), d_lse.squeeze(self.o.dim)


class RowCotangents(NamedTuple):
    """What a cotangent of a row's gradient is to everything that the gradient is made of."""

    input: Tensor
    g: Tensor
    h: Tensor
    y: Tensor
