"""The derivatives of one row's cross-entropy as plain algebra: every formula once.

The letters are those of `custom_ops.cross_entropy`, whose docstring derives the formulas. This is
what forward mode computes, and what autograd is given where a derivative is differentiated again;
the last layer (`custom_ops.linear_cross_entropy`) asks for the same, a block of rows at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from custom_ops.kernels import Options, eager
from custom_ops.kernels.eager import targets
from custom_ops.softmax import contract

__all__ = ["Row", "Upstream", "blank_ignored", "ignored_rows"]


def blank_ignored(input: Tensor, target: Tensor, o: Options) -> Tensor:
    """Return the input with 0 in the rows that are ignored: no NaN of theirs meets a derivative."""
    ignored = ignored_rows(target, o)
    return input if ignored is None else input.masked_fill(ignored, 0.0)


def ignored_rows(target: Tensor, o: Options) -> Tensor | None:
    """Return which rows are ignored, the class dimension kept; None for probabilities."""
    if target.is_floating_point():
        return None
    return targets.ignored_rows(target, o).unsqueeze(o.dim)


class Upstream(NamedTuple):
    """The upstream gradients of ℓ, lse and the entropy of each row, or their tangents."""

    g: Tensor
    q: Tensor
    e: Tensor | None


class RowCotangents(NamedTuple):
    """The gradients of everything that a row's gradient is made of."""

    input: Tensor
    y: Tensor
    g: Tensor
    q: Tensor
    e: Tensor


class Row(NamedTuple):
    """The formulas' letters as plain differentiable algebra, the class dimension kept.

    Ignored rows are looked at nowhere: their logits stand as 0, and whatever is summed over a row
    or multiplied with it passes through `counted` first.
    """

    share: Tensor  #: s of `targets`: the target without class weights
    y: Tensor  #: ỹ
    p: Tensor
    surprisal: Tensor  #: lse − z_k = −log p_k
    c: Tensor
    slope: Tensor | float  #: z'
    bend: Tensor | float  #: z''
    ignored: Tensor | None
    o: Options

    @staticmethod
    def of(input: Tensor, target: Tensor, weight: Tensor | None, o: Options) -> Row:
        """Work the letters out."""
        ignored = ignored_rows(target, o)
        z, slope, bend = eager.capped(blank_ignored(input, target, o), o)
        M, L = eager.statistics(z, o.dim)
        share = targets.smoothed(target, z.shape[o.dim], o)
        y = targets.weighted(share, weight, o)
        if ignored is not None:
            y = y.masked_fill(share == 0, 0.0)  # the weight of an unnamed class is not read
        c = y.sum(o.dim, keepdim=True) + 2 * o.z_loss * (M + L)
        p = ((z - M) - L).exp()
        return Row(share, y, p, (M - z) + L, c, slope, bend, ignored, o)

    def sum(self, x: Tensor) -> Tensor:
        """Σ_k x_k."""
        return x.sum(self.o.dim, keepdim=True)

    def counted(self, x: Tensor) -> Tensor:
        """Return x with 0 in the rows that are ignored."""
        return x if self.ignored is None else x.masked_fill(self.ignored, 0.0)

    def upstream(
        self, g: Tensor | None, q: Tensor | None = None, e: Tensor | None = None
    ) -> Upstream:
        """Return g, q and e, the class dimension kept; 0 in an ignored row, and for no g or q."""

        def kept(x: Tensor) -> Tensor:
            return self.counted(x.to(self.o.dtype).unsqueeze(self.o.dim))

        g, q = (torch.zeros_like(self.c) if x is None else kept(x) for x in (g, q))
        return Upstream(g, q, None if e is None else kept(e))

    def into_logits(self, v: Tensor) -> Tensor:
        """Return a tangent or cotangent of the input as one of z: z' ⊙ v."""
        return self.slope * self.counted(v.to(self.o.dtype))

    def dz(self, up: Upstream) -> Tensor:
        """a·p − g·ỹ + e·∂H/∂z, with a = g·c + q."""
        dz = (up.g * self.c + up.q) * self.p - up.g * self.y
        return dz if up.e is None else dz + up.e * self.entropy_gradient()

    def entropy_gradient(self) -> Tensor:
        """∂H/∂z = J (−log p), H = −Σ p log p; a class with p = 0 adds nothing."""
        surprisal = targets.product(self.p.sign(), self.surprisal)
        return contract(self.p, surprisal, self.o.dim)

    def gradient(self, up: Upstream) -> Tensor:
        """z' ⊙ dz."""
        return self.slope * self.dz(up)

    def hessian_product(self, v: Tensor, up: Upstream) -> Tensor:
        """∂⟨v, z' ⊙ dz⟩/∂input = z' ⊙ H u + z'' ⊙ v ⊙ dz, with u = z' ⊙ v.

        H u = a·J u + 2λ·g·⟨p, u⟩·p is ∂⟨u, dz⟩/∂z, to which the entropy H adds
        e·(J u ⊙ (−log p − H − 1) − ⟨u, ∂H/∂z⟩·p).
        """
        u = self.into_logits(v)
        Ju = contract(self.p, u, self.o.dim)
        Hu = (up.g * self.c + up.q) * Ju
        if self.o.z_loss:
            Hu = Hu + 2 * self.o.z_loss * up.g * self.sum(self.p * u) * self.p
        if up.e is not None:
            H = self.sum(targets.product(self.p, self.surprisal))
            bent = targets.product(Ju, self.surprisal - H - 1)
            Hu = Hu + up.e * (bent - self.sum(u * self.entropy_gradient()) * self.p)
        product = self.slope * Hu
        if self.o.softcap is not None:
            product = product + self.bend * self.counted(v.to(self.o.dtype)) * self.dz(up)
        return product

    def gradient_vjp(self, v: Tensor, up: Upstream) -> RowCotangents:
        """Return the gradients of ⟨v, z' ⊙ dz⟩."""
        u = self.into_logits(v)
        pu = self.sum(self.p * u)
        d_g = self.c * pu - self.sum(targets.product(self.y, u))
        d_e = torch.zeros_like(pu) if up.e is None else self.sum(u * self.entropy_gradient())
        return RowCotangents(self.hessian_product(v, up), up.g * (pu - u), d_g, pu, d_e)

    def gradient_jvp(
        self, input_t: Tensor | None, y_t: Tensor | None, up: Upstream, up_t: Upstream
    ) -> Tensor:
        """Return the tangent of z' ⊙ dz along those of the input, ỹ, and g, q, e."""
        out = torch.zeros_like(self.p)
        if input_t is not None:
            out = self.hessian_product(input_t, up)
        dz_t = self.dz(up_t)
        if y_t is not None:
            dz_t = dz_t + up.g * (self.sum(y_t) * self.p - y_t)
        return out + self.slope * dz_t

    def loss_jvp(self, input_t: Tensor | None, y_t: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tangents of ℓ, lse and the entropy along those of the input and ỹ."""
        loss_t = lse_t = H_t = self.sum(torch.zeros_like(self.p))
        if input_t is not None:
            z_t = self.into_logits(input_t)
            lse_t = self.sum(self.p * z_t)  # ∂lse/∂z_s = p_s
            loss_t = self.c * lse_t - self.sum(targets.product(self.y, z_t))
            if self.o.stats:
                H_t = self.sum(self.entropy_gradient() * z_t)
        if y_t is not None:
            loss_t = loss_t + self.sum(targets.product(y_t, self.surprisal))
        return tuple(t.squeeze(self.o.dim) for t in (loss_t, lse_t, H_t))  # type: ignore[return-value]
