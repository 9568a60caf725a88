"""Every kind of target as one thing: the weights ỹ that the classes of a row have in its loss.

    labels          s_k = (1 − ε)[k = t] + ε/C, and 0 in a row that is ignored
    probabilities   s_k = (1 − ε) y_k + ε/C
    both            ỹ_k = w_k s_k                      w = 1 without class weights

with ε the label smoothing (Szegedy et al., 2016, section 7) and w the class weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.kernels.options import Options

__all__ = [
    "along",
    "ignored_rows",
    "label_rows",
    "label_weights",
    "product",
    "pull_back",
    "push_forward",
    "smoothed",
    "weighted",
]


def along(vector: Tensor, dim: int, like: Tensor) -> Tensor:
    """Return the (C,) vector as a view that broadcasts along dimension `dim` of `like`."""
    return vector.reshape([-1 if d == dim else 1 for d in range(like.dim())])


def ignored_rows(labels: Tensor, o: Options) -> Tensor:
    """Return which rows are ignored, the class dimension kept with size 1.

    Compared in int64: in uint8, an ignore_index of −100 would be the label 156.
    """
    return (labels.to(torch.int64) == o.ignore_index).unsqueeze(o.dim)


def label_rows(labels: Tensor, classes: int, o: Options) -> tuple[Tensor, Tensor]:
    """Return an index that is safe to read through, and what a row counts.

    Both keep the class dimension, with size 1. A row counts 1; 0 if it is ignored; NaN if its label
    is out of range, which on the CPU has raised before.
    """
    t = labels.to(torch.int64).unsqueeze(o.dim)
    ignored = ignored_rows(labels, o)
    outside = (t < 0) | (t >= classes)
    count = torch.where(outside, torch.nan, 1.0).to(o.dtype)
    return t.masked_fill(ignored | outside, 0), count.masked_fill(ignored, 0.0)


def label_weights(labels: Tensor, classes: int, weight: Tensor | None, o: Options) -> Tensor:
    """Return w_t a row, the class dimension kept: what the row counts in the mean."""
    index, count = label_rows(labels, classes, o)
    return count if weight is None or classes == 0 else count * weight[index]


def smoothed(target: Tensor, classes: int, o: Options) -> Tensor:
    """Return s, in the shape of the logits."""
    eps = o.label_smoothing
    if target.is_floating_point():
        return target.to(o.dtype) * (1 - eps) + eps / max(classes, 1)
    index, count = label_rows(target, classes, o)
    k = along(torch.arange(classes, device=target.device), o.dim, index)
    return count * ((k == index).to(o.dtype) * (1 - eps) + eps / max(classes, 1))


def weighted(s: Tensor, weight: Tensor | None, o: Options) -> Tensor:
    """Return ỹ_k = w_k s_k."""
    return s if weight is None else s * along(weight, o.dim, s)


def push_forward(
    s: Tensor, weight: Tensor | None, dy: Tensor | None, dw: Tensor | None, o: Options
) -> Tensor | None:
    """Return the tangent of ỹ = w ⊙ s along (dy, dw): w(1 − ε) ⊙ dy + dw ⊙ s; None if both are."""
    terms = []
    if dy is not None:
        terms.append(weighted(dy.to(o.dtype) * (1 - o.label_smoothing), weight, o))
    if dw is not None:
        terms.append(weighted(s, dw, o))
    return sum(terms[1:], terms[0]) if terms else None


def pull_back(
    s: Tensor, target: Tensor, weight: Tensor | None, dy: Tensor, o: Options
) -> tuple[Tensor | None, Tensor | None]:
    """Return what the cotangent dy of ỹ = w ⊙ s is to the target and to the class weights.

    Labels have none; probabilities have w(1 − ε) ⊙ dy, the class weights Σ_rows s ⊙ dy.
    """
    d_target = d_weight = None
    if target.is_floating_point():
        d_target = product(weighted(torch.full_like(s, 1 - o.label_smoothing), weight, o), dy)
        d_target = d_target.to(target.dtype)
    if weight is not None:
        rows = [d for d in range(s.dim()) if d != o.dim]
        d_weight = product(s, dy)
        d_weight = d_weight.sum(rows) if rows else d_weight
    return d_target, d_weight


def product(y: Tensor, x: Tensor) -> Tensor:
    """Return y ⊙ x with 0 · ±inf = 0: a class without weight adds nothing, even at −inf."""
    return y * x.masked_fill((y == 0) & x.isinf(), 0.0)
