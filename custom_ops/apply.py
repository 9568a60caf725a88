"""The one place that chooses how a hand-written Function runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from custom_ops.surroundings import (
    forward_levels,
    func_levels,
    is_exporting,
    is_known,
    tracing_levels,
)

__all__ = ["apply", "forward_mode_of"]


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


def apply(function: type[Function], *args: Any) -> Any:
    """Apply `function` in the form that the caller's surroundings can differentiate.

    - As a rule: `function.with_jvp`, the class with the hand-written forward mode.
    - Where nothing is differentiated, as in a backward without create_graph: `function.forward`.
    - Under torch.compile and torch.export: the class without `jvp`. Dynamo refuses a Function that
      defines it, and takes forward mode through the operators of `forward`.
    - `function.algebra`, the forward as differentiable algebra, where torch (2.13) has no right
      answer for a Function: with forward mode nested in forward mode, where the tangent that `jvp`
      returns counts as a constant of the outer level (issue 197867: jacfwd(jacfwd(f)) would be 0,
      silently); in the backward of torch.autograd.grad(..., is_grads_batched=True), whose result
      create_graph would leave detached, silently; with a tensor of another class or layout beside
      the others, of which a Function sees one half; with torch.func or forward mode inside a
      compiled region, where vmap refuses it and a tangent is lost; and in torch.export, which would
      keep the forward alone, under no_grad.
    """
    if torch.compiler.is_compiling():
        if is_exporting() or tracing_levels() > 0:
            return function.algebra(*args)  # type: ignore[attr-defined]
        # Dynamo would do the same, but for a `forward` with *args, to which it gives a ctx too.
        return function.apply(*args) if _differentiated(args) else function.forward(*args)
    known = all(is_known(a) for a in args if isinstance(a, Tensor))
    if forward_levels() > 1 or not known or is_exporting():
        return function.algebra(*args)  # type: ignore[attr-defined]
    if not torch.is_grad_enabled() and not func_levels() and forward_levels() == 0:
        return function.forward(*args)
    return function.with_jvp.apply(*args)  # type: ignore[attr-defined]


def _differentiated(args: tuple[Any, ...]) -> bool:
    tensors = (a for a in args if isinstance(a, Tensor))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
