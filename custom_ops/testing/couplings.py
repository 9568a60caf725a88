"""Which dimensions a Jacobian connects: read off where its entries are not 0."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from custom_ops.testing.jacobians import Pair

__all__ = ["coupled", "tied"]


def coupled(pair: Pair, matrix: Tensor) -> set[int]:
    """Return the dimensions along which an output entry depends on another index.

    Output and input have the same shape.
    """
    k, s = _indices(pair, matrix)
    return {d for d in range(len(pair.input_shape)) if (k[d] != s[d]).any()}


def tied(pair: Pair, matrix: Tensor) -> set[tuple[int, int]]:
    """Return (a, b) where the output's index in a is the input's in b for every entry not 0."""
    k, s = _indices(pair, matrix)
    dims = itertools.product(range(len(pair.output_shape)), range(len(pair.input_shape)))
    return {
        (a, b)
        for a, b in dims
        if pair.output_shape[a] == pair.input_shape[b] > 1 and (k[a] == s[b]).all()
    }


def _indices(pair: Pair, matrix: Tensor) -> tuple[Tensor, Tensor]:
    found = (matrix.abs() > pair.tolerance()) & torch.isfinite(pair.error)
    k, s = found.nonzero(as_tuple=True)
    empty = torch.zeros(0, len(k), dtype=torch.long)
    at = lambda i, shape: torch.stack(torch.unravel_index(i, shape)) if shape else empty  # noqa: E731
    return at(k, pair.output_shape), at(s, pair.input_shape)
