"""The numbers of part two: a batch of images, and a network of two layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_ops.jacobian import (
    LastLayerGradient,
    contract_with_jacobian,
    last_layer_gradient,
    softmax,
)
from lesson.digits import TRAINED, digits, misread
from lesson.one_image import OneImage
from lesson.training import Layer
from lesson.two_layers import Tensors, gradients

N, HIDDEN, STEPS, RATE = 4, 32, 500, 2.0
OFFSET = 10_000.0  #: added to every score, where float32 has three decimals left


class Batch(NamedTuple):
    """The last layer for N images at once; C is the mean of their costs."""

    positions: list[int]  #: of the images among the digits
    X: Tensor  #: (N, 64)
    Y: Tensor  #: (N, 10)
    A: Tensor  #: (N, 10)
    dZ: Tensor  #: (N, 10), (A − Y) / N
    dW: Tensor  #: (10, 64), dZᵀ X
    db: Tensor  #: (10,), Σ_n dZ_n
    dX: Tensor  #: (N, 64), dZ W
    each: LastLayerGradient  #: of each image by itself, every factor built
    torchs: Tensors  #: dZ, dW, db, dX by autograd


def batch(layer: Layer, first: int) -> Batch:
    """Compute the batch of the image `first` and those that follow it."""
    data = digits()
    positions = [(first + n) % len(data.x) for n in range(N)]
    X, Y = data.x[positions], data.y[positions]
    A = softmax(layer(X))
    dZ = (A - Y) / N
    return Batch(
        positions,
        X,
        Y,
        A,
        dZ,
        dZ.T @ X,
        dZ.sum(0),
        dZ @ layer.W,
        last_layer_gradient(X, layer.W, layer.b, Y),
        torchs_last_layer(X, Y, layer),
    )


def torchs_last_layer(X: Tensor, Y: Tensor, layer: Layer) -> Tensors:
    """Return dZ, dW, db and dX by torch's autograd."""
    X, W, b = (t.clone().requires_grad_() for t in (X, layer.W, layer.b))
    Z = X @ W.T + b
    return torch.autograd.grad(F.cross_entropy(Z, Y), (Z, W, b, X))


class Network(NamedTuple):
    """Two layers on the batch: the weights, what lies between, and the gradients."""

    weights: Tensors  #: W1 (32, 64), b1 (32,), W2 (10, 32), b2 (10,)
    X1: Tensor  #: (N, 32)
    dX1: Tensor  #: (N, 32)
    dZ1: Tensor  #: (N, 32)
    gradients: Tensors  #: of the weights, by the ten lines
    torchs: Tensors  #: by autograd
    misread: int  #: of the held-out images


def network(X: Tensor, Y: Tensor) -> Network:
    """Train the network by the ten lines, and take its gradients on the batch."""
    weights = trained()
    W1, b1, W2, b2 = weights
    X1 = torch.sigmoid(X @ W1.T + b1)
    dX1 = (softmax(X1 @ W2.T + b2) - Y) / len(X) @ W2
    return Network(
        weights,
        X1,
        dX1,
        dX1 * X1 * (1 - X1),
        gradients(X, Y, weights),
        torchs_network(X, Y, weights),
        len(misread(scores(digits().x, *weights))),
    )


def trained() -> Tensors:
    """Return the weights after gradient descent on the training images, from random ones."""
    X, Y = digits().x[:TRAINED], digits().y[:TRAINED]
    g = torch.Generator().manual_seed(0)
    shapes = ((HIDDEN, 64), (HIDDEN,), (10, HIDDEN), (10,))
    weights: Tensors = tuple(torch.randn(s, generator=g, dtype=X.dtype) / 8 for s in shapes)
    for _ in range(STEPS):
        steps = gradients(X, Y, weights)
        weights = tuple(w - RATE * d for w, d in zip(weights, steps, strict=True))
    return weights


def scores(X: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> Tensor:
    """Return the network's scores, (N, 10)."""
    return torch.sigmoid(X @ W1.T + b1) @ W2.T + b2


def torchs_network(X: Tensor, Y: Tensor, weights: Tensors) -> Tensors:
    """Return the weights' gradients by torch's autograd."""
    leaves = tuple(w.clone().requires_grad_() for w in weights)
    return torch.autograd.grad(F.cross_entropy(scores(X, *leaves), Y), leaves)


class AnyTarget(NamedTuple):
    """One target y, and ∂C/∂z for it."""

    y: Tensor  #: (10,)
    mass: float  #: m = Σ_k y_k
    dC_dz: Tensor  #: (10,), the vector −y/a times J


def any_target(case: OneImage, true: float, rival: float, others: float) -> AnyTarget:
    """Share a target out among the true class, its rival and the eight others."""
    y = torch.full_like(case.y, others)
    y[case.label], y[case.rival] = true, rival
    a, J = case.factors.a, case.factors.J
    return AnyTarget(y, float(y.sum()), contract_with_jacobian(-y / a, J))


class Kept(NamedTuple):
    """a from the scores and two numbers, and the loss at a large offset with one number alone."""

    M: float  #: the largest score
    L: float  #: log Σ exp(z − M)
    a: Tensor  #: (10,), exp(z − M − L)
    offset_error: float  #: of a, in float32 at OFFSET, from M and L
    offset_error_of_sum: float  #: from the one number M + L


def kept(z: Tensor) -> Kept:
    """Compute what forward keeps of the scores z, (10,)."""
    M = z.max()
    L = (z - M).exp().sum().log()
    far = (z + OFFSET).float()
    M32 = far.max()
    L32 = (far - M32).exp().sum().log()
    right = softmax(far.double())
    return Kept(
        float(M),
        float(L),
        (z - M - L).exp(),
        float(((far - M32 - L32).exp() - right).abs().max()),
        float(((far - (M32 + L32)).exp() - right).abs().max()),
    )


class Numbers(NamedTuple):
    """Everything that part two shows."""

    batch: Batch
    network: Network
    soft: AnyTarget  #: a target that adds up to 1
    heavy: AnyTarget  #: one that does not
    kept: Kept


def part_two(case: OneImage) -> Numbers:
    """Compute part two for the image of part one and its neighbours."""
    b = batch(case.layer, case.position)
    return Numbers(
        b,
        network(b.X, b.Y),
        any_target(case, 0.7, 0.14, 0.02),
        any_target(case, 2.0, 0.5, 0.0),
        kept(case.factors.z),
    )
