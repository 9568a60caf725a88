"""The numbers of part one: one image, one linear layer, and every factor of its gradient.

The chain rule itself is `custom_ops.jacobian`, used here as it stands; this file adds the real case
it is applied to, the element-wise products it is mistaken for, and three independent checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import custom_ops
from custom_ops.jacobian import (
    LastLayerGradient,
    contract_with_jacobian,
    last_layer_gradient,
    softmax,
)
from lesson.digits import TRAINED, digits, misread
from lesson.training import Layer, diagonal_product, train

FD_STEP = 1e-5


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


class OneImage(NamedTuple):
    """Everything that part one and the picture show."""

    position: int  #: of the image among the digits
    label: int
    x: Tensor  #: (64,)
    y: Tensor  #: (10,)
    layer: Layer
    misread: int  #: of the held-out images, by this layer
    misread_diagonal: int  #: by the layer trained with the element-wise product
    held_out: int
    cost: float
    factors: LastLayerGradient
    cross_entropy: Comparison
    squared_error: Comparison
    sigmoid: Comparison
    checks: list[Check]

    @property
    def rival(self) -> int:
        """The likeliest class but for the true one."""
        return int((self.factors.a - 2 * self.y).argmax())

    @property
    def grey_pixel(self) -> int:
        """A pixel whose product with something is another number: the one nearest to ½."""
        return int((self.x - 0.5).abs().argmin())


def unsurest_mistake(layer: Layer) -> int:
    """Return the misread image whose probabilities are spread most evenly: the largest entropy."""
    wrong = misread(layer(digits().x))
    a = softmax(layer(digits().x[wrong]))
    return int(wrong[torch.special.entr(a).sum(-1).argmax()])


def one_image(index: int | None = None) -> OneImage:
    """Compute part one for one image; None takes `unsurest_mistake`."""
    data, layer = digits(), train(contract_with_jacobian)
    i = unsurest_mistake(layer) if index is None else index
    x, y = data.x[i], data.y[i]
    f = last_layer_gradient(x, layer.W, layer.b, y)
    σ = torch.sigmoid(f.z)
    return OneImage(
        position=i,
        label=int(data.label[i]),
        x=x,
        y=y,
        layer=layer,
        misread=len(misread(layer(data.x))),
        misread_diagonal=len(misread(train(diagonal_product)(data.x))),
        held_out=len(data.x) - TRAINED,
        cost=float(-(y * f.a.log()).sum()),
        factors=f,
        cross_entropy=compare(f.a, f.dC_da, f.J),
        squared_error=compare(f.a, f.a - y, f.J),
        sigmoid=compare(σ, σ - y, torch.diag(σ * (1 - σ))),
        checks=checks(x, layer, y),
    )


def checks(x: Tensor, layer: Layer, y: Tensor) -> list[Check]:
    """Return the gradient by finite differences, by torch's autograd and by `custom_ops`."""
    t, z = y.argmax(), layer(x)

    def literal(z: Tensor) -> Tensor:
        return -(y * softmax(z).log()).sum()

    differences = Check(
        f"central differences, step {FD_STEP:.0e}",
        central_differences(literal, z),
        central_differences(lambda W: literal(W @ x + layer.b), layer.W),
    )
    return [
        differences,
        autograd("torch, F.cross_entropy", F.cross_entropy, x, layer, t),
        autograd("custom_ops.cross_entropy", custom_ops.cross_entropy, x, layer, t),
    ]


def central_differences(cost: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return (cost(at + e) − cost(at − e)) / 2ε for a step e of ε along each entry."""
    steps = FD_STEP * torch.eye(at.numel(), dtype=at.dtype).view(-1, *at.shape)
    slopes = [(cost(at + e) - cost(at - e)) / (2 * FD_STEP) for e in steps]
    return torch.stack(slopes).view_as(at)


def autograd(name: str, cost: Callable[..., Tensor], x: Tensor, layer: Layer, t: Tensor) -> Check:
    """Let torch differentiate cost(z, t), z = W x + b."""
    W = layer.W.clone().requires_grad_()
    z = W @ x + layer.b
    dz, dW = torch.autograd.grad(cost(z[None], t[None]), (z, W))
    return Check(name, dz, dW)
