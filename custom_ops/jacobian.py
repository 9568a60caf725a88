r"""The literal mathematics: every factor of the chain rule built, every contraction an einsum.

The question this file answers: *softmax's derivative is a matrix; the loss's gradient is a vector;
how do the two meet, and what are the shapes on the way to ∂C/∂W?*

One example, K classes, D features. The network's last layer and the cost are

    z_s = Σ_j W_sj x_j + b_s          z: (K,)   W: (K, D)   x: (D,)   b: (K,)
    a_k = exp(z_k) / Σ_s exp(z_s)     a: (K,)
    C   = −Σ_k y_k log a_k            y: (K,), the target's probabilities; C: one number, the cost

and the chain rule, with s and k running over the classes and j over the features, is

    ∂C/∂a_k  = −y_k / a_k                                       (K,)       a vector
    J_ks     = ∂a_k/∂z_s = a_k (δ_ks − a_s)                     (K, K)     a matrix
    ∂C/∂z_s  = Σ_k ∂C/∂a_k · J_ks                               (K,)       vector × matrix
    ∂z_s/∂W_ij = δ_si x_j                                       (K, K, D)  three indices
    ∂C/∂W_ij = Σ_k Σ_s ∂C/∂a_k · J_ks · ∂z_s/∂W_ij              (K, D)     = ∂C/∂z_i · x_j
    ∂C/∂x_j  = Σ_s ∂C/∂z_s W_sj                                 (D,)
    ∂C/∂b_s  = ∂C/∂z_s                                          (K,)

The product of vector and matrix is never element-wise: an element-wise product is right only where
the Jacobian is diagonal, as it is for the sigmoid (J_ks = σ'(z_k) δ_ks), because then the sum over
k has one term. Softmax is not such a function: each a_k depends on every z_s.

Every function here takes any number of leading batch dimensions, written `...`, and is plain
differentiable PyTorch. All of it costs O(K²) a row or more: this is the text to read and the oracle
of the tests; `custom_ops.softmax` and `custom_ops.cross_entropy` compute the same in O(K).
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
    """Return a_k = exp(z_k) / Σ_s exp(z_s) over the last dimension; z and the result are (..., K).

    The maximum is subtracted first: softmax(z) = softmax(z − max z), and exp cannot overflow.

    >>> softmax(torch.tensor([0.0, 0.0]))
    tensor([0.5000, 0.5000])
    """
    e = (z - z.detach().amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def softmax_jacobian(z: Tensor) -> Tensor:
    """Return J_ks = ∂a_k/∂z_s = a_k (δ_ks − a_s) with a = softmax(z); z is (..., K), J (..., K, K).

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
    """Return the row vector times the matrix, (vᵀJ)_s = Σ_k v_k J_ks; v (..., K), J (..., K, K).

    >>> contract_with_jacobian(torch.tensor([1.0, 0.0]), softmax_jacobian(torch.zeros(2)))
    tensor([ 0.2500, -0.2500])
    """
    return torch.einsum("...k,...ks->...s", v, J)


def cross_entropy_gradient(a: Tensor, y: Tensor) -> Tensor:
    """Return ∂C/∂a_k = −y_k / a_k of the cost C = −Σ_k y_k log a_k; all three are (..., K).

    >>> cross_entropy_gradient(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]))
    tensor([-0., -2.])
    """
    return -y / a


class LastLayerGradient(NamedTuple):
    """Every factor of ∂C/∂W, in the order in which the chain rule meets them."""

    z: Tensor  #: (..., K), the logits
    a: Tensor  #: (..., K), their softmax
    dC_da: Tensor  #: (..., K)
    J: Tensor  #: (..., K, K), J_ks = ∂a_k/∂z_s
    dC_dz: Tensor  #: (..., K)
    dz_dW: Tensor  #: (..., K, K, D), ∂z_s/∂W_ij = δ_si x_j
    dC_dW: Tensor  #: (..., K, D), of each example by itself
    dC_dx: Tensor  #: (..., D)
    dC_db: Tensor  #: (..., K)


