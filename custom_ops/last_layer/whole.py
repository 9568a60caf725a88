"""All logits at once: they are kept until the backward, and become their gradient in place.

dx and dW are one product each, rounded where it is written. The upstream gradients are known by
then, be they one number or one a row.

Nothing here is differentiated, and nothing watches the operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import kernels
from custom_ops.kernels import Found, Rows, statistics_dtype
from custom_ops.kernels.labels import reported
from custom_ops.last_layer.layer import Kept, Layer, Products
from custom_ops.last_layer.products import advised, fresh_logits
from custom_ops.last_layer.readable import clean

__all__ = ["backward", "forward"]

ALL = slice(None)


def forward(layer: Layer) -> tuple[Found, Kept]:
    """Return the loss and the statistics of each row, and the logits."""
    z = _logits(layer)
    with reported():
        found = kernels.cross_entropy(layer.problem(z, ALL))
    return found, Kept(None, z)


def backward(layer: Layer, rows: Rows, kept: Kept) -> Products:
    """Return dx, dW, db for the upstream gradients of the rows; kept logits are used up."""
    x, W, b, *_ = layer
    wants_x, wants_W, wants_b = layer.blocks.wanted
    z = _logits(layer) if kept.more is None else kept.more
    dz = kernels.cross_entropy_vjp_(layer.problem(z, ALL), rows)
    dx = torch.empty_like(x) if wants_x else None
    dW: Tensor | None = None
    if wants_W:
        # x without what is ignored needs memory, and that of dx is idle until dW is there
        dW = torch.mm(dz.t(), clean(layer, out=dx), out=advised(torch.empty_like(W)))
    if dx is not None:
        torch.mm(dz, W, out=dx)
    db = dz.sum(0, dtype=statistics_dtype(x.dtype)) if wants_b and b is not None else None
    return Products(dx, dW, db)


def _logits(layer: Layer) -> Tensor:
    return layer.put_logits(fresh_logits(layer.x, len(layer.x), len(layer.W)), ALL)
