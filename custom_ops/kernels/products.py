"""Sums of matrix products of half-precision numbers, kept in float32.

dW is added up over blocks of rows, and dx waits for its upstream gradient: rounded to the half type
on the way, the error of either would grow with the number of blocks. The matrix units of a GPU add
up in float32 anyway, and cuBLAS writes that sum as it is; turning its factors into float32 first
would take the product away from those units.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_wide_", "narrowed", "widens"]


def widens(A: Tensor) -> bool:
    """Whether the device of A gives the product of its half-precision numbers in float32."""
    return A.device.type == "cuda"


def add_wide_(total: Tensor, A: Tensor, B: Tensor, beta: int = 1) -> None:
    """Σ = β Σ + A B, with Σ of float32 and A, B of a half type; with β = 0 the old Σ is not read.

    torch.addmm takes no `out` of another type than A; that Σ stands in both places spares a copy.
    """
    torch.ops.aten.addmm.dtype_out(total, A, B, total.dtype, beta=beta, out=total)


def narrowed(product: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """Return g times the product, rounded to a half type as it is written: one pass for two."""
    return torch.mul(product, g, out=torch.empty_like(product, dtype=dtype))
