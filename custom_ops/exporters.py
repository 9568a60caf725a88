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

from custom_ops.kernels import eager, statistics_dtype
from custom_ops.kernels.eager import targets
from custom_ops.last_layer import operators
from custom_ops.row import blank_ignored
from custom_ops.surroundings import set_decomposition

__all__ = ["register"]


def _checked_labels(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """The labels; one out of range makes its row NaN, as on a device that cannot raise."""
    return target.to(torch.int64)


def _linear_cross_entropy(*args: Any) -> tuple[Tensor, ...]:
    """ℓ or Σℓ, M, L, the statistics and the gradient of Σℓ, from logits that are built.

    The formulas are those of `custom_ops.cross_entropy`. Nothing is written in place, as a
    decomposition must not.
    """
    x, W, b, target, weight, o, blocks = operators.layer_of(args)
    x = blank_ignored(x, target, o)
    z, slope, _ = eager.capped(F.linear(x, W, b), o)
    M = eager.maximum(z, 1)
    L = (z - M).exp().sum(1, keepdim=True).log()
    y = targets.weighted(targets.smoothed(target, len(W), o), weight, o)
    loss = targets.product(y, (M - z) + L).sum(1) + o.z_loss * (M + L).squeeze(1) ** 2
    dz = slope * ((y.sum(1, keepdim=True) + 2 * o.z_loss * (M + L)) * ((z - M) - L).exp() - y)
    H, prediction = eager.entropy((M - z) + L, 1), z.argmax(1)
    M, L = M.squeeze(1), L.squeeze(1)
    if not target.is_floating_point():
        rows = targets.LabelRows.of(target, len(W), o)
        loss, dz = rows.mask(loss), dz.masked_fill(rows.ignored.unsqueeze(1), 0.0)
        if o.stats:
            M, L, H = (t.masked_fill(rows.ignored, 0.0) for t in (M, L, H))
            prediction = prediction.masked_fill(rows.ignored, -1)
    empty, dtype = M.new_empty(0), statistics_dtype(x.dtype)
    wants_x, wants_W, wants_b = blocks.wanted
    dx = (dz @ W.to(dz.dtype)).to(dtype) if wants_x else empty
    dW = (dz.t() @ x.to(dz.dtype)).to(dtype) if wants_W else empty
    db = dz.sum(0).to(dtype) if wants_b and b is not None else empty
    stats = (prediction, H) if o.stats else (prediction.new_empty(0), empty)
    return loss.sum() if blocks.total else loss, M, L, *stats, dx, dW, db


def register() -> None:
    """Tell converters of exported programs what the operators decompose to."""
    set_decomposition(torch.ops.custom_ops.checked_labels.default, _checked_labels)
    set_decomposition(torch.ops.custom_ops.linear_cross_entropy.default, _linear_cross_entropy)
