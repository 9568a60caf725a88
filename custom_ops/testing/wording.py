"""Numbers and tensors as a report shows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["position", "written"]

MOST = 60  # characters of a tensor


def written(value: Any) -> str:
    """Return a value in a few characters, a small tensor as nested lists.

    >>> written(torch.tensor([[0.5, -1.0]]))
    '[[0.5, -1]]'
    """
    if not isinstance(value, Tensor):
        return repr(value)[:MOST]
    text = _nested(value.detach().tolist())
    if len(text) <= MOST:
        return text
    return f"tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"


def _nested(values: Any) -> str:
    if isinstance(values, list):
        return "[" + ", ".join(_nested(v) for v in values) + "]"
    return f"{values:.4g}" if isinstance(values, float) else str(values)


def position(flat: int, shape: tuple[int, ...]) -> str:
    """Return the index of a flat position, as one writes it.

    >>> position(4, (2, 3))
    '[1, 1]'
    """
    if not shape:
        return "[]"
    index = torch.unravel_index(torch.tensor(flat), shape)
    return "[" + ", ".join(str(i.item()) for i in index) + "]"
