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

from custom_ops.kernels import eager, last_layer_ops, statistics_dtype, targets
from custom_ops.row import blank_ignored
from custom_ops.surroundings import set_decomposition

__all__ = ["register"]


def _checked_labels(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """The labels; one out of range makes its row NaN, as on a device that cannot raise."""
    return target.to(torch.int64)


def _linear_cross_entropy(
    x: Tensor, W: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, *numbers: Any
) -> tuple[Tensor, ...]:
    """ℓ or Σℓ, M, L, the prediction and the gradient of Σℓ, from logits that are built.

    The formulas are those of `custom_ops.cross_entropy`. Nothing is written in place, as a
    decomposition must not.
    """
    *numbers_of_o, total, wanted, _ = numbers
    o = last_layer_ops.options(*numbers_of_o)
    x = blank_ignored(x, target, o)
    z, slope, _ = eager.capped(F.linear(x, W, b), o)
    M = eager.maximum(z, 1)
    L = (z - M).exp().sum(1, keepdim=True).log()
    y = targets.weighted(targets.smoothed(target, len(W), o), weight, o)
    loss = targets.product(y, (M - z) + L).sum(1) + o.z_loss * (M + L).squeeze(1) ** 2
    dz = slope * ((y.sum(1, keepdim=True) + 2 * o.z_loss * (M + L)) * ((z - M) - L).exp() - y)
    M, L, prediction = M.squeeze(1), L.squeeze(1), z.argmax(1)
    if not target.is_floating_point():
        rows = targets.LabelRows.of(target, len(W), o)
        loss, dz = rows.mask(loss), dz.masked_fill(rows.ignored.unsqueeze(1), 0.0)
    if not target.is_floating_point() and o.predict:
        M, L = M.masked_fill(rows.ignored, 0.0), L.masked_fill(rows.ignored, 0.0)
        prediction = prediction.masked_fill(rows.ignored, -1)
    empty, dtype = M.new_empty(0), statistics_dtype(x.dtype)
    dx = (dz @ W.to(dz.dtype)).to(dtype) if wanted[0] else empty
    dW = (dz.t() @ x.to(dz.dtype)).to(dtype) if wanted[1] else empty
    db = dz.sum(0).to(dtype) if wanted[2] and b is not None else empty
    prediction = prediction if o.predict else prediction.new_empty(0)
    return loss.sum() if total else loss, M, L, prediction, dx, dW, db


def register() -> None:
    """Tell converters of exported programs what the operators decompose to."""
    set_decomposition(torch.ops.custom_ops.checked_labels.default, _checked_labels)
    set_decomposition(torch.ops.custom_ops.linear_cross_entropy.default, _linear_cross_entropy)
