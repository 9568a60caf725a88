"""What every kernel means, in plain ATen: runs on any device, differentiable to any order.

z are the logits, and along the classes

    M = max z        L = log Σ exp(z − M)        lse = M + L        p = exp((z − M) − L)

M and L are kept apart: where all logits of a row share a large offset, lse alone would round away
the digits of L. M is a constant shift, so no derivative passes through it.

`over` writes over a tensor made one step before, whose values no derivative needs: it saves fresh
memory, the larger part of an element-wise operator's time. Not where somebody sees the operators,
who may keep that tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.kernels.labels import checked_labels
from custom_ops.kernels.options import Options, statistics_dtype
from custom_ops.kernels.targets import LabelRows, along, product, smoothed, weighted
from custom_ops.surroundings import is_watched

__all__ = [
    "capped",
    "contract",
    "cross_entropy",
    "cross_entropy_vjp",
    "cross_entropy_vjp_",
    "log_softmax",
    "log_softmax_jvp",
    "log_softmax_vjp",
    "maximum",
    "softmax",
    "statistics",
    "total",
]


def over(x: Tensor, operator: str, *args: Any) -> Tensor:
    """Return x.operator(*args), in the place of x where nobody may have kept it."""
    return getattr(x, operator if is_watched() else f"{operator}_")(*args)


def maximum(z: Tensor, dim: int) -> Tensor:
    """Return M, the class dimension kept with size 1; 0 where there is no class."""
    if z.dim() > 0 and z.shape[dim] == 0:
        return z.detach().sum(dim, keepdim=True)
    return z.detach().amax(dim, keepdim=True)


def statistics(z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return M and L, the class dimension kept with size 1."""
    M = maximum(z, dim)
    return M, over(z - M, "exp").sum(dim, keepdim=True).log()


def softmax(z: Tensor, dim: int) -> Tensor:
    """p = exp(z − M) / Σ exp(z − M)."""
    x = z.to(statistics_dtype(z.dtype))
    e = over(x - maximum(x, dim), "exp")
    return (e / e.sum(dim, keepdim=True)).to(z.dtype)


def log_softmax(z: Tensor, dim: int) -> Tensor:
    """log p = (z − M) − L."""
    x = z.to(statistics_dtype(z.dtype))
    M, L = statistics(x, dim)
    return over(x - M, "sub", L).to(z.dtype)


