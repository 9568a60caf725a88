"""The whole backward pass of a two-layer classifier. The lesson prints this source and runs it."""

from __future__ import annotations

from torch import Tensor

from custom_ops.jacobian import softmax

Tensors = tuple[Tensor, ...]


def gradients(X: Tensor, Y: Tensor, weights: Tensors) -> Tensors:
    """Return ∂C/∂W1, ∂C/∂b1, ∂C/∂W2 and ∂C/∂b2."""
    W1, b1, W2, b2 = weights  #     (H, D), (H,), (K, H), (K,)
    Z1 = X @ W1.T + b1  #           (N, H) = (N, D) × (D, H) + (H,)
    X1 = 1 / (1 + (-Z1).exp())  #   (N, H)   σ, element by element
    Z2 = X1 @ W2.T + b2  #          (N, K) = (N, H) × (H, K) + (K,)
    A = softmax(Z2)  #              (N, K)   each row for itself
    dZ2 = (A - Y) / len(X)  #       (N, K)   vector × Jacobian, in each row
    dW2 = dZ2.T @ X1  #             (K, H) = (K, N) × (N, H)
    db2 = dZ2.sum(0)  #             (K,)
    dX1 = dZ2 @ W2  #               (N, H) = (N, K) × (K, H)
    dZ1 = dX1 * X1 * (1 - X1)  #    (N, H)   element-wise: σ's J is diagonal
    dW1 = dZ1.T @ X  #              (H, D) = (H, N) × (N, D)
    db1 = dZ1.sum(0)  #             (H,)
    return dW1, db1, dW2, db2
