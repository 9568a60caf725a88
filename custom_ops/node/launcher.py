"""What the C++ node asks of a GPU: a loss, and later its gradient.

The arguments are right and plain, as the node has found them; nothing here is differentiated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.kernels.cuda import reduction
from custom_ops.kernels.cuda.cross_entropy import cross_entropy
from custom_ops.kernels.cuda.gradient import cross_entropy_vjp, cross_entropy_vjp_
from custom_ops.kernels.problem import Options, Problem, Rows

__all__ = ["MOST_ROWS", "backward", "forward"]

#: With more rows the time of Python's frames does not count.
MOST_ROWS = reduction.FEW


def forward(
    input: Tensor, target: Tensor, weight: Tensor | None, *plan: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the loss, M, L and what a mean was divided by; a normalizer of 0 is none."""
    *flat, result_dtype, reduced, normalizer = plan
    problem = Problem(input, target, weight, Options.of(*flat))
    loss, M, L, _, _ = cross_entropy(problem)
    divisor = None
    if reduced == "sum":
        loss = reduction.total(loss)
    elif reduced == "mean":
        if problem.soft:
            normalizer = normalizer or input.numel() / problem.classes
        loss, divisor = reduction.mean(loss, problem, normalizer)
    return loss.to(result_dtype), M, L, divisor


def backward(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
    """Return dz for the upstream gradient g of the loss, in the place of the input if asked to."""
    g, M, L, divisor, *flat, inplace = rest
    rows = Rows(g, None, M, L)
    if not inplace:
        return cross_entropy_vjp(Problem(input, target, weight, Options.of(*flat)), rows, divisor)
    problem = Problem(input.detach(), target, weight, Options.of(*flat))
    cross_entropy_vjp_(problem, rows, divisor)
    torch.autograd.graph.increment_version(problem.input)
    return problem.input
