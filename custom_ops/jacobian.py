r"""The literal mathematics: every factor of the chain rule built, every contraction an einsum.

The question this file answers: *softmax's derivative is a matrix; the loss's gradient is a vector;
how do the two meet, and what are the shapes on the way to ∂C/∂W?*

One example, C classes, D features. The network's last layer and the cost are

    z_s = Σ_j W_sj h_j + b_s          z: (C,)   W: (C, D)   h: (D,)   b: (C,)
    a_k = exp(z_k) / Σ_s exp(z_s)     a: (C,)
    C   = −Σ_k y_k log a_k            y: (C,), the target's probabilities

and the chain rule, with s and k running over the classes and j over the features, is

    ∂C/∂a_k  = −y_k / a_k                                       (C,)       a vector
    J_ks     = ∂a_k/∂z_s = a_k (δ_ks − a_s)                     (C, C)     a matrix
    ∂C/∂z_s  = Σ_k ∂C/∂a_k · J_ks                               (C,)       vector × matrix
    ∂z_s/∂W_ij = δ_si h_j                                       (C, C, D)  three indices
    ∂C/∂W_ij = Σ_k Σ_s ∂C/∂a_k · J_ks · ∂z_s/∂W_ij              (C, D)     = ∂C/∂z_i · h_j
    ∂C/∂h_j  = Σ_s ∂C/∂z_s W_sj                                 (D,)
    ∂C/∂b_s  = ∂C/∂z_s                                          (C,)

The product of vector and matrix is never element-wise: an element-wise product is right only where
the Jacobian is diagonal, as it is for the sigmoid (J_ks = σ'(z_k) δ_ks), because then the sum over
k has one term. Softmax is not such a function: each a_k depends on every z_s.

Every function here takes any number of leading batch dimensions, written `...`, and is plain
differentiable PyTorch. All of it costs O(C²) a row or more: this is the text to read and the oracle
of the tests; `custom_ops.softmax` and `custom_ops.cross_entropy` compute the same in O(C).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = [
    "JacobianSoftmax",
    "LastLayerGradient",
    "LastLayerHVP",
    "contract_with_jacobian",
    "cross_entropy",
    "cross_entropy_gradient",
    "last_layer_gradient",
    "last_layer_hvp",
    "softmax",
    "softmax_jacobian",
]


def softmax(z: Tensor) -> Tensor:
    """Return a_k = exp(z_k) / Σ_s exp(z_s) over the last dimension; z and the result are (..., C).

    The maximum is subtracted first: softmax(z) = softmax(z − max z), and exp cannot overflow.

    >>> softmax(torch.tensor([0.0, 0.0]))
    tensor([0.5000, 0.5000])
    """
    e = (z - z.detach().amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def softmax_jacobian(z: Tensor) -> Tensor:
    """Return J_ks = ∂a_k/∂z_s = a_k (δ_ks − a_s) with a = softmax(z); z is (..., C), J (..., C, C).

    J = diag(a) − a aᵀ is symmetric, and each of its rows sums to 0: adding a constant to all logits
    changes nothing.

    >>> softmax_jacobian(torch.tensor([0.0, 0.0]))
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """
    return _jacobian_of_output(softmax(z))


def _jacobian_of_output(a: Tensor) -> Tensor:
    return torch.diag_embed(a) - torch.einsum("...k,...s->...ks", a, a)


def contract_with_jacobian(v: Tensor, J: Tensor) -> Tensor:
    """Return the row vector times the matrix, (vᵀJ)_s = Σ_k v_k J_ks; v (..., C), J (..., C, C).

    >>> contract_with_jacobian(torch.tensor([1.0, 0.0]), softmax_jacobian(torch.zeros(2)))
    tensor([ 0.2500, -0.2500])
    """
    return torch.einsum("...k,...ks->...s", v, J)


def cross_entropy_gradient(a: Tensor, y: Tensor) -> Tensor:
    """Return ∂C/∂a_k = −y_k / a_k of the cost C = −Σ_k y_k log a_k; all three are (..., C).

    >>> cross_entropy_gradient(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]))
    tensor([-0., -2.])
    """
    return -y / a


class LastLayerGradient(NamedTuple):
    """Every factor of ∂C/∂W, in the order in which the chain rule meets them."""

    z: Tensor  #: (..., C), the logits
    a: Tensor  #: (..., C), their softmax
    dC_da: Tensor  #: (..., C)
    J: Tensor  #: (..., C, C), J_ks = ∂a_k/∂z_s
    dC_dz: Tensor  #: (..., C)
    dz_dW: Tensor  #: (..., C, C, D), ∂z_s/∂W_ij = δ_si h_j
    dC_dW: Tensor  #: (..., C, D), of each example by itself
    dC_dh: Tensor  #: (..., D)
    dC_db: Tensor  #: (..., C)


def last_layer_gradient(h: Tensor, W: Tensor, b: Tensor, y: Tensor) -> LastLayerGradient:
    """Return every factor and every gradient of C = −Σ_k y_k log softmax(W h + b)_k.

    h is (..., D), W (C, D), b (C,), y (..., C). The leading dimensions are examples: each has its
    own gradient, and that of a batch is their sum.

    >>> g = last_layer_gradient(torch.ones(3), torch.zeros(2, 3), torch.zeros(2), torch.eye(2)[0])
    >>> g.dC_dz, g.dz_dW.shape, g.dC_dW.shape
    (tensor([-0.5000,  0.5000]), torch.Size([2, 2, 3]), torch.Size([2, 3]))
    """
    z = torch.einsum("sj,...j->...s", W, h) + b
    a = softmax(z)
    dC_da = cross_entropy_gradient(a, y)
    J = _jacobian_of_output(a)
    dC_dz = contract_with_jacobian(dC_da, J)
    identity = torch.eye(W.shape[0], dtype=z.dtype, device=z.device)
    dz_dW = torch.einsum("si,...j->...sij", identity, h)
    dC_dW = torch.einsum("...k,...ks,...sij->...ij", dC_da, J, dz_dW)
    dC_dh = torch.einsum("...s,sj->...j", dC_dz, W)
    return LastLayerGradient(z, a, dC_da, J, dC_dz, dz_dW, dC_dW, dC_dh, dC_db=dC_dz)


class LastLayerHVP(NamedTuple):
    """The Hessian of the last layer's cost times a direction (V_h, V_W, v_b)."""

    u: Tensor  #: (..., C), the change of the logits along the direction
    r: Tensor  #: (..., C), the change of ∂C/∂z
    h: Tensor  #: (..., D)
    W: Tensor  #: (..., C, D), of each example by itself
    b: Tensor  #: (..., C), of each example by itself


