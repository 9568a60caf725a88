"""Rows that are ignored may hold anything, and none of it may reach a gradient: 0 · NaN is NaN.

Where the labels can be read such rows are cut out. On a device that would wait for its answer; the
kernels skip the rows there, and x alone, which dzᵀ x reads, is given zeros.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from custom_ops.kernels.eager.targets import ignored_rows
from custom_ops.kernels.plain import can_be_read
from custom_ops.last_layer.layer import Layer

__all__ = ["blank", "clean", "counted_rows", "spread"]


def counted_rows(layer: Layer) -> Tensor | None:
    """Return the rows that count, where some do not and asking does not wait for a device."""
    target = layer.target
    if target.is_floating_point() or not can_be_read(target):
        return None
    ignored = ignored_rows(target, layer.options)
    return (~ignored).nonzero().squeeze(1) if ignored.any() else None


def clean(layer: Layer, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
    """Return these rows of x, those that are ignored as 0 if they were not cut out.

    That is a copy, in `out` if it is given.
    """
    x, target = layer.x[rows], layer.target[rows]
    if target.is_floating_point() or can_be_read(target):
        return x
    ignored = ignored_rows(target, layer.options).unsqueeze(1)
    return torch.where(ignored, x.new_zeros(()), x, out=out)


def blank(layer: Layer) -> Layer:
    """Return the layer with 0 in the rows of x that are ignored, whoever can read that."""
    if layer.target.is_floating_point():
        return layer
    ignored = ignored_rows(layer.target, layer.options).unsqueeze(1)
    return layer._replace(x=layer.x.masked_fill(ignored, 0.0))


@overload
def spread(x: Tensor, counted: Tensor, N: int, fill: float = ...) -> Tensor: ...
@overload
def spread(x: None, counted: Tensor, N: int, fill: float = ...) -> None: ...
def spread(x: Tensor | None, counted: Tensor, N: int, fill: float = 0.0) -> Tensor | None:
    """Return the counted rows among all N, the others filled."""
    if x is None:
        return None
    return x.new_full((N, *x.shape[1:]), fill).index_copy_(0, counted, x)
