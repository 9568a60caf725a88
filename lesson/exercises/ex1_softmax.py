"""Exercise 1: the backward pass of softmax.

    a = softmax(z), each row for itself: a_k = exp(z_k) / Σ_s exp(z_s)

    z       (N, K)    scores
    a       (N, K)    probabilities, kept by forward
    v       (N, K)    ∂C/∂a, whatever the cost is
    result  (N, K)    ∂C/∂z_s = Σ_k v_k J_ks  with  J_ks = a_k (δ_ks − a_s), in each row

J may be built, (N, K, K), or not. Replace the last line.

    python -m lesson.exercises.check 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class Softmax(Function):
    """a = softmax(z) along dimension 1."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        """Return a, (N, K)."""
        a = torch.softmax(z, 1)
        ctx.save_for_backward(a)
        return a

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        """Return ∂C/∂z, (N, K)."""
        (a,) = ctx.saved_tensors
        raise NotImplementedError("∂C/∂z, made of a and v")