def last_layer_hvp(
    h: Tensor, W: Tensor, b: Tensor, y: Tensor, V_h: Tensor, V_W: Tensor, v_b: Tensor
) -> LastLayerHVP:
    """Return the Hessian-vector product of C = −Σ_k y_k log softmax(W h + b)_k.

    Along the direction the logits change by u = W V_h + V_W h + v_b, and since
    ∂C/∂z = m a − y with m = Σ_k y_k, that gradient changes by r = m J u. The product rule on
    ∂C/∂W = ∂C/∂z hᵀ, ∂C/∂h = Wᵀ ∂C/∂z and ∂C/∂b = ∂C/∂z does the rest:

        H_W = r hᵀ + ∂C/∂z V_hᵀ        H_h = Wᵀ r + V_Wᵀ ∂C/∂z        H_b = r

    h and V_h are (..., D), W and V_W (C, D), b and v_b (C,), y (..., C).
    """
    g = last_layer_gradient(h, W, b, y)
    u = torch.einsum("sj,...j->...s", W, V_h) + torch.einsum("sj,...j->...s", V_W, h) + v_b
    r = y.sum(-1, keepdim=True) * torch.einsum("...ks,...s->...k", g.J, u)
    return LastLayerHVP(
        u=u,
        r=r,
        h=torch.einsum("...s,sj->...j", r, W) + torch.einsum("...s,sj->...j", g.dC_dz, V_W),
        W=torch.einsum("...i,...j->...ij", r, h) + torch.einsum("...i,...j->...ij", g.dC_dz, V_h),
        b=r,
    )


class JacobianSoftmax(Function):
    """Softmax over the last dimension whose backward builds J, (..., C, C), and contracts it."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        """a_k = exp(z_k) / Σ_s exp(z_s)."""
        return softmax(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep a: J is made of nothing else."""
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dC_da: Tensor) -> Tensor:
        """∂C/∂z_s = Σ_k ∂C/∂a_k · J_ks."""
        (a,) = ctx.saved_tensors
        return contract_with_jacobian(dC_da, _jacobian_of_output(a))


def cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    """Return the mean of −log a_t over the rows, by the route of the lesson: softmax, then log.

    `input` is (N, C), `target` (N,) with labels in 0 … C − 1. Its backward meets ∂C/∂a_k = −y_k/a_k
    and contracts it with the Jacobian, (N, C, C) in memory. It is the textbook's form and has the
    textbook's limit: where a_t underflows (in float32, a logit some 90 below the largest) the
    logarithm is taken at the smallest normal number, and the gradient of that row is 0.

    >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """
    a = JacobianSoftmax.apply(input)
    a_t = a.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return -a_t.clamp_min(torch.finfo(a.dtype).tiny).log().mean()
