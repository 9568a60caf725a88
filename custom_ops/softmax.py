"""Softmax and log-softmax, and the contraction with softmax's Jacobian that both use.

With p = softmax(z) and J_ks = ∂p_k/∂z_s = p_k (δ_ks − p_s), for any vector v

    contract(p, v)_s = Σ_k v_k J_ks = p_s (v_s − ⟨p, v⟩)

in O(C), and as J is symmetric this is both vᵀJ, softmax's backward, and J v, its forward mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from custom_ops import kernels, sharded
from custom_ops.apply import apply, forward_mode_of
from custom_ops.autocast import autocast_dtype
from custom_ops.checks import check_dim, check_input, check_vector
from custom_ops.kernels import eager
from custom_ops.nested import by_parts, is_foreign_layout
from custom_ops.node import node, set_vjp
from custom_ops.surroundings import is_exporting

__all__ = ["contract", "log_softmax", "softmax"]


def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return p_k = exp(z_k) / Σ_s exp(z_s) over dimension `dim`, as torch.nn.functional.softmax.

    Args:
        input: logits of any shape, also 0-d; float64, float32, bfloat16 or float16 (sums and
            exponentials of the half types are taken in float32). A nested tensor is taken part by
            part; MaskedTensor and MKL-DNN's layout get torch's own softmax.
        dim: the dimension of the classes, −input.dim() … input.dim() − 1.
        dtype: if given, the input is converted to it first, and the result has it.

    Returns:
        Probabilities in the shape of `input`. A row that holds NaN or +inf, or only −inf, is NaN.

    Raises:
        IndexError: `dim` is out of range.
        NotImplementedError: the input, or `dtype`, is not of a floating-point type; or the input is
            sparse.
        TypeError: `dtype` is no torch.dtype, `dim` no int, `input` no tensor.

    >>> softmax(torch.tensor([0.0, 0.0, -torch.inf]), 0)
    tensor([0.5000, 0.5000, 0.0000])
    """
    check_input("softmax", input, dtype)
    if input.is_nested:
        return by_parts(softmax, input, dim, dtype)
    dim = check_dim(dim, input)
    if is_foreign_layout(input):
        return torch.softmax(input, dim, dtype)
    dtype = autocast_dtype(input, dtype)
    z = input if dtype is None else input.to(dtype)
    if is_exporting():
        return torch.softmax(z, dim)  # the one operator that every runtime has a kernel for
    if sharded.is_sharded(z):
        return sharded.softmax(softmax, z, dim)
    p = node("softmax", z, dim)
    return apply(SoftmaxFunction, z, dim) if p is None else p


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return log p_k = z_k − log Σ_s exp(z_s) over `dim`, as torch.nn.functional.log_softmax.

    Args:
        input: logits of any shape, as in `softmax`.
        dim: the dimension of the classes, as in `softmax`.
        dtype: if given, the input is converted to it first, and the result has it.

    Returns:
        Log-probabilities in the shape of `input`.

    Raises:
        IndexError, NotImplementedError, TypeError: as `softmax` does.

    >>> log_softmax(torch.tensor([0.0, 0.0]), 0)
    tensor([-0.6931, -0.6931])
    """
    check_input("log_softmax", input, dtype)
    if input.is_nested:
        return by_parts(log_softmax, input, dim, dtype)
    dim = check_dim(dim, input)
    if is_foreign_layout(input):
        return torch.log_softmax(input, dim, dtype)
    dtype = autocast_dtype(input, dtype)
    z = input if dtype is None else input.to(dtype)
    if is_exporting():
        return torch.log_softmax(z, dim)
    if sharded.is_sharded(z):
        return sharded.softmax(log_softmax, z, dim)
    y = node("log_softmax", z, dim)
    return apply(LogSoftmaxFunction, z, dim) if y is None else y


def contract(p: Tensor, v: Tensor, dim: int = -1) -> Tensor:
    """Return J v = vᵀJ = p ⊙ (v − ⟨p, v⟩), the product with softmax's Jacobian J, never built.

    Args:
        p: probabilities, softmax(z) along `dim`.
        v: a cotangent (∂C/∂p) or a tangent of z, in a shape that broadcasts with p.
        dim: the dimension of the classes.

    Returns:
        The contraction in the shape and dtype of `v`, differentiable in both arguments.

    Raises:
        IndexError: `dim` is out of range.
        NotImplementedError: p or v is not of a floating-point type.
        RuntimeError: the shapes do not broadcast.
        TypeError: not a tensor.

    >>> p, v = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
    >>> contract(p, v)
    tensor([ 0.2500, -0.2500])
    """
    check_vector("p", p)
    check_vector("v", v)
    check_dim(dim, p)
    return kernels.contract(p, v, dim)


class SoftmaxFunction(Function):
    """p = softmax(z); the backward saves p and needs nothing else."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, dim: int) -> Tensor:
        return kernels.softmax(z, dim)

    algebra = staticmethod(eager.softmax)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], p: Tensor) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_backward(p)
        ctx.save_for_forward(p)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        return contract(p, v, ctx.dim), None  # ∂C/∂z_s = Σ_k v_k J_ks


set_vjp("softmax", contract)


@forward_mode_of(SoftmaxFunction)
class _SoftmaxWithJvp(SoftmaxFunction):
    @staticmethod
    def jvp(ctx: Any, v: Tensor, _: None) -> Tensor:
        (p,) = ctx.saved_tensors
        return contract(p, v, ctx.dim)  # ∂p_k = Σ_s J_ks v_s


class LogSoftmaxFunction(Function):
    """y = log softmax(z), so p = exp(y); ∂y_k/∂z_s = δ_ks − p_s."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, dim: int) -> Tensor:
        return kernels.log_softmax(z, dim)

    algebra = staticmethod(eager.log_softmax)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], y: Tensor) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_backward(y)
        ctx.save_for_forward(y)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return kernels.log_softmax_vjp(y, v, ctx.dim), None  # v_s − p_s Σ_k v_k


set_vjp("log_softmax", kernels.log_softmax_vjp)


@forward_mode_of(LogSoftmaxFunction)
class _LogSoftmaxWithJvp(LogSoftmaxFunction):
    @staticmethod
    def jvp(ctx: Any, v: Tensor, _: None) -> Tensor:
        (y,) = ctx.saved_tensors
        return kernels.log_softmax_jvp(y, v, ctx.dim)  # v_k − ⟨p, v⟩
