"""The losses that are compared, chosen by name: the built-in and the two written by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import custom_ops
from custom_ops import jacobian

#: (logits (N, C), labels (N,)) to the mean loss, 0-d.
Head = Callable[[Tensor, Tensor], Tensor]

#: The first is the one that the others are compared with.
HEADS: dict[str, Head] = {
    "builtin": F.cross_entropy,  # torch's
    "jacobian": jacobian.cross_entropy,  # the lesson: every factor built, then contracted
    "custom": custom_ops.cross_entropy,  # J contracted, never built
}


def head(name: str) -> Head:
    """Return the head called `name`; what it computes on is float32 or wider, autocast or not.

    Mixed precision leaves the logits in 16 bits. Autocast widens them for the built-in and knows
    nothing of the others; widening them here, for all, keeps the comparison one of equals.
    """
    if name not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {name!r}")
    loss = HEADS[name]

    def widened(logits: Tensor, target: Tensor) -> Tensor:
        narrow = logits.dtype in (torch.float16, torch.bfloat16)
        return loss(logits.float() if narrow else logits, target)

    return widened
