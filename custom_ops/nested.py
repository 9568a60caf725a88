"""Softmax of tensors without common rows: part by part if nested, else torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops.checks import as_index
from custom_ops.surroundings import is_masked

__all__ = ["by_parts", "is_foreign_layout"]


def is_foreign_layout(input: Tensor) -> bool:
    """Whether `input` is a MaskedTensor or in MKL-DNN's layout, whose softmax only torch knows."""
    return input.is_mkldnn or is_masked(input)


def by_parts(
    function: Callable[[Tensor, int, torch.dtype | None], Tensor],
    input: Any,
    dim: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return the nested tensor of function(part, dim − 1) of each part; dim 0 counts the parts."""
    dim = as_index("dim", dim)
    n = input.dim()
    if not -n <= dim < n:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {dim})"
        )
    if dim % n == 0:
        raise RuntimeError(
            f"dim must not be the one that counts the parts of a nested tensor, got {dim}"
        )
    parts = [function(part, dim % n - 1, dtype) for part in input.unbind()]
    if input.layout is not torch.jagged or input.lengths() is not None or not parts:
        return torch.nested.as_nested_tensor(parts, layout=input.layout)
    ragged = next(d for d, size in enumerate(input.shape) if d and not isinstance(size, int))
    values = torch.cat(parts, ragged - 1)
    return torch.nested.nested_tensor_from_jagged(values, input.offsets(), jagged_dim=ragged)
