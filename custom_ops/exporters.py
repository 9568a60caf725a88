"""What a program for other runtimes is made of: ATen operators alone, which converters know.

torch.export keeps two operators of this package: the check of labels, which raises there as it does
here, and the last layer, whose logits then never exist. ONNX has neither exceptions nor such an
operator, so its converter is told what they decompose to.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_ops.kernels import eager, last_layer_ops, targets
from custom_ops.row import blank_ignored
from custom_ops.surroundings import set_decomposition

__all__ = ["register"]


def _checked_labels(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """The labels; one out of range makes its row NaN, as on a device that cannot raise."""
    return target.to(torch.int64)


def _linear_cross_entropy(
    x: Tensor, W: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, *numbers: Any
) -> tuple[Tensor, ...]:
    """ℓ or Σℓ, M, L and the prediction from the logits; no gradients, as none are exported."""
    *numbers_of_o, total, _, _ = numbers
    o = last_layer_ops.options(*numbers_of_o)
    z, _, _ = eager.capped(blank_ignored(F.linear(x, W, b), target, o), o)
    M = eager.maximum(z, 1)
    L = (z - M).exp().sum(1, keepdim=True).log()  # not in place: a decomposition must not be
    y = targets.weighted(targets.smoothed(target, len(W), o), weight, o)
    loss = targets.product(y, (M - z) + L).sum(1)
    M, L, prediction = M.squeeze(1), L.squeeze(1), z.argmax(1)
    loss = loss + o.z_loss * (M + L) ** 2
    if not target.is_floating_point():
        rows = targets.LabelRows.of(target, len(W), o)
        loss = rows.mask(loss)
        M, L = M.masked_fill(rows.ignored, 0.0), L.masked_fill(rows.ignored, 0.0)
        prediction = prediction.masked_fill(rows.ignored, -1)
    empty = M.new_empty(0)
    prediction = prediction if o.predict else empty.long()
    return loss.sum() if total else loss, M, L, prediction, empty, empty, empty


def register() -> None:
    """Tell converters of exported programs what the operators decompose to."""
    set_decomposition(torch.ops.custom_ops.checked_labels.default, _checked_labels)
    set_decomposition(torch.ops.custom_ops.linear_cross_entropy.default, _linear_cross_entropy)