def last_layer_gradient(x: Tensor, W: Tensor, b: Tensor, y: Tensor) -> LastLayerGradient:
    """Return every factor and every gradient of C = −Σ_k y_k log softmax(W x + b)_k.

    x is (..., D), W (K, D), b (K,), y (..., K). The leading dimensions are examples: each has its
    own gradient, and that of a batch is their sum.

    >>> g = last_layer_gradient(torch.ones(3), torch.zeros(2, 3), torch.zeros(2), torch.eye(2)[0])
    >>> g.dC_dz, g.dz_dW.shape, g.dC_dW.shape
    (tensor([-0.5000,  0.5000]), torch.Size([2, 2, 3]), torch.Size([2, 3]))
    """
    z = torch.einsum("sj,...j->...s", W, x) + b
    a = softmax(z)
    dC_da = cross_entropy_gradient(a, y)
    J = _jacobian_of_output(a)
    dC_dz = contract_with_jacobian(dC_da, J)
    identity = torch.eye(W.shape[0], dtype=z.dtype, device=z.device)
    dz_dW = torch.einsum("si,...j->...sij", identity, x)
    dC_dW = torch.einsum("...k,...ks,...sij->...ij", dC_da, J, dz_dW)
    dC_dx = torch.einsum("...s,sj->...j", dC_dz, W)
    return LastLayerGradient(z, a, dC_da, J, dC_dz, dz_dW, dC_dW, dC_dx, dC_db=dC_dz)


class LastLayerHVP(NamedTuple):
    """The Hessian of the last layer's cost times a direction (V_x, V_W, v_b)."""

    u: Tensor  #: (..., K), the change of the logits along the direction
    r: Tensor  #: (..., K), the change of ∂C/∂z
    x: Tensor  #: (..., D)
    W: Tensor  #: (..., K, D), of each example by itself
    b: Tensor  #: (..., K), of each example by itself


def last_layer_hvp(
    x: Tensor, W: Tensor, b: Tensor, y: Tensor, V_x: Tensor, V_W: Tensor, v_b: Tensor
) -> LastLayerHVP:
    """Return the Hessian-vector product of C = −Σ_k y_k log softmax(W x + b)_k.

    Along the direction the logits change by u = W V_x + V_W x + v_b, and since
    ∂C/∂z = m a − y with m = Σ_k y_k, that gradient changes by r = m J u. The product rule on
    ∂C/∂W = ∂C/∂z xᵀ, ∂C/∂x = Wᵀ ∂C/∂z and ∂C/∂b = ∂C/∂z does the rest:

        H_W = r xᵀ + ∂C/∂z V_xᵀ        H_x = Wᵀ r + V_Wᵀ ∂C/∂z        H_b = r

    x and V_x are (..., D), W and V_W (K, D), b and v_b (K,), y (..., K).
    """
    g = last_layer_gradient(x, W, b, y)
    u = torch.einsum("sj,...j->...s", W, V_x) + torch.einsum("sj,...j->...s", V_W, x) + v_b
    r = y.sum(-1, keepdim=True) * torch.einsum("...ks,...s->...k", g.J, u)
    return LastLayerHVP(
        u=u,
        r=r,
        x=torch.einsum("...s,sj->...j", r, W) + torch.einsum("...s,sj->...j", g.dC_dz, V_W),
        W=torch.einsum("...i,...j->...ij", r, x) + torch.einsum("...i,...j->...ij", g.dC_dz, V_x),
        b=r,
    )


class JacobianSoftmax(Function):
    """Softmax over the last dimension whose backward builds J, (..., K, K), and contracts it.

    >>> z = torch.zeros(2, requires_grad=True)
    >>> JacobianSoftmax.apply(z)[0].backward()
    >>> z.grad
    tensor([ 0.2500, -0.2500])
    """

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

    `input` is (N, K), `target` (N,) with labels in 0 … K − 1. Its backward meets ∂C/∂a_k = −y_k/a_k
    and contracts it with the Jacobian, (N, K, K) in memory. It is the textbook's form and has the
    textbook's limit: where a_t underflows (in float32, a logit some 90 below the largest) the
    logarithm is taken at the smallest normal number, and the gradient of that row is 0.

    >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """
    a = JacobianSoftmax.apply(input)
    a_t = a.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return -a_t.clamp_min(torch.finfo(a.dtype).tiny).log().mean()
