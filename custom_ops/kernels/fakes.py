"""The kernels on tensors without memory: the shapes and layouts of what they return.

The C++ and the Triton operators have the same schemas, so one fake serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["fresh", "register"]


def fresh(x: Tensor, dim: int) -> Tensor:
    """The result in x's layout: its classes last in memory where they are in x."""
    last = x.movedim(dim, -1) if x.dim() else x
    if last.is_contiguous() and not x.is_contiguous():
        return last.new_empty(last.shape).movedim(-1, dim)
    return x.new_empty(x.shape)


def register(namespace: str) -> None:
    """Give the operators of `namespace` their fakes; those it does not have are left out."""
    for name, fake in _FAKES.items():
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_fake(f"{namespace}::{name}", fake)


def _softmax(input: Tensor, dim: int, log: bool) -> Tensor:
    return fresh(input, dim)


def _map(p: Tensor, v: Tensor, dim: int) -> Tensor:
    return fresh(p, dim)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dim: int,
    dtype: torch.dtype,
    *numbers: Any,
) -> tuple[Tensor, ...]:
    rows = [size for d, size in enumerate(input.shape) if d != dim]
    loss, M, L = (input.new_empty(rows, dtype=dtype) for _ in range(3))
    return loss, M, L, input.new_empty(rows if numbers[-1] else [0], dtype=torch.int64)


def _cross_entropy_vjp(
    input: Tensor, target: Tensor, weight: Tensor | None, g: Tensor, *rest: Any
) -> Tensor:
    return fresh(input, rest[3])


def _cross_entropy_vjp_(input: Tensor, *rest: Any) -> None:
    return None


def _cross_entropy_hvp_(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    u: Tensor,
    g: Tensor,
    h: Any,
    M: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(M), torch.empty_like(M)


def _total(input: Tensor) -> Tensor:
    return input.new_empty(())


_FAKES: dict[str, Callable[..., Any]] = {
    "softmax": _softmax,
    "contract": _map,
    "log_softmax_vjp": _map,
    "log_softmax_jvp": _map,
    "cross_entropy": _cross_entropy,
    "cross_entropy_vjp": _cross_entropy_vjp,
    "cross_entropy_vjp_": _cross_entropy_vjp_,
    "cross_entropy_hvp_": _cross_entropy_hvp_,
    "total": _total,
}
