"""The numbers that say which cross-entropy is meant: one value, handed down unchanged."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Options", "statistics_dtype"]


@dataclass(frozen=True)
class Options:
    """What a cross-entropy kernel needs beyond its tensors; checked where it is made.

    Not a NamedTuple: torch.func would take it apart like any tuple of tensors.
    """

    dim: int  #: the dimension of the input that holds the classes
    dtype: torch.dtype  #: in which everything is computed: float32 or float64
    ignore_index: int
    label_smoothing: float  #: ε
    z_loss: float  #: λ
    logit_scale: float  #: α
    softcap: float | None  #: s, or None for none
    predict: bool  #: whether the arg-max is wanted
    inplace: bool  #: whether the gradient takes the place of the input

    @property
    def numbers(self) -> tuple[int, float, float, float, float | None]:
        """Those of every cross-entropy operator, in the order of its schema."""
        regularised = self.label_smoothing, self.z_loss
        return self.ignore_index, *regularised, self.logit_scale, self.softcap


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums, maxima and exponentials: float32 for the half types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
