"""How the kernels see a tensor: (outer, classes, inner), never transposed in memory."""

from __future__ import annotations

from functools import lru_cache
from math import gcd, prod
from typing import NamedTuple

import torch
from torch import Tensor

from custom_ops.kernels.cuda.launch import fresh
from custom_ops.kernels.cuda.tiles import LONG

__all__ = ["View", "fresh_like", "units", "unview", "view", "view_like"]

VECTOR = 16  # bytes that are read at once


class View(NamedTuple):
    """A tensor whose element (o, k, i) lies at o·stride + k·inner + i."""

    tensor: Tensor
    outer: int
    classes: int
    inner: int
    stride: int
    classes_last: bool  #: `tensor` has its classes moved to the end

    @property
    def rows(self) -> int:
        """How many rows there are; row r = o·inner + i."""
        return self.outer * self.inner

    @property
    def vector(self) -> int:
        """How many numbers can be read at once, of the 16 bytes that a thread can."""
        classes, rows, _ = units(self.rows, *self.sizes)
        return min(VECTOR // self.tensor.element_size(), classes * rows)

    @property
    def edge(self) -> int:
        """How many numbers a vector of memory has, where long rows begin between two; else 0."""
        numbers = VECTOR // self.tensor.element_size()
        dense = self.inner == 1 and self.stride == self.classes > LONG
        return numbers if dense and self.classes % numbers else 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Classes, inner, stride: what a kernel takes beside the rows."""
        return self.classes, self.inner, self.stride


def units(rows: int, classes: int, inner: int, stride: int) -> tuple[int, int, bool]:
    """Return of what the classes and the rows that lie side by side are multiples.

    Powers of 2 to 16. Third, whether the number of a row, or of one that is not there in the last
    tile, needs 64 bits; a tile has 2048 rows at most (`tiles.SMALL`).
    """
    wide = rows > 2**31 - 2048
    if inner == 1:
        return gcd(16, classes, stride), 1, wide
    return 1, gcd(16, inner), wide


def view(x: Tensor, dim: int) -> View:
    """Return x as it lies in memory, if that is one of the layouts, else a contiguous copy."""
    dim %= max(x.dim(), 1)
    outer, classes, inner = _around(x.shape, dim)
    if x.is_contiguous():
        return View(x, outer, classes, inner, classes * inner, False)
    if x.dim() == 2 and dim == 1 and x.stride(1) == 1:
        return View(x, outer, classes, 1, x.stride(0), False)
    last = x.movedim(dim, -1)
    if last.is_contiguous():
        return View(last, outer * inner, classes, 1, classes, True)
    return View(x.contiguous(), outer, classes, inner, classes * inner, False)


@lru_cache
def _around(shape: torch.Size, dim: int) -> tuple[int, int, int]:
    """How many numbers there are before, along and after the dimension."""
    return prod(shape[:dim]), shape[dim] if shape else 1, prod(shape[dim + 1 :])


def view_like(x: View, y: Tensor, dim: int) -> View:
    """Return y, of x's shape, in the layout of the view of x."""
    same = y.movedim(dim, -1) if x.classes_last else y
    return x._replace(tensor=same.contiguous(), stride=x.classes * x.inner)


def fresh_like(x: View) -> View:
    """Return fresh memory in the layout of the view of x."""
    made = fresh(x.tensor, *x.tensor.shape, dtype=x.tensor.dtype)
    return x._replace(tensor=made, stride=x.classes * x.inner)


def unview(y: View, dim: int) -> Tensor:
    """Return the view's tensor in the shape it was made from."""
    return y.tensor.movedim(-1, dim) if y.classes_last else y.tensor
