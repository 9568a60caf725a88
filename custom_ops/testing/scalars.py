"""The derivative of a scalar of the inputs, by autograd and by differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops.testing.differences import Difference, jacobian
from custom_ops.testing.subject import Subject

__all__ = ["Scalar", "by_autograd", "by_differences", "columns", "gradient_of", "wrong"]

MOST = 24  # entries of an input
Scalar = Callable[[list[Any]], Tensor]


def columns(subject: Subject, i: int) -> list[int]:
    """Return the entries of an input that are looked at."""
    n = subject.inputs[i].numel()
    if n <= MOST:
        return list(range(n))
    g = torch.Generator().manual_seed(subject.seed)
    return sorted(torch.randperm(n, generator=g)[:MOST].tolist())


def gradient_of(q: Tensor, leaves: Sequence[Tensor], keep: bool = False) -> list[Tensor]:
    """Return ∂q/∂leaves, 0 where there is no graph."""
    if not q.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(q, leaves, create_graph=keep, allow_unused=True)
    return [torch.zeros_like(x) if d is None else d for d, x in zip(found, leaves, strict=True)]


def by_autograd(subject: Subject, q: Scalar) -> list[Tensor]:
    """Return ∂q/∂x for each differentiated input."""
    inputs = subject.fresh()
    return [d.detach() for d in gradient_of(q(inputs), [inputs[i] for i in subject.wrt])]


def by_differences(subject: Subject, q: Scalar, i: int) -> Difference:
    """Return ∂q/∂x_s for the looked-at entries of input i."""

    def f(x: Tensor) -> Tensor:
        inputs = subject.fresh()
        inputs[i] = x.clone().requires_grad_()
        return q(inputs).detach().reshape(1).double()

    found = jacobian(f, subject.inputs[i].detach(), columns(subject, i))
    return Difference(found.value[0], found.error[0])


def wrong(observed: Tensor, expected: Difference) -> Tensor:
    """Where a derivative by autograd is not the one by differences."""
    finite = expected.value[torch.isfinite(expected.error)]
    size = finite.abs().max().item() if finite.numel() else 0.0
    bound = 10 * expected.error + 1e-8 * size + 1e-9
    return torch.isfinite(bound) & ~((observed - expected.value).abs() <= bound)
