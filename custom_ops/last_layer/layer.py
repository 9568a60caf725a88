"""The last layer and its loss as one value, and in how large blocks its rows are taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from custom_ops.kernels import Options, Problem

__all__ = ["Blocks", "Layer", "Products"]


class Budget(NamedTuple):
    """How large a block may be."""

    bytes: int  #: of its logits
    least: int  #: rows even so; few make slow products, as each block reads all of W again


#: On a CPU memory is the goal.
BUDGET = Budget(50 << 20, 64)
#: A GPU does 300 half-precision operations in the time of a byte (H100: 989 TFLOP/s, 3.35 TB/s).
#: Of a block of n rows, dW += dzᵀ x is the product that moves most: 2nCD operations, while 8CD
#: bytes of float32 dW are read and written and 2nC of dz are read, n / (4 + n/D) operations a byte.
#: At D = 4096 that is 48 with the 195 rows that the CPU's budget leaves of 128,256 classes, and 460
#: with the 2092 that 512 MiB leave. float32 dW itself takes more there: 2.1 GB, twice the bytes of
#: the bfloat16 gradient that it becomes.
CUDA_BUDGET = Budget(512 << 20, 256)


@dataclass(frozen=True)
class Blocks:
    """What is wanted of the last layer, and in how large blocks."""

    total: bool = False  #: Σℓ instead of a loss a row
    wanted: tuple[bool, bool, bool] = (False, False, False)  #: whether dx, dW, db are, of Σℓ
    rows: int | None = None  #: of a block; None for as many as the device's budget allows

    def size(self, x: Tensor, logit_bytes: int, least: int | None = None) -> int:
        """Return the rows of a block of x whose logits take `logit_bytes` a row."""
        if self.rows:
            return self.rows
        rows, budget = len(x), CUDA_BUDGET if x.device.type == "cuda" else BUDGET
        most = max(budget.bytes // max(logit_bytes, 1), least or budget.least)
        count = -(-rows // most)  # as many blocks as that makes, all of a size
        return -(-rows // max(count, 1)) or 1

    def parts(self, x: Tensor, logit_bytes: int, least: int | None = None) -> Iterator[slice]:
        """Yield the rows of each block."""
        size = self.size(x, logit_bytes, least)
        for start in range(0, len(x), size):
            yield slice(start, min(start + size, len(x)))


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


class Products(NamedTuple):
    """dx, dW and db, None where not wanted; in float32 for the half types."""

    x: Tensor | None
    W: Tensor | None
    b: Tensor | None
