"""The only place that knows a device: what the functions above may ask of it, and who answers.

A kernel computes numbers and trusts its arguments; derivatives are the business of the functions
that call it. Where a result is to be differentiated, `eager` answers, whose operators autograd
sees; where it is not, and on the CPU, `native` does if it was built.
"""

from __future__ import annotations

from torch import Tensor

from custom_ops.kernels import eager, native
from custom_ops.kernels.options import Options, statistics_dtype

__all__ = [
    "Options",
    "advised",
    "backend",
    "contract",
    "cross_entropy",
    "cross_entropy_vjp",
    "cross_entropy_vjp_",
    "log_softmax",
    "log_softmax_jvp",
    "log_softmax_vjp",
    "softmax",
    "statistics_dtype",
    "total",
]


def backend() -> str:
    """Return which kernels are in use, in one line."""
    if native.library is None:
        return f"eager: plain ATen operators, on every device; no C++ kernels: {native.missing}"
    return f"C++ ({native.capability}) on the CPU; eager: plain ATen operators, elsewhere"


def softmax(z: Tensor, dim: int) -> Tensor:
    """p = exp(z − M) / Σ exp(z − M)."""
    return (native if native.takes(z) else eager).softmax(z, dim)


def log_softmax(z: Tensor, dim: int) -> Tensor:
    """log p = (z − M) − L."""
    return (native if native.takes(z) else eager).log_softmax(z, dim)


def contract(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """J v = vᵀJ = p ⊙ (v − ⟨p, v⟩): the contraction with J = diag(p) − p pᵀ in O(C)."""
    return (native if _match(p, v) and native.takes(p, v) else eager).contract(p, v, dim)


def log_softmax_vjp(y: Tensor, v: Tensor, dim: int) -> Tensor:
    """v − p Σ_k v_k, with p = exp(y)."""
    return (native if _match(y, v) and native.takes(y, v) else eager).log_softmax_vjp(y, v, dim)


def log_softmax_jvp(y: Tensor, v: Tensor, dim: int) -> Tensor:
    """v − ⟨p, v⟩, with p = exp(y)."""
    return (native if _match(y, v) and native.takes(y, v) else eager).log_softmax_jvp(y, v, dim)


def _match(p: Tensor, v: Tensor) -> bool:
    return p.shape == v.shape and p.dtype == v.dtype


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, o: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return ℓ, M, L and the prediction (None unless it is wanted), one a row."""
    chosen = native if native.takes(input, target, weight) else eager
    return chosen.cross_entropy(input, target, weight, o)


def cross_entropy_vjp(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    M: Tensor,
    L: Tensor,
    o: Options,
) -> Tensor:
    """Return z'(x) ⊙ (a·p − g·ỹ), 0 in an ignored row."""
    chosen = native if native.takes(input, target, weight, g, h) else eager
    return chosen.cross_entropy_vjp(input, target, weight, g, h, M, L, o)


def cross_entropy_vjp_(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    M: Tensor,
    L: Tensor,
    o: Options,
) -> Tensor:
    """Write `cross_entropy_vjp` over the input, whose version is raised, and return it detached."""
    chosen = native if native.takes(input, target, weight, g, h) else eager
    return chosen.cross_entropy_vjp_(input, target, weight, g, h, M, L, o)


def total(x: Tensor) -> Tensor:
    """Σ x, 0-d; the C++ kernel adds in one order, however many threads there are."""
    return (native if native.takes(x) else eager).total(x)


def advised(fresh: Tensor) -> Tensor:
    """Return `fresh`, memory not touched so far, in huge pages where the system gives them."""
    if native.takes(fresh):
        native.advise_huge_pages(fresh)
    return fresh
