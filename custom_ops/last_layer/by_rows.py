"""Blocks of rows: one buffer of logits, which become their gradient in place.

    z = x Wᵀ + b        dz = ∂Σℓ/∂z        dx = dz W        dW = dzᵀ x        db = Σ_r dz_r

The gradient of Σℓ is taken in the forward, while a block's logits are there, if it is going to be
asked for; the backward multiplies it with the upstream gradient. Where that is one number a row, or
lse has a gradient of its own, the backward takes the logits again.

Nothing here is differentiated, and nothing watches the operators.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from custom_ops import kernels
from custom_ops.kernels import Found, Rows
from custom_ops.kernels.labels import reported
from custom_ops.last_layer.layer import Layer, Products
from custom_ops.last_layer.plan import parts
from custom_ops.last_layer.products import Sums, fresh_logits

__all__ = ["backward", "forward"]


def forward(layer: Layer, size: int) -> tuple[Found, Products]:
    """Return the loss and the statistics of each row, and of Σℓ the products that are wanted."""
    o, N = layer.options, len(layer.x)
    loss, M, L = (layer.x.new_empty(N, dtype=o.dtype) for _ in range(3))
    prediction = loss.new_empty(N, dtype=torch.int64) if o.stats else None
    entropy = torch.empty_like(loss) if o.stats else None
    all = Found(loss, M, L, prediction, entropy)
    sums, one = Sums(layer, layer.blocks.of_total), loss.new_ones(()).expand(N)
    for part, z in _logits(layer, size):
        problem = layer.problem(z, part)
        with reported():
            of_rows = kernels.cross_entropy(problem)
        for whole, of_part in zip(all, of_rows, strict=True):
            if whole is not None and of_part is not None:
                whole[part] = of_part
        if any(layer.blocks.of_total):
            rows = Rows(one, None, M, L).part(part)
            sums.add(part, kernels.cross_entropy_vjp_(problem, rows))
    return all, sums.products()


def backward(layer: Layer, rows: Rows, size: int) -> Products:
    """Return dx, dW, db for the upstream gradients of the rows."""
    sums = Sums(layer, layer.blocks.wanted)
    for part, z in _logits(layer, size):
        sums.add(part, kernels.cross_entropy_vjp_(layer.problem(z, part), rows.part(part)))
    return sums.products()


def _logits(layer: Layer, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield each block's rows and logits, all in the same memory."""
    buffer = fresh_logits(layer.x, min(size, len(layer.x)), len(layer.W))
    for part in parts(layer.x, size):
        yield part, layer.put_logits(buffer[: part.stop - part.start], part)
