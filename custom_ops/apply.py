"""The one place that chooses how a hand-written Function runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    is_legacy_batchedtensor,
)
from torch.autograd import Function

__all__ = ["apply"]


def apply(function: type[Function], *args: Any) -> Any:
    """Apply `function` in the form that the caller's surroundings can differentiate.

    - As a rule: `function.with_jvp`, the class with the hand-written forward mode.
    - Under torch.compile and torch.export: the class without it. Dynamo refuses a Function that
      defines `jvp`, and takes forward mode through the operators of `forward`.
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
    if _forward_levels() > 1 or any(map(_in_batch_of_gradients, args)):
        return function.plain(*args)  # type: ignore[attr-defined]
    return function.with_jvp.apply(*args)  # type: ignore[attr-defined]


@torch.compiler.assume_constant_result
def _levels() -> int:
    """How many torch.func transforms surround the call; known when Dynamo traces."""
    return len(get_interpreter_stack() or ())


def _forward_levels() -> int:
    return sum(level.key() == TransformType.Jvp for level in get_interpreter_stack() or ())


def _in_batch_of_gradients(argument: object) -> bool:
    return isinstance(argument, Tensor) and is_legacy_batchedtensor(argument)
