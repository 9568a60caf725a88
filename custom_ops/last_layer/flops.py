"""What the last layer's operators cost, for torch.utils.flop_counter, which cannot see inside."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from custom_ops.surroundings import dispatch_modes

__all__ = ["register"]


def register() -> None:
    """Have the counters that are open now, and those to come, count the operators.

    Called when an operator is about to be seen: importing the counter takes a tenth of a second,
    and one that is open has copied the registry already.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or torch.compiler.is_compiling():
        return
    operators = torch.ops.custom_ops
    formulas = {
        operators.linear_cross_entropy: _of_layer,
        operators.linear_cross_entropy_vjp: _of_layer,
    }
    registries = [counter.flop_registry]
    registries += [m.counter.flop_registry for m in dispatch_modes() if hasattr(m, "counter")]
    for registry in registries:
        registry.update(formulas)


def _products(x: Any, W: Any, wanted: Sequence[int]) -> int:
    """2NCD for the logits, and as many for each of dx and dW that is wanted."""
    return 2 * x.shape[0] * W.shape[0] * W.shape[1] * (1 + sum(wanted[:2]))


def _of_layer(x: Any, W: Any, *rest: Any, **_: Any) -> int:
    # of what an operator is given, the one list of three
    (wanted,) = (given for given in rest if isinstance(given, list | tuple) and len(given) == 3)
    return _products(x, W, wanted)
