"""The last layer and its loss as one value, and what may be taken for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from custom_ops.kernels import Options, Problem

__all__ = ["Blocks", "Kept", "Layer", "Products"]


@dataclass(frozen=True)
class Blocks:
    """What is wanted of the last layer, and what it may take for it."""

    total: bool = False  #: Σℓ instead of a loss a row
    wanted: tuple[bool, bool, bool] = (False, False, False)  #: whether dx, dW, db are, or will be
    rows: int | None = None  #: of a block; None for as many as the memory allows
    memory: int | None = None  #: bytes beyond the gradients; None for what the device's default is
    plans: bool = False  #: whether the order may be chosen, or is that of rows
    keeps: bool = False  #: whether the forward may leave anything for a backward but M and L

    @property
    def of_total(self) -> tuple[bool, bool, bool]:
        """Which products of Σℓ the forward takes; those of a loss a row wait for the backward."""
        return self.wanted if self.total and self.keeps else (False, False, False)


class Layer(NamedTuple):
    """z = x Wᵀ + b, and the cross-entropy of z."""

    x: Tensor  #: (N, D)
    W: Tensor  #: (C, D)
    b: Tensor | None  #: (C,)
    target: Tensor  #: (N,) or (N, C)
    weight: Tensor | None  #: (C,)
    options: Options
    blocks: Blocks

    @staticmethod
    def of(tensors: Sequence[Any], options: Options, blocks: Blocks) -> Layer:
        """Return the layer of these five tensors."""
        x, W, b, target, weight = tensors
        return Layer(x, W, b, target, weight, options, blocks)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
        """The tensors alone."""
        return self[:5]

    def part(self, rows: slice | Tensor) -> Layer:
        """Return the layer of these rows."""
        return self._replace(x=self.x[rows], target=self.target[rows])

    def problem(self, z: Tensor, rows: slice) -> Problem:
        """Return the cross-entropy of these rows, whose logits are z."""
        return Problem(z, self.target[rows], self.weight, self.options)

    def put_logits(self, out: Tensor, rows: slice, classes: slice = slice(None)) -> Tensor:
        """Write the logits of these rows and classes into `out`, and return it."""
        x, W = self.x[rows], self.W[classes]
        if self.b is None:
            return torch.mm(x, W.t(), out=out)
        return torch.addmm(self.b[classes], x, W.t(), out=out)


class Products(NamedTuple):
    """dx, dW and db, None where not wanted; in float32 for the half types, if not rounded yet."""

    x: Tensor | None
    W: Tensor | None
    b: Tensor | None


class Kept(NamedTuple):
    """Logits that wait for the backward, None for none: `plan` says which, and where."""

    dW: Tensor | None  #: (C, D), the memory of dW, which is idle until then
    more: Tensor | None  #: (rows, C)
