"""Exercise 5: the backward pass of a network's last layer with its cost.

    Z = X Wᵀ + b,  A = softmax(Z),  C = −1/N Σ_n Σ_k Y_nk log A_nk

    X       (N, D)    what the layer below gives, a row an example
    W       (K, D)    b  (K,)
    Y       (N, K)    targets; each row adds up to 1
    C       ()        one number
    g       ()        the upstream gradient, one number
    result  (N, D)    dX;  (K, D)  dW;  (K,)  db;  None for Y

Begin with dZ, from exercise 4. Replace the last line.

    python -m lesson.exercises.check 5
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class LastLayer(Function):
    """C = −1/N Σ_n Σ_k Y_nk log softmax(X Wᵀ + b)_nk."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, W: Tensor, b: Tensor, Y: Tensor) -> Tensor:
        """Return C, one number."""
        ctx.save_for_backward(X, W, b, Y)
        return -(Y * torch.log_softmax(X @ W.T + b, 1)).sum(1).mean()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return dX, (N, D), dW, (K, D), db, (K,), and None for Y."""
        X, W, b, Y = ctx.saved_tensors
        A = torch.softmax(X @ W.T + b, 1)
        raise NotImplementedError("dX, dW and db, made of X, W, A, Y and g; then None")
