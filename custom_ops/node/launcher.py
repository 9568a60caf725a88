"""What is asked of a GPU: the first call of a kind, and a recording of its launches.

Later calls of that kind are launched by C++ alone (`launches.h`): the node's, and those that the
door of the kernels hands on, the last layer's among them. The arguments are right and plain, as the
node or the door has found them; nothing here is differentiated. Each function returns its results
and, where it is asked to record and can, a `Recording`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from custom_ops.kernels import cpu
from custom_ops.kernels.cuda import contract, gradient
from custom_ops.kernels.cuda.cross_entropy import cross_entropy, reduced
from custom_ops.kernels.cuda.recording import recorded
from custom_ops.kernels.cuda.softmax import softmax
from custom_ops.kernels.problem import Options, Problem, Rows

__all__ = ["FUNCTIONS"]

Results = tuple[Tensor | None, ...]


def _cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, *plan: Any) -> Results:
    """Return the loss, M, L, what a mean was divided by, and the statistics that are wanted."""
    *flat, result_dtype, reduction, normalizer = plan
    problem = Problem(input, target, weight, Options.of(*flat))
    if reduction == "none":
        found, n = cross_entropy(problem, result_dtype), None
    else:
        mean = reduction == "mean"
        if mean and problem.soft:
            normalizer = normalizer or input.numel() / problem.classes
        found, n = reduced(problem, mean, normalizer, result_dtype)
    loss, M, L, *stats = found
    return loss, M, L, n, *stats


def _cross_entropy_vjp(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> Results:
    """Return dz for the upstream gradient g of the loss; or write it over the input."""
    g, q, M, L, divisor, *flat, inplace = rest
    problem, rows = Problem(input, target, weight, Options.of(*flat)), Rows(g, q, M, L)
    if not inplace:
        return (gradient.cross_entropy_vjp(problem, rows, divisor),)
    gradient.cross_entropy_vjp_(problem._replace(input=input.detach()), rows, divisor)
    return (None,)


def _rows(input: Tensor, target: Tensor, weight: Tensor | None, *flat: Any) -> Results:
    """Return ℓ, M, L and the statistics of each row; whether labels are reported is the last."""
    *options, _ = flat
    return tuple(cross_entropy(Problem(input, target, weight, Options.of(*options))))


def _rows_vjp(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> Results:
    """Return dz for the upstream gradients of the rows; or write it into `out`, or over the input.

    `out` is a tensor behind L, or None; the last number is whether to write over the input.
    """
    g, q, M, L, out, *flat, inplace = rest
    problem, rows = Problem(input, target, weight, Options.of(*flat)), Rows(g, q, M, L)
    if out is not None:
        gradient.cross_entropy_vjp_out(problem, rows, out)
    elif inplace:
        gradient.cross_entropy_vjp_(problem, rows)
    else:
        return (gradient.cross_entropy_vjp(problem, rows),)
    return (None,)


def _recording(function: Callable[..., Results], tensors: int) -> Callable[..., Any]:
    """Return `function`, whose first arguments are so many tensors, as the node calls it."""

    def called(record: bool, *args: Any) -> tuple[Results, Any]:
        if not record:
            return function(*args), None
        with recorded(args[:tensors]) as tape:
            results = function(*args)
        assert cpu.library is not None  # its node calls this
        return results, tape.recording(results, cpu.library.Recording)

    return called


#: By the names that they are called by.
FUNCTIONS = {
    "cross_entropy": _recording(_cross_entropy, 3),
    "cross_entropy_vjp": _recording(_cross_entropy_vjp, 8),
    "rows": _recording(_rows, 3),
    "rows_vjp": _recording(_rows_vjp, 8),
    "softmax": _recording(lambda z, dim, log: (softmax(z, dim, log),), 1),
    "contract": _recording(lambda p, v, dim: (contract.contract(p, v, dim),), 2),
    "log_softmax_vjp": _recording(lambda y, v, dim: (contract.log_softmax_vjp(y, v, dim),), 2),
}
