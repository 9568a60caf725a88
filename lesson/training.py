"""One linear layer, trained with vector times Jacobian, or with a product it is mistaken for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from custom_ops.jacobian import cross_entropy_gradient, softmax, softmax_jacobian
from lesson.digits import TRAINED, digits

STEPS, RATE = 100, 1.0

Product = Callable[[Tensor, Tensor], Tensor]


class Layer(NamedTuple):
    """z = W x + b."""

    W: Tensor  #: (10, 64)
    b: Tensor  #: (10,)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the scores z of the images x: (..., 64) to (..., 10)."""
        return x @ self.W.T + self.b


def diagonal_product(v: Tensor, J: Tensor) -> Tensor:
    """Return v_s J_ss, the mistake: v (..., K) times the diagonal of J (..., K, K) only."""
    return v * J.diagonal(dim1=-2, dim2=-1)


def train(product: Product) -> Layer:
    """Train from zero weights by full-batch gradient descent, ∂C/∂z being product(∂C/∂a, J)."""
    x, y = digits().x[:TRAINED], digits().y[:TRAINED]
    layer = Layer(x.new_zeros(10, 64), x.new_zeros(10))
    for _ in range(STEPS):
        z = layer(x)
        dz = product(cross_entropy_gradient(softmax(z), y), softmax_jacobian(z)) / len(x)
        layer = Layer(layer.W - RATE * dz.T @ x, layer.b - RATE * dz.sum(0))
    return layer
