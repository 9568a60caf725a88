"""The numbers of the lesson: one image, one linear layer, and every factor of its gradient.

The chain rule itself is `custom_ops.jacobian`, used here as it stands; this file adds the real case
it is applied to, the element-wise products it is mistaken for, and three independent checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import custom_ops
from custom_ops.jacobian import (
    LastLayerGradient,
    contract_with_jacobian,
    cross_entropy_gradient,
    last_layer_gradient,
    softmax,
    softmax_jacobian,
)

TRAINED, STEPS, RATE = 1600, 100, 1.0  # the images learned from, and how
FD_STEP = 1e-5

Product = Callable[[Tensor, Tensor], Tensor]


def diagonal_product(v: Tensor, J: Tensor) -> Tensor:
    """Return v_s J_ss, the mistake: v (..., C) times the diagonal of J (..., C, C) only."""
    return v * J.diagonal(dim1=-2, dim2=-1)


class Digits(NamedTuple):
    """scikit-learn's digits in float64: pixels from 0 to 1, labels, and one-hot targets."""

    h: Tensor  #: (1797, 64)
    label: Tensor  #: (1797,)
    y: Tensor  #: (1797, 10)


class Layer(NamedTuple):
    """z = W h + b."""

    W: Tensor  #: (10, 64)
    b: Tensor  #: (10,)

    def __call__(self, h: Tensor) -> Tensor:
        """Return the scores z of the images h: (..., 64) to (..., 10)."""
        return h @ self.W.T + self.b


def digits() -> Digits:
    """Load the digits; they come with scikit-learn, nothing is fetched."""
    data = load_digits()
    label = torch.as_tensor(data.target).long()
    return Digits(torch.as_tensor(data.data) / 16, label, F.one_hot(label, 10).double())


def train(data: Digits, product: Product) -> Layer:
    """Train from zero weights by full-batch gradient descent, ∂C/∂z being product(∂C/∂a, J)."""
    h, y = data.h[:TRAINED], data.y[:TRAINED]
    layer = Layer(h.new_zeros(10, 64), h.new_zeros(10))
    for _ in range(STEPS):
        z = layer(h)
        dC_dz = product(cross_entropy_gradient(softmax(z), y), softmax_jacobian(z)) / len(h)
        layer = Layer(layer.W - RATE * dC_dz.T @ h, layer.b - RATE * dC_dz.sum(0))
    return layer


def misread(data: Digits, layer: Layer) -> Tensor:
    """Return the indices of the held-out images whose largest score is not their label's."""
    wrong = layer(data.h).argmax(-1) != data.label
    wrong[:TRAINED] = False
    return wrong.nonzero().flatten()


def unsurest_mistake(data: Digits, layer: Layer) -> int:
    """Return the misread image whose probabilities are spread most evenly: the largest entropy."""
    wrong = misread(data, layer)
    a = softmax(layer(data.h[wrong]))
    return int(wrong[torch.special.entr(a).sum(-1).argmax()])


class Comparison(NamedTuple):
    """A gradient by vector times matrix, and by the element-wise product with J's diagonal."""

    a: Tensor  #: (10,), the outputs
    v: Tensor  #: (10,), ∂C/∂a
    J: Tensor  #: (10, 10), ∂a/∂z
    right: Tensor  #: (10,), Σ_k v_k J_ks
    wrong: Tensor  #: (10,), v_s J_ss

    @property
    def relative_error(self) -> float:
        """|wrong − right| / |right|."""
        return float((self.wrong - self.right).norm() / self.right.norm())

    @property
    def angle(self) -> float:
        """The angle between the two, in degrees."""
        cosine = torch.cosine_similarity(self.wrong, self.right, dim=0, eps=0.0)
        return math.degrees(math.acos(min(1.0, float(cosine))))

    @property
    def opposite(self) -> Tensor:
        """Which entries of `wrong` have the opposite sign."""
        return self.wrong * self.right < 0


def compare(a: Tensor, v: Tensor, J: Tensor) -> Comparison:
    """Multiply v and J both ways."""
    return Comparison(a, v, J, contract_with_jacobian(v, J), diagonal_product(v, J))


class Check(NamedTuple):
    """Another route to the same gradient."""

    name: str
    dC_dz: Tensor  #: (10,)
    dC_dW: Tensor  #: (10, 64)


class Lesson(NamedTuple):
    """Everything that the text and the picture show."""

    position: int  #: of the image in the data
    label: int
    h: Tensor  #: (64,)
    y: Tensor  #: (10,)
    layer: Layer
    misread: int  #: of the held-out images, by this layer
    misread_diagonal: int  #: by the layer trained with the element-wise product
    held_out: int
    cost: float
    g: LastLayerGradient
    cross_entropy: Comparison
    squared_error: Comparison
    sigmoid: Comparison
    checks: list[Check]


def lesson(index: int | None = None) -> Lesson:
    """Compute the lesson for one image; None takes `unsurest_mistake`."""
    data = digits()
    layer = train(data, contract_with_jacobian)
    i = unsurest_mistake(data, layer) if index is None else index
    h, y = data.h[i], data.y[i]
    g = last_layer_gradient(h, layer.W, layer.b, y)
    s = torch.sigmoid(g.z)
    return Lesson(
        position=i,
        label=int(data.label[i]),
        h=h,
        y=y,
        layer=layer,
        misread=len(misread(data, layer)),
        misread_diagonal=len(misread(data, train(data, diagonal_product))),
        held_out=len(data.h) - TRAINED,
        cost=float(-(y * g.a.log()).sum()),
        g=g,
        cross_entropy=compare(g.a, g.dC_da, g.J),
        squared_error=compare(g.a, g.a - y, g.J),
        sigmoid=compare(s, s - y, torch.diag(s * (1 - s))),
        checks=checks(h, layer, y),
    )


def checks(h: Tensor, layer: Layer, y: Tensor) -> list[Check]:
    """Return the gradient by finite differences, by torch's autograd and by `custom_ops`."""
    t, z = y.argmax(), layer(h)

    def literal(z: Tensor) -> Tensor:
        return -(y * softmax(z).log()).sum()

    differences = Check(
        f"central differences, step {FD_STEP:.0e}",
        central_differences(literal, z),
        central_differences(lambda W: literal(W @ h + layer.b), layer.W),
    )
    return [
        differences,
        autograd("torch, F.cross_entropy", F.cross_entropy, h, layer, t),
        autograd("custom_ops.cross_entropy", custom_ops.cross_entropy, h, layer, t),
    ]


def central_differences(cost: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return (cost(x + e) − cost(x − e)) / 2ε for a step e of ε along each entry of x."""
    steps = FD_STEP * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    slopes = [(cost(x + e) - cost(x - e)) / (2 * FD_STEP) for e in steps]
    return torch.stack(slopes).view_as(x)


def autograd(name: str, cost: Callable[..., Tensor], h: Tensor, layer: Layer, t: Tensor) -> Check:
    """Let torch differentiate cost(z, t), z = W h + b."""
    W = layer.W.clone().requires_grad_()
    z = W @ h + layer.b
    dz, dW = torch.autograd.grad(cost(z[None], t[None]), (z, W))
    return Check(name, dz, dW)