def contract(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """J v = vᵀJ = p ⊙ (v − ⟨p, v⟩): the contraction with J = diag(p) − p pᵀ in O(C)."""
    q, w = p.to(statistics_dtype(p.dtype)), v.to(statistics_dtype(v.dtype))
    return over(w - (q * w).sum(dim, keepdim=True), "mul", q).to(v.dtype)


def log_softmax_vjp(y: Tensor, v: Tensor, dim: int) -> Tensor:
    """v − p Σ_k v_k, with p = exp(y)."""
    x, w = y.to(statistics_dtype(y.dtype)), v.to(statistics_dtype(v.dtype))
    return torch.addcmul(w, x.exp(), w.sum(dim, keepdim=True), value=-1).to(v.dtype)


def log_softmax_jvp(y: Tensor, v: Tensor, dim: int) -> Tensor:
    """v − ⟨p, v⟩, with p = exp(y)."""
    x, w = y.to(statistics_dtype(y.dtype)), v.to(statistics_dtype(v.dtype))
    return (w - (x.exp() * w).sum(dim, keepdim=True)).to(v.dtype)


def capped(x: Tensor, o: Options) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """Return z = s·tanh(α x / s), or α x without a cap, and its first two derivatives in x."""
    x = x.to(o.dtype)
    if o.softcap is None:
        return (x if o.logit_scale == 1 else x * o.logit_scale), o.logit_scale, 0.0
    t = (x * (o.logit_scale / o.softcap)).tanh()
    slope = o.logit_scale * (1 - t * t)
    return o.softcap * t, slope, (-2 * o.logit_scale / o.softcap) * t * slope


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, o: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return ℓ, M, L and the prediction (None unless it is wanted), one a row.

    ℓ = ⟨ỹ, lse − z⟩ + λ lse², where lse − z_k is taken as (M − z_k) + L. An ignored row has ℓ = 0
    and, where the prediction is wanted, M = L = 0 and −1.
    """
    if not target.is_floating_point():
        target = checked_labels(target, input.shape[o.dim], o.ignore_index)
    if input.shape[o.dim] == 0:
        nothing = input.sum(o.dim, dtype=o.dtype)  # the empty sum, a row each
        return nothing, nothing.clone(), nothing.clone(), nothing.long() - 1 if o.predict else None
    z, _, _ = capped(input, o)
    M, L = statistics(z, o.dim)
    prediction = z.detach().argmax(o.dim) if o.predict else None
    if target.is_floating_point():
        y = weighted(smoothed(target, z.shape[o.dim], o), weight, o)
        loss = product(y, (M - z) + L).sum(o.dim)
        M, L = M.squeeze(o.dim), L.squeeze(o.dim)
        return _plus_z_loss(loss, M, L, o), M, L, prediction
    rows = LabelRows.of(target, z.shape[o.dim], o)
    loss = _label_loss(z, M, L, rows.label, weight, o)
    M, L = M.squeeze(o.dim), L.squeeze(o.dim)
    loss = rows.mask(_plus_z_loss(loss, M, L, o))
    if prediction is not None:
        M, L = M.masked_fill(rows.ignored, 0.0), L.masked_fill(rows.ignored, 0.0)
        prediction = prediction.masked_fill(rows.ignored, -1)
    return loss, M, L, prediction


def _plus_z_loss(loss: Tensor, M: Tensor, L: Tensor, o: Options) -> Tensor:
    return loss + o.z_loss * (M + L) ** 2 if o.z_loss else loss


def _label_loss(
    z: Tensor, M: Tensor, L: Tensor, index: Tensor, weight: Tensor | None, o: Options
) -> Tensor:
    """⟨ỹ, lse − z⟩ for labels: one class is read, and all of them only when smoothing wants it."""
    classes, eps = z.shape[o.dim], o.label_smoothing
    loss = ((M - z.gather(o.dim, index.unsqueeze(o.dim))) + L).squeeze(o.dim)
    if weight is not None:
        loss = product(weight[index], loss)
    if eps:
        w = torch.ones_like(M) if weight is None else along(weight, o.dim, z)
        even = product(w, (M - z) + L).sum(o.dim)
        loss = (1 - eps) * loss + (eps / classes) * even if eps < 1 else even / classes
    return loss


def cross_entropy_vjp(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    M: Tensor,
    L: Tensor,
    o: Options,
) -> Tensor:
    """Return z'(x) ⊙ (a·p − g·ỹ) with a = g·c + h and c = m + 2λ·lse; 0 in an ignored row.

    g is the upstream gradient of the loss, h that of lse (None for none), both one a row.
    """
    if input.numel() == 0:
        return torch.zeros_like(input)
    z, slope, _ = capped(input, o)
    ignored = None
    p = over(over(z - M.unsqueeze(o.dim), "sub", L.unsqueeze(o.dim)), "exp")
    if target.is_floating_point():
        y = weighted(smoothed(target, z.shape[o.dim], o), weight, o)
        a = _row_factor(y.sum(o.dim), g, h, M + L, o)
        dz = a.unsqueeze(o.dim) * p - g.unsqueeze(o.dim) * y
    else:
        rows = LabelRows.of(target, z.shape[o.dim], o)
        dz = _label_gradient(p, rows, weight, g, h, M + L, o)
        ignored = rows.ignored.unsqueeze(o.dim)
    dx = dz if o.softcap is None and o.logit_scale == 1 else dz * slope
    return (dx if ignored is None else over(dx, "masked_fill", ignored, 0.0)).to(input.dtype)


def cross_entropy_vjp_(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    M: Tensor,
    L: Tensor,
    o: Options,
) -> Tensor:
    """Write `cross_entropy_vjp` over the input, and return it."""
    return input.detach().copy_(cross_entropy_vjp(input, target, weight, g, h, M, L, o))


def _label_gradient(
    p: Tensor,
    rows: LabelRows,
    weight: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    lse: Tensor,
    o: Options,
) -> Tensor:
    """a·p − g·ỹ for labels, ỹ never built."""
    classes, eps = p.shape[o.dim], o.label_smoothing
    w_t = torch.ones_like(lse) if weight is None else weight[rows.label]
    m = w_t if weight is None or not eps else (1 - eps) * w_t + eps * weight.mean()
    a = rows.mask(_row_factor(m, g, h, lse, o))
    dz = a.unsqueeze(o.dim) * p
    if eps:
        even = (eps / classes) * g.unsqueeze(o.dim)
        dz = dz - (even if weight is None else even * along(weight, o.dim, p))
    named = ((eps - 1) * w_t * g).unsqueeze(o.dim)
    return over(dz, "scatter_add", o.dim, rows.label.unsqueeze(o.dim), named)


def total(x: Tensor) -> Tensor:
    """Σ x, 0-d."""
    return x.sum()


def _row_factor(m: Tensor, g: Tensor, h: Tensor | None, lse: Tensor, o: Options) -> Tensor:
    """a = g·c + h with c = m + 2λ·lse."""
    a = g * (m + 2 * o.z_loss * lse if o.z_loss else m)
    return a if h is None else a + h
