"""Exercise 4: the backward pass of a batch's cost, the mean over its rows.

    C = 1/N Σ_n C_n  with  C_n = −Σ_k Y_nk log A_nk  and  A = softmax(Z)

    Z       (N, K)    scores, kept by forward
    Y       (N, K)    targets, kept by forward; each row adds up to 1
    C       ()        one number
    g       ()        the upstream gradient, one number; 1 if C is where backward() is called
    result  (N, K)    the gradient of Z;  None for Y

Replace the last line.

    python -m lesson.exercises.check 4
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class MeanCrossEntropy(Function):
    """C = −1/N Σ_n Σ_k Y_nk log softmax(Z)_nk."""

    @staticmethod
    def forward(ctx: Any, Z: Tensor, Y: Tensor) -> Tensor:
        """Return C, one number."""
        ctx.save_for_backward(Z, Y)
        return -(Y * torch.log_softmax(Z, 1)).sum(1).mean()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of Z, (N, K), and None for Y."""
        Z, Y = ctx.saved_tensors
        raise NotImplementedError("the gradient of Z, made of Z, Y and g; then None")
