"""The door of any device: what every kernel means, in plain ATen, differentiable to any order.

z are the logits, and along the classes

    M = max z        L = log Σ exp(z − M)        lse = M + L        p = exp((z − M) − L)

M and L are kept apart: where all logits of a row share a large offset, lse alone would round away
the digits of L. M is a constant shift, so no derivative passes through it.

`over` writes over a tensor made one step before, whose values no derivative needs. That saves fresh
memory, most of an element-wise operator's time. A mode that sees the operators may keep that
tensor, so nothing is overwritten under one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.kernels.eager.targets import LabelRows, along, product, smoothed, weighted
from custom_ops.kernels.labels import checked_labels
from custom_ops.kernels.problem import Found, Options, Problem, Rows, statistics_dtype
from custom_ops.surroundings import is_watched

__all__ = [
    "capped",
    "contract",
    "cross_entropy",
    "cross_entropy_vjp",
    "cross_entropy_vjp_",
    "cross_entropy_vjp_out",
    "entropy",
    "log_softmax",
    "log_softmax_jvp",
    "log_softmax_vjp",
    "maximum",
    "softmax",
    "statistics",
    "total",
]


def over(x: Tensor, operator: str, *args: Any) -> Tensor:
    """Return x.operator(*args), over x if no mode can have kept it."""
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


def capped(input: Tensor, o: Options) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """Return z = s·tanh(α·input / s), s the cap, or α·input without one; and z', z''."""
    x = input.to(o.dtype)
    if o.softcap is None:
        return (x if o.logit_scale == 1 else x * o.logit_scale), o.logit_scale, 0.0
    t = (x * (o.logit_scale / o.softcap)).tanh()
    slope = o.logit_scale * (1 - t * t)
    return o.softcap * t, slope, (-2 * o.logit_scale / o.softcap) * t * slope


def entropy(surprisal: Tensor, dim: int) -> Tensor:
    """−Σ p log p of each row, from the surprisal −log p; 0 · log 0 = 0."""
    return product((-surprisal).exp(), surprisal).sum(dim)


def cross_entropy(problem: Problem) -> Found:
    """Return ℓ, M, L and, if they are wanted, the prediction and the entropy, one a row.

    ℓ = ⟨ỹ, lse − z⟩ + λ lse², where lse − z_k is taken as (M − z_k) + L. An ignored row has ℓ = 0
    and, where the statistics are wanted, M = L = 0, −1 and 0.
    """
    input, target, weight, o = problem
    if not problem.soft:
        target = checked_labels(target, problem.classes, o.ignore_index)
    if problem.classes == 0:
        zero = input.sum(o.dim, dtype=o.dtype)  # the empty sum, a row each
        stats = (zero.long() - 1, zero.clone()) if o.stats else (None, None)
        return Found(zero, zero.clone(), zero.clone(), *stats)
    z, _, _ = capped(input, o)
    M, L = statistics(z, o.dim)
    prediction = z.detach().argmax(o.dim) if o.stats else None
    H = entropy((M - z) + L, o.dim) if o.stats else None
    if problem.soft:
        y = weighted(smoothed(target, problem.classes, o), weight, o)
        loss = product(y, (M - z) + L).sum(o.dim)
        M, L = M.squeeze(o.dim), L.squeeze(o.dim)
        return Found(_plus_z_loss(loss, M, L, o), M, L, prediction, H)
    rows = LabelRows.of(target, problem.classes, o)
    loss = _label_loss(z, M, L, rows.label, weight, o)
    M, L = M.squeeze(o.dim), L.squeeze(o.dim)
    loss = rows.mask(_plus_z_loss(loss, M, L, o))
    if prediction is None or H is None:
        return Found(loss, M, L, None, None)
    M, L, H = (x.masked_fill(rows.ignored, 0.0) for x in (M, L, H))
    return Found(loss, M, L, prediction.masked_fill(rows.ignored, -1), H)


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


def cross_entropy_vjp(problem: Problem, rows: Rows) -> Tensor:
    """Return z' ⊙ (a·p − g·ỹ) with a = g·c + q and c = m + 2λ·lse; 0 in an ignored row."""
    input, target, weight, o = problem
    if input.numel() == 0:
        return torch.zeros_like(input)
    z, slope, _ = capped(input, o)
    ignored = None
    p = over(over(z - rows.M.unsqueeze(o.dim), "sub", rows.L.unsqueeze(o.dim)), "exp")
    if problem.soft:
        y = weighted(smoothed(target, problem.classes, o), weight, o)
        a = _row_factor(y.sum(o.dim), rows, o)
        dz = a.unsqueeze(o.dim) * p - rows.g.unsqueeze(o.dim) * y
    else:
        labels = LabelRows.of(target, problem.classes, o)
        dz = _label_gradient(p, labels, weight, rows, o)
        ignored = labels.ignored.unsqueeze(o.dim)
    if rows.e is not None:
        surprisal = (rows.M.unsqueeze(o.dim) - z) + rows.L.unsqueeze(o.dim)
        # J (−log p), where a class with p = 0 adds nothing
        change = contract(p, product(p.sign(), surprisal), o.dim)
        dz = dz + rows.e.unsqueeze(o.dim) * change
    dz = dz if o.softcap is None and o.logit_scale == 1 else dz * slope
    return (dz if ignored is None else over(dz, "masked_fill", ignored, 0.0)).to(input.dtype)


def cross_entropy_vjp_(problem: Problem, rows: Rows) -> Tensor:
    """Write `cross_entropy_vjp` over the input, and return it."""
    return problem.input.detach().copy_(cross_entropy_vjp(problem, rows))


def cross_entropy_vjp_out(problem: Problem, rows: Rows, out: Tensor) -> None:
    """Write `cross_entropy_vjp` into `out`."""
    out.copy_(cross_entropy_vjp(problem, rows))


def _label_gradient(
    p: Tensor, labels: LabelRows, weight: Tensor | None, rows: Rows, o: Options
) -> Tensor:
    """a·p − g·ỹ for labels, ỹ never built."""
    classes, eps = p.shape[o.dim], o.label_smoothing
    w_t = torch.ones_like(rows.L) if weight is None else weight[labels.label]
    m = w_t if weight is None or not eps else (1 - eps) * w_t + eps * weight.mean()
    a = labels.mask(_row_factor(m, rows, o))
    dz = a.unsqueeze(o.dim) * p
    if eps:
        even = (eps / classes) * rows.g.unsqueeze(o.dim)
        dz = dz - (even if weight is None else even * along(weight, o.dim, p))
    named = ((eps - 1) * w_t * rows.g).unsqueeze(o.dim)
    return over(dz, "scatter_add", o.dim, labels.label.unsqueeze(o.dim), named)


def total(x: Tensor) -> Tensor:
    """Σ x, 0-d."""
    return x.sum()


def _row_factor(m: Tensor, rows: Rows, o: Options) -> Tensor:
    """a = g·c + q with c = m + 2λ·lse."""
    a = rows.g * (m + 2 * o.z_loss * (rows.M + rows.L) if o.z_loss else m)
    return a if rows.q is None else a + rows.q
