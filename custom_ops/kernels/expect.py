"""What an operator that is written in Python says of an argument that does not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["expect"]


def expect(name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> None:
    """Raise unless t has this shape and dtype, and lies where `like` does."""
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
    if t.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {t.dtype}")
    if t.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {t.device}")
