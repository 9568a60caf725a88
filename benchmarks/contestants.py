"""Who runs: torch's function, its compiled form and ours, on the same numbers.

Every contestant gets logits as a model hands them on: not a leaf, requiring grad, in memory that
was written just before. They are written anew for every contestant, as the one that works in place
needs it, and outside of the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import custom_ops
from benchmarks.cases import Case

_CE = "cross_entropy"

COPY, BUILTIN, COMPILED, OURS, IN_PLACE = "copy", "builtin", "compiled", "ours", "in place"


class Contestant(NamedTuple):
    """What is timed is `work(prepare())`, without `prepare` and without freeing what it returns."""

    prepare: Callable[[], Tensor]
    work: Callable[[Tensor], object]


def of(case: Case) -> tuple[str, ...]:
    """Return the names of all that take part in the case."""
    # In place overwrites its logits, so it cannot be called many times on the same.
    in_place = (IN_PLACE,) if case.op == _CE and case.calls == 1 else ()
    return (COPY, BUILTIN, COMPILED, OURS, *in_place)


def enter(case: Case, names: Sequence[str]) -> dict[str, Contestant]:
    """Draw the case's numbers and return the contestants of these names, all on the same."""
    if COMPILED in names:
        torch.compiler.reset()  # else the ninth shape is one too many for it
    inputs = Inputs(case)
    return {name: Contestant(inputs.logits, _work(case, name, inputs)) for name in names}


class Inputs:
    """The numbers of a case, on the device that is torch's default."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        rows, classes, *inner = case.shape
        self._leaf = torch.randn(case.shape, dtype=case.dtype).requires_grad_()
        self._memory = torch.empty_like(self._leaf, requires_grad=False)
        self.target = torch.randint(classes, (rows, *inner))
        self.cotangent = torch.randn(case.shape, dtype=case.dtype) if case.op != _CE else None
        self.options: dict[str, Any] = {}
        if case.regularised:
            weight = 0.5 + torch.rand(classes, dtype=case.dtype)
            self.options = {"weight": weight, "label_smoothing": 0.1}

    def logits(self) -> Tensor:
        """Write the logits anew, and return them as a model hands them on."""
        # Copying a leaf that requires grad into a tensor that does not makes it a non-leaf that
        # does, without a page of fresh memory.
        return self._memory.detach().copy_(self._leaf)


def _work(case: Case, name: str, inputs: Inputs) -> Callable[[Tensor], object]:
    if name == COPY:
        copy = torch.empty(case.shape, dtype=case.dtype)
        return lambda logits: copy.copy_(logits.detach())
    f = function(case, name)
    if case.op == _CE:
        return loss_and_gradient(partial(f, target=inputs.target, **inputs.options))
    return output_and_gradient(partial(f, dim=1), inputs.cotangent)


def function(case: Case, name: str) -> Callable[..., Tensor]:
    """Return who computes the op, without the options of the case."""
    builtin, ours = getattr(F, case.op), getattr(custom_ops, case.op)
    if name == BUILTIN:
        return builtin
    if name == COMPILED:
        return torch.compile(builtin, dynamic=False, fullgraph=True)
    return ours if name == OURS else partial(ours, inplace_backward=True)


def loss_and_gradient(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], object]:
    """Return the work that is a step's: the loss of the logits, and its gradient."""

    def work(logits: Tensor) -> object:
        loss = function(logits)
        return loss, torch.autograd.grad(loss, logits)

    return work


def output_and_gradient(
    function: Callable[[Tensor], Tensor], v: Tensor | None
) -> Callable[[Tensor], object]:
    """Return the work that is a step's: the result of the logits, and the gradient along v."""

    def work(logits: Tensor) -> object:
        y = function(logits)
        return y, torch.autograd.grad(y, logits, v)

    return work
