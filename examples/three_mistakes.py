"""Write your own softmax Function and find your three mistakes. Ten minutes.

    python examples/three_mistakes.py

p = softmax(z), p_k = exp(z_k) / Σ_s exp(z_s). Its Jacobian is J_ks = ∂p_k/∂z_s = p_k (δ_ks − p_s),
a matrix, and backward gets a vector v = ∂C/∂p and owes the vector ∂C/∂z_s = Σ_k v_k J_ks. Below are
three tries, each with the mistake that comes next, and the fourth is right. `check` says what is
wrong. Before you read on after a report: what would you change?
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from custom_ops.testing import Report, check


class FirstTry(Function):
    """The derivative of p_k by z_k is p_k (1 − p_k), so backward multiplies by it. Or does it?"""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        """Return p."""
        e = z.exp()
        p = e / e.sum(1, keepdim=True)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        """Return ∂C/∂z."""
        (p,) = ctx.saved_tensors
        return v * p * (1 - p)


class SecondTry(FirstTry):
    """J whole: Σ_k v_k p_k (δ_ks − p_s) = p_s (v_s − Σ_k v_k p_k). The sum is over the classes."""

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        """Return ∂C/∂z."""
        (p,) = ctx.saved_tensors
        return p * (v - (v * p).sum(0, keepdim=True))


class ThirdTry(FirstTry):
    """The sum over dimension 1. The gradient is right; the forward is still that of the formula."""

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        """Return ∂C/∂z."""
        (p,) = ctx.saved_tensors
        return p * (v - (v * p).sum(1, keepdim=True))


class Softmax(ThirdTry):
    """The maximum first: exp(z − M) is at most 1, and what all logits share is gone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        """Return p."""
        e = (z - z.amax(1, keepdim=True)).exp()
        p = e / e.sum(1, keepdim=True)
        ctx.save_for_backward(p)
        return p


TRIES = (FirstTry, SecondTry, ThirdTry, Softmax)


def reports(skip: Sequence[str] = ()) -> list[Report]:
    """Return what the battery says of each try."""
    return [check(function, torch.randn(3, 4), skip=skip) for function in TRIES]


if __name__ == "__main__":
    torch.manual_seed(0)
    for function, report in zip(TRIES, reports(), strict=True):
        print(f"\n{function.__doc__}\n\n{report}")
