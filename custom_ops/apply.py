"""The one place that chooses how a hand-written Function runs."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import Function

__all__ = ["apply"]


def apply(function: type[Function], *args: Any) -> Any:
    """Apply `function` in the form that the caller's surroundings can differentiate.

    - Under torch.compile and torch.export: the class as it stands. Dynamo refuses a Function that
      defines `jvp`, so ours do not; it takes forward mode through the forward's operators.
    - With forward mode nested in forward mode: its forward as plain differentiable algebra. torch
      (2.13, issue 197867) takes the tangent that a Function's `jvp` returns for a constant of the
      outer level, so that jacfwd(jacfwd(f)) would be 0, silently.
    - Else: `function.with_jvp`, the subclass that adds the hand-written forward mode.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)
    levels = get_interpreter_stack() or ()
    if sum(level.key() == TransformType.Jvp for level in levels) > 1:
        return function.forward(*args)
    return function.with_jvp.apply(*args)  # type: ignore[attr-defined]
