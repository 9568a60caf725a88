"""Which cross-entropy, of what, for which upstream gradients: three values that cross every border.

    Options   which cross-entropy
    Problem   of what: the logits, the target, the class weights
    Rows      one number a row: the upstream gradients, and the two statistics of the logits

Each goes down whole from the public function to the arithmetic on every device. A registered
operator takes tensors and numbers alone: `Problem.flat` and `Options.of` are where the values come
apart for it, and together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SCHEMA", "Found", "Options", "Problem", "Rows", "statistics_dtype"]

#: What follows the tensors in the schema of a cross-entropy: `Options.flat`.
SCHEMA = "int dim, ScalarType dtype, int ignore_index, float[] numbers"


@dataclass(frozen=True)
class Options:
    """What a cross-entropy needs beyond its tensors; checked where it is made.

    Not a NamedTuple: torch.func would take it apart like any tuple of tensors.
    """

    dim: int  #: the dimension of the input that holds the classes
    dtype: torch.dtype  #: in which everything is computed: float32 or float64
    ignore_index: int = -100
    label_smoothing: float = 0.0  #: ε
    z_loss: float = 0.0  #: λ
    logit_scale: float = 1.0  #: α
    softcap: float | None = None  #: the cap, or None for none
    stats: bool = False  #: whether the prediction and the entropy of each row are wanted
    inplace: bool = False  #: whether the gradient takes the place of the input

    def flat(self) -> tuple[int, torch.dtype, int, list[float]]:
        """Return what `SCHEMA` names; a cap of 0 stands for none."""
        numbers = [self.label_smoothing, self.z_loss, self.logit_scale, self.softcap or 0.0]
        return self.dim, self.dtype, self.ignore_index, numbers

    @staticmethod
    def of(
        dim: int,
        dtype: torch.dtype,
        ignore_index: int,
        numbers: Sequence[float],
        stats: bool = False,
    ) -> Options:
        """Return the Options that were flattened."""
        smoothing, z_loss, scale, cap = numbers
        return Options(dim, dtype, ignore_index, smoothing, z_loss, scale, cap or None, stats)


class Problem(NamedTuple):
    """A cross-entropy: its tensors, and which one it is."""

    input: Tensor  #: the logits, before scale and cap
    target: Tensor  #: labels, or class probabilities in the shape of the input
    weight: Tensor | None  #: one number a class
    options: Options

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors alone."""
        return self.input, self.target, self.weight

    @property
    def soft(self) -> bool:
        """Whether the target holds probabilities."""
        return self.target.is_floating_point()

    @property
    def classes(self) -> int:
        """C."""
        return self.input.shape[self.options.dim]


class Rows(NamedTuple):
    """One number a row: what a backward is given."""

    g: Tensor  #: the upstream gradient of the loss
    q: Tensor | None  #: the upstream gradient of lse, or None for none
    M: Tensor  #: max z
    L: Tensor  #: log Σ exp(z − M), so that lse = M + L
    e: Tensor | None = None  #: the upstream gradient of the entropy, or None for none

    @property
    def flat(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """All but e, for which the eager kernels answer."""
        return self[:4]

    def part(self, rows: slice | Tensor) -> Rows:
        """Return the numbers of these rows."""
        return Rows(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]


class Found(NamedTuple):
    """What the forward finds, one a row; the last two are None unless they are wanted."""

    loss: Tensor  #: ℓ
    M: Tensor  #: max z
    L: Tensor  #: log Σ exp(z − M)
    prediction: Tensor | None  #: the class of the largest logit
    entropy: Tensor | None  #: −Σ p log p


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums, maxima and exponentials: float32 for the half types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
