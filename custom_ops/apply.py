"""The one place that chooses how a hand-written Function runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    is_legacy_batchedtensor,
)
from torch.autograd import Function, forward_ad

from custom_ops.kernels import native

__all__ = ["apply", "forward_mode_of", "graph_is_kept", "is_transformed", "node", "set_node_vjp"]


def forward_mode_of(function: type[Function]) -> Callable[[type[Function]], type[Function]]:
    """Decorate the subclass that adds `jvp` to `function`: `apply` finds it as `with_jvp`.

    The signature of `forward` is kept on the way, for Function.apply asks for it at every call, and
    finding it out anew takes longer than a small softmax.
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


def is_transformed() -> bool:
    """Whether torch.compile, a torch.func transform or forward mode surrounds the call."""
    return (
        torch.compiler.is_compiling()
        or bool(get_interpreter_stack())
        or forward_ad._current_level >= 0
    )


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
      create_graph would leave detached, silently; with torch.func inside a compiled region, where
      vmap refuses it; and in torch.export, which would keep the forward alone, under no_grad.
    """
    if torch.compiler.is_compiling():
        plain = torch.compiler.is_exporting() or _levels() > 0
        return function.plain(*args) if plain else function.apply(*args)  # type: ignore[attr-defined]
    levels = get_interpreter_stack() or []
    if _nested_forward(levels) or any(map(_in_batch_of_gradients, args)):
        return function.plain(*args)  # type: ignore[attr-defined]
    if not levels and not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return function.forward(*args)
    return function.with_jvp.apply(*args)  # type: ignore[attr-defined]


def graph_is_kept() -> bool:
    """Whether what the running backward saved may be asked for again: it must stay as it is."""
    if is_transformed():
        return True
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _levels() -> int:
    """How many torch.func transforms surround the call; known when Dynamo traces."""
    return len(get_interpreter_stack() or ())


# What torch.compiler.assume_constant_result does, which imports Dynamo first: a second's wait.
_levels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _nested_forward(levels: list[Any]) -> bool:
    return sum(level.key() == TransformType.Jvp for level in levels) > 1


def _in_batch_of_gradients(argument: object) -> bool:
    return isinstance(argument, Tensor) and is_legacy_batchedtensor(argument)
