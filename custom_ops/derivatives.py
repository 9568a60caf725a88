"""The derivatives of the registered operators: a graph that holds them can be differentiated.

A tracer (make_fx, jit.trace, export) keeps operators and not the Functions around them. Run again,
such a graph asks each operator for its derivative, which is the Function's: the same formulas, the
same tensors saved. Those of the three maps, p and y = log p beside a vector v, are

    contract         p ⊙ (v − ⟨p, v⟩)    to v: contract(p, w)
                                         to p: w ⊙ (v − ⟨p, v⟩) − v ⟨p, w⟩
    log_softmax_vjp  v − p Σ_k v_k       to v: log_softmax_jvp(y, w), to y: −p ⊙ w Σ_k v_k
    log_softmax_jvp  v − ⟨p, v⟩          to v: log_softmax_vjp(y, w), to y: −p ⊙ v Σ_k w_k

with w the upstream gradient. An operator that works in place has none, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from custom_ops import kernels
from custom_ops.cross_entropy import CrossEntropyFunction, CrossEntropyVjpFunction
from custom_ops.kernels import Options
from custom_ops.kernels.operators import NAMESPACES
from custom_ops.last_layer import operators
from custom_ops.last_layer.functions import (
    LinearCrossEntropyFunction,
    LinearCrossEntropyVjpFunction,
)
from custom_ops.reduction import Total
from custom_ops.softmax import LogSoftmaxFunction, SoftmaxFunction
from custom_ops.surroundings import below_autograd

__all__ = ["register"]


def _has(namespace: str, name: str) -> bool:
    return hasattr(getattr(torch.ops, namespace), name)


def _register(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    for namespace in NAMESPACES:
        if _has(namespace, name):
            torch.library.register_autograd(
                f"{namespace}::{name}", backward, setup_context=setup_context
            )


def _as_function(
    name: str, tensors: int, choose: Callable[..., tuple[type[Function], tuple[Any, ...], Any]]
) -> None:
    """Give an operator the derivative of a Function whose first arguments are its `tensors`.

    `choose` gets the operator's inputs and outputs, and returns the Function, what its forward
    takes after the tensors, and what it returns.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, rest, outputs = choose(inputs, output)
        ctx.surplus = len(inputs) - tensors
        ctx.function.setup_context(ctx, (*inputs[:tensors], *rest), outputs)

    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        found = ctx.function.backward(ctx, *gradients)
        found = found if isinstance(found, tuple) else (found,)
        return *found[:tensors], *[None] * ctx.surplus

    _register(name, setup_context, backward)


def _softmax(inputs: Any, output: Tensor) -> Any:
    _, dim, log = inputs
    return LogSoftmaxFunction if log else SoftmaxFunction, (dim,), output


def _cross_entropy(inputs: Any, output: Any) -> Any:
    return CrossEntropyFunction, (Options.of(*inputs[3:]),), output


def _cross_entropy_vjp(inputs: Any, output: Tensor) -> Any:
    return CrossEntropyVjpFunction, (None, Options.of(*inputs[7:])), output


def _linear_cross_entropy(inputs: Any, output: Any) -> Any:
    layer = operators.layer_of(inputs)
    products = operators.wanted_of(output[5:], layer.blocks)
    return LinearCrossEntropyFunction, layer[5:], (*output[:5], *products, None, None)


def _linear_cross_entropy_vjp(inputs: Any, output: Any) -> Any:
    layer = operators.layer_of_vjp(inputs)
    return LinearCrossEntropyVjpFunction, (None, None, None, *layer[5:], False), output


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    *pair, ctx.dim = inputs
    ctx.save_for_backward(*pair)


def _contract(ctx: Any, w: Tensor) -> tuple[Tensor, Tensor, None]:
    p, v = ctx.saved_tensors
    d_p = w * (v - (p * v).sum(ctx.dim, keepdim=True)) - v * (p * w).sum(ctx.dim, keepdim=True)
    return d_p, kernels.contract(p, w, ctx.dim), None


def _log_softmax_vjp(ctx: Any, w: Tensor) -> tuple[Tensor, Tensor, None]:
    y, v = ctx.saved_tensors
    d_y = -y.exp() * w * v.sum(ctx.dim, keepdim=True)
    return d_y, kernels.log_softmax_jvp(y, w, ctx.dim), None


def _log_softmax_jvp(ctx: Any, w: Tensor) -> tuple[Tensor, Tensor, None]:
    y, v = ctx.saved_tensors
    d_y = -y.exp() * v * w.sum(ctx.dim, keepdim=True)
    return d_y, kernels.log_softmax_vjp(y, w, ctx.dim), None


def _refuse(namespace: str, name: str) -> None:
    operator = getattr(getattr(torch.ops, namespace), name)

    def in_place(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"{namespace}::{name} works in place and cannot be differentiated: expected "
                "tensors that do not require grad, or torch.no_grad()"
            )
        with below_autograd():
            return operator(*args)

    torch.library.impl(f"{namespace}::{name}", "Autograd", in_place)


def register() -> None:
    """Give every operator of this package its derivative."""
    _as_function("softmax", 1, _softmax)
    _as_function("cross_entropy", 3, _cross_entropy)
    _as_function("cross_entropy_vjp", 7, _cross_entropy_vjp)
    _as_function("total", 1, lambda inputs, output: (Total, (), output))
    _as_function("linear_cross_entropy", 5, _linear_cross_entropy)
    _as_function("linear_cross_entropy_vjp", 10, _linear_cross_entropy_vjp)
    _register("contract", _keep, _contract)
    _register("log_softmax_vjp", _keep, _log_softmax_vjp)
    _register("log_softmax_jvp", _keep, _log_softmax_jvp)
    for namespace in NAMESPACES:
        for name in ("cross_entropy_vjp_", "cross_entropy_hvp_"):
            if below_autograd is not None and _has(namespace, name):
                _refuse(namespace, name)
