"""The kernels as registered operators: their schemas, their fakes, and how they are called.

The C++ kernels for the CPU (`custom_ops::…`) and the Triton kernels (`custom_ops_cuda::…`) are the
same operators in two namespaces, as Triton's interpreter takes CPU tensors too. An operator that
returns nothing for a statistic returns an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops.kernels.problem import SCHEMA, Found, Problem, Rows
from custom_ops.surroundings import is_watched

__all__ = ["NAMESPACES", "Operators", "define", "fresh"]

NAMESPACES = ("custom_ops", "custom_ops_cuda")

_MAP = "(Tensor p, Tensor v, int dim) -> Tensor"
_VJP = f"Tensor target, Tensor? weight, Tensor g, Tensor? q, Tensor M, Tensor L, {SCHEMA}"
_HVP = _VJP.replace("Tensor g", "Tensor(b!) u, Tensor g")


def fresh(x: Tensor, dim: int) -> Tensor:
    """Return memory for a result in x's layout: its classes last where they are last in x."""
    last = x.movedim(dim, -1) if x.dim() else x
    if last.is_contiguous() and not x.is_contiguous():
        return last.new_empty(last.shape).movedim(-1, dim)
    return x.new_empty(x.shape)


def _cross_entropy(input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, dim, dtype, _, _, stats = rest
    rows = [size for d, size in enumerate(input.shape) if d != dim]
    loss, M, L = (input.new_empty(rows, dtype=dtype) for _ in range(3))
    of_stats = rows if stats else [0]
    prediction = input.new_empty(of_stats, dtype=torch.int64)
    return loss, M, L, prediction, input.new_empty(of_stats, dtype=dtype)


#: Of each operator its schema, and what it returns for tensors without memory.
OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "softmax": (
        "(Tensor input, int dim, bool log) -> Tensor",
        lambda input, dim, log: fresh(input, dim),
    ),
    "contract": (_MAP, lambda p, v, dim: fresh(p, dim)),
    "log_softmax_vjp": (_MAP, lambda p, v, dim: fresh(p, dim)),
    "log_softmax_jvp": (_MAP, lambda p, v, dim: fresh(p, dim)),
    "cross_entropy": (
        f"(Tensor input, Tensor target, Tensor? weight, {SCHEMA}, bool stats) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
        _cross_entropy,
    ),
    "cross_entropy_vjp": (
        f"(Tensor input, {_VJP}) -> Tensor",
        lambda input, *rest: fresh(input, rest[6]),
    ),
    "cross_entropy_vjp_": (f"(Tensor(a!) input, {_VJP}) -> ()", lambda *_: None),
    "cross_entropy_hvp_": (
        f"(Tensor(a!) z, {_HVP}) -> (Tensor, Tensor)",
        lambda *all: (torch.empty_like(all[6]), torch.empty_like(all[6])),
    ),
    "total": ("(Tensor input) -> Tensor", lambda input: input.new_empty(())),
}


def define(namespace: str) -> torch.library.Library:
    """Define the operators with their fakes; the returned library keeps them alive."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for name, (schema, fake) in OPERATORS.items():
        library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library


class Operators:
    """The kernels of a device, called directly, or as torch knows them where a mode sees them.

    Only a mode or a tracer needs the dispatcher, which costs a microsecond or two a call.
    """

    def __init__(self, namespace: str, direct: Callable[[], Any]) -> None:
        self.namespace, self.direct = namespace, direct

    def now(self) -> Any:
        """Return what holds the operators, as functions."""
        library = None if is_watched() else self.direct()
        return getattr(torch.ops, self.namespace) if library is None else library

    def softmax(self, z: Tensor, dim: int) -> Tensor:
        """p = exp(z − M) / Σ exp(z − M)."""
        return self.now().softmax(z, dim, False)

    def log_softmax(self, z: Tensor, dim: int) -> Tensor:
        """log p = (z − M) − L."""
        return self.now().softmax(z, dim, True)

    def contract(self, p: Tensor, v: Tensor, dim: int) -> Tensor:
        """J v = vᵀJ = p ⊙ (v − ⟨p, v⟩)."""
        return self.now().contract(p, v, dim)

    def log_softmax_vjp(self, y: Tensor, v: Tensor, dim: int) -> Tensor:
        """v − p Σ_k v_k, with p = exp(y)."""
        return self.now().log_softmax_vjp(y, v, dim)

    def log_softmax_jvp(self, y: Tensor, v: Tensor, dim: int) -> Tensor:
        """v − ⟨p, v⟩, with p = exp(y)."""
        return self.now().log_softmax_jvp(y, v, dim)

    def cross_entropy(self, problem: Problem) -> Found:
        """Return ℓ, M, L and the statistics."""
        o = problem.options
        loss, M, L, *stats = self.now().cross_entropy(*problem.tensors, *o.flat(), o.stats)
        return Found(loss, M, L, *(stats if o.stats else (None, None)))

    def cross_entropy_vjp(self, problem: Problem, rows: Rows) -> Tensor:
        """Return z' ⊙ (a·p − g·ỹ)."""
        return self.now().cross_entropy_vjp(*problem.tensors, *rows.flat, *problem.options.flat())

    def cross_entropy_vjp_(self, problem: Problem, rows: Rows) -> Tensor:
        """Write `cross_entropy_vjp` over the input, and return it."""
        self.now().cross_entropy_vjp_(*problem.tensors, *rows.flat, *problem.options.flat())
        return problem.input

    def cross_entropy_vjp_out(self, problem: Problem, rows: Rows, out: Tensor) -> None:
        """Write `cross_entropy_vjp` into `out`; no operator, as it is called where none is seen."""
        numbers = problem.options.flat()
        self.direct().cross_entropy_vjp_out(*problem.tensors, *rows.flat, *numbers, out)

    def cross_entropy_hvp_(self, problem: Problem, u: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Put dz in the place of z and H u in that of u; return ∂⟨u, dz⟩ over ∂g and ∂q."""
        operator = self.now().cross_entropy_hvp_
        return operator(*problem.tensors, u, *rows.flat, *problem.options.flat())

    def total(self, x: Tensor) -> Tensor:
        """Σ x, 0-d."""
        return self.now().total(x)
