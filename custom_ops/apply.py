"""The one place that chooses how a hand-written Function runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from custom_ops.kernels import native
from custom_ops.surroundings import (
    forward_levels,
    func_levels,
    is_exporting,
    is_known,
    tracing_levels,
)

__all__ = ["apply", "forward_mode_of", "node", "set_node_vjp"]


def forward_mode_of(function: type[Function]) -> Callable[[type[Function]], type[Function]]:
    """Decorate the subclass that adds `jvp` to `function`: `apply` finds it as `with_jvp`.

    The signature of `forward` is cached: Function.apply calls inspect.signature on every call,
    which takes longer than a small softmax.
    """

    def register(with_jvp: type[Function]) -> type[Function]:
        function.with_jvp = with_jvp  # type: ignore[attr-defined]
        function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
        return with_jvp

    return register


def node(name: str, *args: Any) -> Any:
    """Return the C++ autograd node's answer, or None where the Python Functions are to give it.

    A node does what a Function does, with the same kernels and to the same bits, without Python's
    frames: at MNIST's batch they are most of the time. It stands for the plain case alone: CPU
    tensors of torch's own class, no transform, mode or forward derivative around them, and only the
    input differentiated (`plain` in kernels/cpu/nodes.h). Its backward asks the Function's formulas
    where it is to be differentiated or batched. The cross-entropy of a batch on CUDA has it too,
    with the Triton kernels behind it (kernels/cuda/node.py).
    """
    if native.library is None or torch.compiler.is_compiling():
        return None
    return getattr(native.library, name)(*args)


def set_node_vjp(name: str, vjp: Callable[..., Tensor]) -> None:
    """Tell the node who answers a backward that is to be differentiated or batched."""
    if native.library is not None:
        native.library.set_vjp(name, vjp)


def apply(function: type[Function], *args: Any) -> Any:
    """Apply `function` in the form that the caller's surroundings can differentiate.

    - As a rule: `function.with_jvp`, the class with the hand-written forward mode.
    - Where nothing is differentiated, as in a backward without create_graph: `function.forward`.
    - Under torch.compile and torch.export: the class without `jvp`. Dynamo refuses a Function that
      defines it, and takes forward mode through the operators of `forward`.
    - `function.plain`, the forward as plain differentiable algebra, where torch (2.13) has no right
      answer for a Function: with forward mode nested in forward mode, where the tangent that `jvp`
      returns counts as a constant of the outer level (issue 197867: jacfwd(jacfwd(f)) would be 0,
      silently); in the backward of torch.autograd.grad(..., is_grads_batched=True), whose result
      create_graph would leave detached, silently; with a tensor of another class or layout beside
      the others, of which a Function sees one half; with torch.func or forward mode inside a
      compiled region, where vmap refuses it and a tangent is lost; and in torch.export, which would
      keep the forward alone, under no_grad.
    """
    if torch.compiler.is_compiling():
        plain = is_exporting() or tracing_levels() > 0
        return function.plain(*args) if plain else function.apply(*args)  # type: ignore[attr-defined]
    known = all(is_known(a) for a in args if isinstance(a, Tensor))
    if forward_levels() > 1 or not known or is_exporting():
        return function.plain(*args)  # type: ignore[attr-defined]
    if not torch.is_grad_enabled() and not func_levels() and forward_levels() == 0:
        return function.forward(*args)
    return function.with_jvp.apply(*args)  # type: ignore[attr-defined]
