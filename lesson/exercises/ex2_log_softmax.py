"""Exercise 2: the backward pass of log-softmax.

    l = log softmax(z), each row for itself: l_k = z_k − log Σ_s exp(z_s)

    z       (N, K)    scores
    l       (N, K)    log-probabilities, kept by forward; a = exp(l)
    v       (N, K)    ∂C/∂l
    result  (N, K)    ∂C/∂z_s = Σ_k v_k ∂l_k/∂z_s

Work out ∂l_k/∂z_s first: it is a matrix again, and a simpler one than softmax's. Is it symmetric?
Replace the last line.

    python -m lesson.exercises.check 2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class LogSoftmax(Function):
    """l = log softmax(z) along dimension 1."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        """Return l, (N, K)."""
        l = torch.log_softmax(z, 1)
        ctx.save_for_backward(l)
        return l

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        """Return ∂C/∂z, (N, K)."""
        (l,) = ctx.saved_tensors
        raise NotImplementedError("∂C/∂z, made of l and v")
