"""What the registered operators ask of their arguments before a kernel is launched.

A saved graph may be run with other tensors than it was traced with. The same as cpu/check.h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.kernels.expect import expect
from custom_ops.kernels.problem import statistics_dtype

__all__ = ["check_hvp", "check_pair", "check_problem", "check_softmax", "check_vjp"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_softmax(input: Tensor, dim: int, log: bool = False) -> None:
    """Raise unless `input` has a softmax over `dim`."""
    if input.dtype not in FLOATS:
        raise NotImplementedError(
            "input must be of a floating-point type (float64, float32, bfloat16 or float16), got "
            f"{input.dtype}"
        )
    n = max(input.dim(), 1)
    if not -n <= dim < n:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {dim})"
        )


def check_pair(p: Tensor, v: Tensor, dim: int) -> None:
    """Raise unless p and v are of one shape and type."""
    check_softmax(p, dim)
    expect("v", v, p.shape, p.dtype, p)


def check_problem(
    input: Tensor, target: Tensor, weight: Tensor | None, dim: int, dtype: torch.dtype, *_: Any
) -> None:
    """Raise unless logits, target and class weights fit each other."""
    check_softmax(input, dim)
    if input.dim() == 0:
        raise ValueError("input must have a dimension of classes, got a 0-d tensor")
    if dtype not in (torch.float64, statistics_dtype(input.dtype)):
        raise TypeError(f"statistics of {input.dtype} must not be {dtype}")
    rows = _rows(input, dim)
    soft = target.is_floating_point()
    expect("target", target, input.shape if soft else rows, target.dtype, input)
    if weight is not None:
        expect("weight", weight, input.shape[dim : dim + 1 or None], weight.dtype, input)


def check_vjp(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    g: Tensor,
    q: Tensor | None,
    M: Tensor,
    L: Tensor,
    dim: int,
    *_: Any,
) -> None:
    """Raise unless the rows' numbers fit the logits as well; g may be one number for all rows."""
    check_problem(input, target, weight, dim, M.dtype)
    rows = _rows(input, dim)
    for name, t in (("g", g), ("q", q), ("M", M), ("L", L)):
        if t is not None and not (name == "g" and t.dim() == 0):
            expect(name, t, rows, t.dtype if name in "gq" else M.dtype, input)


def check_hvp(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    u: Tensor,
    g: Tensor,
    q: Tensor | None,
    M: Tensor,
    L: Tensor,
    *_: Any,
) -> None:
    """Raise unless z and u are (N, C) and the rest fits them."""
    if z.dim() != 2:
        raise ValueError(f"z must be (N, C), got shape {tuple(z.shape)}")
    expect("u", u, z.shape, z.dtype, z)
    check_vjp(z, target, weight, g, q, M, L, 1)


def _rows(input: Tensor, dim: int) -> list[int]:
    return [size for d, size in enumerate(input.shape) if d != dim % input.dim()]
