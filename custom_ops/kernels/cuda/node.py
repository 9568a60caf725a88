"""What the C++ autograd node (`cpu/nodes.h`) asks of a GPU: a loss, and later its gradient.

The arguments are right and plain, as the node has found them; nothing here is differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.kernels.cuda import reduction
from custom_ops.kernels.cuda.cross_entropy import cross_entropy
from custom_ops.kernels.cuda.gradient import cross_entropy_vjp, cross_entropy_vjp_

__all__ = ["backward", "forward"]


def forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dim: int,
    dtype: torch.dtype,
    result_dtype: torch.dtype,
    reduced: str,
    normalizer: float,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the loss, M, L and what a mean was divided by; a normalizer of 0 is none."""
    numbers = (ignore_index, label_smoothing, z_loss, logit_scale, softcap)
    loss, M, L, _ = cross_entropy(input, target, weight, dim, dtype, *numbers, False)
    divisor = None
    if reduced == "sum":
        loss = reduction.total(loss)
    elif reduced == "mean":
        classes = input.shape[dim]
        if target.is_floating_point():
            normalizer = normalizer or input.numel() / classes
        labels = None if normalizer else target
        loss, divisor = reduction.mean(loss, labels, weight, classes, ignore_index, normalizer)
    return loss.to(result_dtype), M, L, divisor


def backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    g: Tensor,
    M: Tensor,
    L: Tensor,
    divisor: Tensor | None,
    dim: int,
    inplace: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """Return dx for the upstream gradient g of the loss, in the place of the input if asked to."""
    numbers = (ignore_index, label_smoothing, z_loss, logit_scale, softcap)
    arguments = (target, weight, g, None, M, L, dim, *numbers, divisor)
    if not inplace:
        return cross_entropy_vjp(input, *arguments)
    logits = input.detach()
    cross_entropy_vjp_(logits, *arguments)
    torch.autograd.graph.increment_version(logits)
    return logits
