"""Exercise 3: the backward pass of cross-entropy, a cost for each row.

    C_n = −Σ_k Y_nk log A_nk  with  A = softmax(Z), each row for itself

    Z       (N, K)    scores, kept by forward
    Y       (N, K)    targets, kept by forward; any numbers, not only one 1 in each row
    C       (N,)      a cost for each row
    g       (N,)      the upstream gradient: how the rest of the network weighs each row's cost
    result  (N, K)    the gradient of Z;  None for Y

Replace the last line.

    python -m lesson.exercises.check 3
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class CrossEntropy(Function):
    """C_n = −Σ_k Y_nk log softmax(Z)_nk."""

    @staticmethod
    def forward(ctx: Any, Z: Tensor, Y: Tensor) -> Tensor:
        """Return C, (N,)."""
        ctx.save_for_backward(Z, Y)
        return -(Y * torch.log_softmax(Z, 1)).sum(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of Z, (N, K), and None for Y."""
        Z, Y = ctx.saved_tensors
        raise NotImplementedError("the gradient of Z, made of Z, Y and g; then None")
