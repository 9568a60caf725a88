"""The only place that knows a device: the protocol of the kernels, and the choice between them.

A kernel computes numbers and trusts its arguments; derivatives are the business of the functions
that call it. Each device has one door with the same protocol, the functions below: `eager`, plain
ATen, whose operators autograd sees, answers wherever a result is to be differentiated; elsewhere
`cpu` answers if its C++ kernels were built, and `cuda` if Triton is there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from custom_ops.kernels import cpu, cuda, eager
from custom_ops.kernels.problem import Found, Options, Problem, Rows, statistics_dtype

__all__ = [
    "Found",
    "Options",
    "Problem",
    "Rows",
    "backend",
    "contract",
    "cross_entropy",
    "cross_entropy_hvp_",
    "cross_entropy_vjp",
    "cross_entropy_vjp_",
    "cross_entropy_vjp_out",
    "log_softmax",
    "log_softmax_jvp",
    "log_softmax_vjp",
    "softmax",
    "statistics_dtype",
    "takes_hvp",
    "total",
]


def backend() -> str:
    """Return which kernels are in use, in one line, and why others are not."""
    used, unused = [], []
    if cpu.library is not None:
        used.append(f"C++ ({cpu.capability}) on the CPU")
    else:
        unused.append(f"no C++ kernels: {cpu.missing}")
    if cuda.running() is not None:
        used.append(f"Triton {cuda.version} {cuda.where}")
    elif cuda.missing:
        unused.append(f"no Triton kernels: {cuda.missing}")
    eager_on = "elsewhere" if used else "on every device"
    return "; ".join([*used, f"eager: plain ATen operators, {eager_on}", *unused])


def _chosen(*tensors: Tensor | None) -> Any:
    """Return the kernels for these tensors."""
    for door in (cpu, cuda):
        if door.takes(*tensors):
            return door.kernels
    return eager


def _chosen_for_map(p: Tensor, v: Tensor) -> Any:
    """Only the eager kernels broadcast and promote."""
    return _chosen(p, v) if p.shape == v.shape and p.dtype == v.dtype else eager


def _chosen_for_rows(problem: Problem, rows: Rows) -> Any:
    """Only the eager kernels have the entropy's gradient."""
    return eager if rows.e is not None else _chosen(*problem.tensors, rows.g, rows.q)


def softmax(z: Tensor, dim: int) -> Tensor:
    """p = exp(z − M) / Σ exp(z − M)."""
    return _chosen(z).softmax(z, dim)


def log_softmax(z: Tensor, dim: int) -> Tensor:
    """log p = (z − M) − L."""
    return _chosen(z).log_softmax(z, dim)


def contract(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """J v = vᵀJ = p ⊙ (v − ⟨p, v⟩): the contraction with J = diag(p) − p pᵀ in O(C)."""
    return _chosen_for_map(p, v).contract(p, v, dim)


def log_softmax_vjp(y: Tensor, v: Tensor, dim: int) -> Tensor:
    """v − p Σ_k v_k, with p = exp(y)."""
    return _chosen_for_map(y, v).log_softmax_vjp(y, v, dim)


def log_softmax_jvp(y: Tensor, v: Tensor, dim: int) -> Tensor:
    """v − ⟨p, v⟩, with p = exp(y)."""
    return _chosen_for_map(y, v).log_softmax_jvp(y, v, dim)


def cross_entropy(problem: Problem) -> Found:
    """Return ℓ, M and L of each row, and with `stats` the prediction and the entropy."""
    return _chosen(*problem.tensors).cross_entropy(problem)


def cross_entropy_vjp(problem: Problem, rows: Rows) -> Tensor:
    """Return z' ⊙ (a·p − g·ỹ), 0 in an ignored row."""
    return _chosen_for_rows(problem, rows).cross_entropy_vjp(problem, rows)


def cross_entropy_vjp_(problem: Problem, rows: Rows) -> Tensor:
    """Write `cross_entropy_vjp` over the input, whose version is raised, and return it detached."""
    return _chosen_for_rows(problem, rows).cross_entropy_vjp_(problem, rows)


def cross_entropy_vjp_out(problem: Problem, rows: Rows, out: Tensor) -> None:
    """Write `cross_entropy_vjp` into `out`, both (rows, classes), where nothing watches."""
    _chosen_for_rows(problem, rows).cross_entropy_vjp_out(problem, rows, out)


def takes_hvp(*tensors: Tensor | None) -> bool:
    """Whether `cross_entropy_hvp_` can answer: plain ATen has no form of it in place."""
    return _chosen(*tensors) is not eager


def cross_entropy_hvp_(problem: Problem, u: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Put dz in the place of z and H u in that of u; return ∂⟨u, dz⟩ over ∂g and ∂q.

    H u is ∂⟨u, dz⟩/∂z. The classes last, the logits without cap and scale, and all of it where
    `takes_hvp`.
    """
    return _chosen(*problem.tensors, u, rows.g, rows.q).cross_entropy_hvp_(problem, u, rows)


def total(x: Tensor) -> Tensor:
    """Σ x, 0-d; the C++ kernel adds in one order, however many threads there are."""
    return _chosen(x).total(x)
