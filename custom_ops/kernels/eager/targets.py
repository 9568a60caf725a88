"""Every kind of target as one thing: the weights ỹ that the classes of a row have in its loss.

    labels          s_k = (1 − ε)[k = t] + ε/C, and 0 in a row that is ignored
    probabilities   s_k = (1 − ε) y_k + ε/C
    both            ỹ_k = w_k s_k                      w = 1 without class weights

with ε the label smoothing (Szegedy et al., 2016, section 7) and w the class weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from custom_ops.kernels.problem import Options

__all__ = [
    "LabelRows",
    "along",
    "ignored_rows",
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
    """Return which rows are ignored.

    Compared in int64: in uint8, an ignore_index of −100 would be the label 156.
    """
    return labels.to(torch.int64) == o.ignore_index


class LabelRows(NamedTuple):
    """Labels as the rows' arithmetic takes them, without the class dimension."""

    label: Tensor  #: int64, safe to read through: the label, or the class nearest to it
    outside: Tensor  #: whether the label is none of the classes
    ignored: Tensor  #: whether that is because it is ignored

    @staticmethod
    def of(labels: Tensor, classes: int, o: Options) -> LabelRows:
        """Read the labels once."""
        labels = labels.to(torch.int64)
        label = labels.clamp(0, max(classes - 1, 0))
        return LabelRows(label, labels != label, labels == o.ignore_index)

    def mask(self, x: Tensor) -> Tensor:
        """Return x, one a row, with 0 where it is ignored, else NaN where the label is outside.

        On the CPU such a label has raised before; on other devices its row is NaN.
        """
        return x.masked_fill(self.outside, torch.nan).masked_fill(self.ignored, 0.0)


def label_weights(labels: Tensor, classes: int, weight: Tensor, o: Options) -> Tensor:
    """Return w_t of each row, 0 where it is ignored: their sum is the mean's denominator."""
    rows = LabelRows.of(labels, classes, o)
    return rows.mask(weight[rows.label])


def smoothed(target: Tensor, classes: int, o: Options) -> Tensor:
    """Return s, in the shape of the logits."""
    eps = o.label_smoothing
    if target.is_floating_point():
        return target.to(o.dtype) * (1 - eps) + eps / max(classes, 1)
    rows = LabelRows.of(target, classes, o)
    t = rows.label.unsqueeze(o.dim)
    one_hot = (along(torch.arange(classes, device=target.device), o.dim, t) == t).to(o.dtype)
    counts = rows.mask(torch.ones_like(rows.label, dtype=o.dtype)).unsqueeze(o.dim)
    return counts * (one_hot * (1 - eps) + eps / max(classes, 1))


def weighted(s: Tensor, weight: Tensor | None, o: Options) -> Tensor:
    """Return ỹ_k = w_k s_k."""
    return s if weight is None else s * along(weight, o.dim, s)


def push_forward(
    s: Tensor, weight: Tensor | None, y_t: Tensor | None, w_t: Tensor | None, o: Options
) -> Tensor | None:
    """Return the tangent of ỹ = w ⊙ s along those of y and w; None if there is neither.

    It is w(1 − ε) ⊙ y_t + w_t ⊙ s.
    """
    terms = []
    if y_t is not None:
        terms.append(weighted(y_t.to(o.dtype) * (1 - o.label_smoothing), weight, o))
    if w_t is not None:
        terms.append(weighted(s, w_t, o))
    return sum(terms[1:], terms[0]) if terms else None


def pull_back(
    s: Tensor, target: Tensor, weight: Tensor | None, dy: Tensor, o: Options
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the target and of the class weights, from dy, that of ỹ = w ⊙ s.

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
