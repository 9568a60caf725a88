"""The heads that are compared: the last layer and its loss, in two steps or in one piece."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import custom_ops
from custom_ops import jacobian

#: (features (..., D), the last layer from D to C, labels (...)) to the mean loss, 0-d.
Head = Callable[[Tensor, nn.Linear, Tensor], Tensor]


def _two_steps(loss: Callable[[Tensor, Tensor], Tensor]) -> Head:
    """The head that builds the logits and takes their `loss`, which is float32 or wider.

    Mixed precision leaves the logits in 16 bits. Autocast widens them for the built-in and knows
    nothing of the others; widening them here, for all, keeps the comparison one of equals.
    """

    def head(features: Tensor, layer: nn.Linear, target: Tensor) -> Tensor:
        logits = layer(features).flatten(0, -2)
        return loss(logits.to(_widened(logits.dtype)), target.flatten())

    return head


def _one_piece(features: Tensor, layer: nn.Linear, target: Tensor) -> Tensor:
    """The built-in's head; one line lets its layer answer without logits."""
    custom_ops.fuse(layer, evaluation=True)
    try:
        return HEADS["builtin"](features, layer, target)
    finally:
        custom_ops.unfuse(layer)  # other heads may have the same layer


def _exact(logits: Tensor, target: Tensor) -> Tensor:
    """The built-in's answer in float64, rounded once; so is its gradient by the logits."""
    return F.cross_entropy(logits.double(), target).to(logits.dtype)


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


#: The first is the one that the others are compared with.
HEADS: dict[str, Head] = {
    "builtin": _two_steps(F.cross_entropy),  # torch's
    "jacobian": _two_steps(jacobian.cross_entropy),  # the lesson: every factor built, contracted
    "custom": _two_steps(custom_ops.cross_entropy),  # J contracted, never built
    "custom-fused": _one_piece,  # nor the logits
}

#: What the differences of the heads are held against: how far the first is from its exact answer.
YARDSTICK = "exact"


def head(name: str) -> Head:
    """Return the head called `name`, or the yardstick.

    None has weights of its own, so that a seed determines the initial weights whatever the head.
    """
    if name == YARDSTICK:
        return _two_steps(_exact)
    if name not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {name!r}")
    return HEADS[name]
