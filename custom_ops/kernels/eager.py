"""What every kernel means, in plain ATen: runs on any device, differentiable to any order.

z are the logits, and along the classes

    M = max z        L = log Σ exp(z − M)        lse = M + L        p = exp((z − M) − L)

M and L are kept apart: where all logits of a row share a large offset, lse alone would round away
the digits of L. M is a constant shift, so no derivative passes through it.

A method that ends in an underscore works on a tensor made one step before, whose values no
derivative needs: it saves fresh memory, the larger part of an element-wise operator's time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.kernels.labels import checked_labels
from custom_ops.kernels.options import Options, statistics_dtype
from custom_ops.kernels.targets import along, ignored_rows, label_rows, product, smoothed, weighted

__all__ = [
    "capped",
    "contract",
    "cross_entropy",
    "cross_entropy_vjp",
    "log_softmax",
    "log_softmax_jvp",
    "log_softmax_vjp",
    "maximum",
    "softmax",
    "statistics",
]


def maximum(z: Tensor, dim: int) -> Tensor:
    """Return M, the class dimension kept with size 1; 0 where there is no class."""
    if z.dim() > 0 and z.shape[dim] == 0:
        return z.detach().sum(dim, keepdim=True)
    return z.detach().amax(dim, keepdim=True)


def statistics(z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return M and L, the class dimension kept with size 1."""
    M = maximum(z, dim)
    return M, (z - M).exp_().sum(dim, keepdim=True).log()


def softmax(z: Tensor, dim: int) -> Tensor:
    """p = exp(z − M) / Σ exp(z − M)."""
    x = z.to(statistics_dtype(z.dtype))
    e = (x - maximum(x, dim)).exp_()
    return (e / e.sum(dim, keepdim=True)).to(z.dtype)


def log_softmax(z: Tensor, dim: int) -> Tensor:
    """log p = (z − M) − L."""
    x = z.to(statistics_dtype(z.dtype))
    M, L = statistics(x, dim)
    return ((x - M) - L).to(z.dtype)


def contract(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """J v = vᵀJ = p ⊙ (v − ⟨p, v⟩): the contraction with J = diag(p) − p pᵀ in O(C)."""
    q, w = p.to(statistics_dtype(p.dtype)), v.to(statistics_dtype(v.dtype))
    return (q * (w - (q * w).sum(dim, keepdim=True))).to(v.dtype)


def log_softmax_vjp(y: Tensor, v: Tensor, dim: int) -> Tensor:
    """v − p Σ_k v_k, with p = exp(y)."""
    x, w = y.to(statistics_dtype(y.dtype)), v.to(statistics_dtype(v.dtype))
    return (w - x.exp() * w.sum(dim, keepdim=True)).to(v.dtype)


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
    """Return a loss ℓ, M, L and the prediction a row; an ignored row has ℓ = M = L = 0 and −1.

    ℓ = ⟨ỹ, lse − z⟩ + λ lse², where lse − z_k is taken as (M − z_k) + L.
    """
    if not target.is_floating_point():
        target = checked_labels(target, input.shape[o.dim], o.ignore_index)
    if input.shape[o.dim] == 0:
        nothing = input.sum(o.dim, dtype=o.dtype)  # the empty sum, a row each
        return nothing, nothing.clone(), nothing.clone(), nothing.long() - 1 if o.predict else None
    z, _, _ = capped(input, o)
    M, L = statistics(z, o.dim)
    if target.is_floating_point():
        y = weighted(smoothed(target, z.shape[o.dim], o), weight, o)
        loss = product(y, (M - z) + L).sum(o.dim)
    else:
        loss = _label_loss(z, M, L, target, weight, o)
    M, L = M.squeeze(o.dim), L.squeeze(o.dim)
    if o.z_loss:
        loss = loss + o.z_loss * (M + L) ** 2
    prediction = z.detach().argmax(o.dim) if o.predict else None
    if not target.is_floating_point():
        ignored = ignored_rows(target, o).squeeze(o.dim)
        loss, M, L = (x.masked_fill(ignored, 0.0) for x in (loss, M, L))
        prediction = None if prediction is None else prediction.masked_fill(ignored, -1)
    return loss, M, L, prediction


def _label_loss(
    z: Tensor, M: Tensor, L: Tensor, labels: Tensor, weight: Tensor | None, o: Options
) -> Tensor:
    """⟨ỹ, lse − z⟩ for labels: one class is read, and all of them only when smoothing wants it."""
    classes, eps = z.shape[o.dim], o.label_smoothing
    index, count = label_rows(labels, classes, o)
    w_t = count if weight is None else count * weight[index]
    loss = product(w_t * (1 - eps), (M - z.gather(o.dim, index)) + L)
    if eps:
        even = count * (eps / classes)
        y = even if weight is None else even * along(weight, o.dim, z)
        loss = loss + product(y, (M - z) + L).sum(o.dim, keepdim=True)
    return loss.squeeze(o.dim)


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
    g, M, L = (x.unsqueeze(o.dim) for x in (g, M, L))
    p = (z - M).sub_(L).exp_()
    classes, eps = z.shape[o.dim], o.label_smoothing
    if target.is_floating_point():
        y = weighted(smoothed(target, classes, o), weight, o)
        dz = _row_factor(y.sum(o.dim, keepdim=True), g, h, M + L, o) * p - g * y
    else:
        index, count = label_rows(target, classes, o)
        w_t = count if weight is None else count * weight[index]
        m = w_t * (1 - eps)
        if eps:
            m = m + count * ((classes if weight is None else weight.sum()) * (eps / classes))
        dz = _row_factor(m, g, h, M + L, o) * p
        if eps:
            even = g * count * (eps / classes)
            dz = dz - (even if weight is None else even * along(weight, o.dim, z))
        dz = dz.scatter_add_(o.dim, index, g * w_t * (eps - 1))
    dx = dz if o.softcap is None and o.logit_scale == 1 else dz * slope
    if not target.is_floating_point():
        dx = dx.masked_fill_(ignored_rows(target, o), 0.0)
    return dx.to(input.dtype)


def _row_factor(m: Tensor, g: Tensor, h: Tensor | None, lse: Tensor, o: Options) -> Tensor:
    """a = g·c + h with c = m + 2λ·lse."""
    c = m + 2 * o.z_loss * lse if o.z_loss else m
    return g * c if h is None else g * c + h.unsqueeze(o.dim)
