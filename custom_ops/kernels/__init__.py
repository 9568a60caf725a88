"""The only place that knows a device: what the functions above may ask of it, and who answers.

A kernel computes numbers and trusts its arguments; derivatives are the business of the functions
that call it. Where a result is to be differentiated, `eager` answers, whose operators autograd
sees; where it is not, `native` does on the CPU if it was built, and `triton` on CUDA if Triton is
there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.kernels import eager, native, products, triton
from custom_ops.kernels.options import Options, statistics_dtype
from custom_ops.surroundings import is_watched

__all__ = [
    "Options",
    "add_product_",
    "advised",
    "backend",
    "contract",
    "cross_entropy",
    "cross_entropy_hvp_",
    "cross_entropy_vjp",
    "cross_entropy_vjp_",
    "log_softmax",
    "log_softmax_jvp",
    "log_softmax_vjp",
    "put_product_",
    "scaled",
    "softmax",
    "statistics_dtype",
    "takes_hvp",
    "total",
]


def backend() -> str:
    """Return which kernels are in use, in one line, and why others are not."""
    used, unused = [], []
    if native.library is not None:
        used.append(f"C++ ({native.capability}) on the CPU")
    else:
        unused.append(f"no C++ kernels: {native.missing}")
    if triton.running() is not None:
        used.append(f"Triton {triton.version} {triton.where}")
    elif triton.missing:
        unused.append(f"no Triton kernels: {triton.missing}")
    eager_on = "elsewhere" if used else "on every device"
    return "; ".join([*used, f"eager: plain ATen operators, {eager_on}", *unused])


def _chosen(*tensors: Tensor | None) -> Any:
    """Return who answers for these tensors."""
    for kernels in (native, triton):
        if kernels.takes(*tensors):
            return kernels
    return eager


def _chosen_for_map(p: Tensor, v: Tensor) -> Any:
    """Only the eager kernels broadcast and promote."""
    return _chosen(p, v) if p.shape == v.shape and p.dtype == v.dtype else eager


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


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, o: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return ℓ, M, L and the prediction (None unless it is wanted), one a row."""
    return _chosen(input, target, weight).cross_entropy(input, target, weight, o)


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
    return _chosen(input, target, weight, g, h).cross_entropy_vjp(
        input, target, weight, g, h, M, L, o
    )


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
    return _chosen(input, target, weight, g, h).cross_entropy_vjp_(
        input, target, weight, g, h, M, L, o
    )


def takes_hvp(*tensors: Tensor | None) -> bool:
    """Whether `cross_entropy_hvp_` can answer: plain ATen has no form of it in place."""
    return _chosen(*tensors) is not eager


def cross_entropy_hvp_(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    u: Tensor,
    g: Tensor,
    h: Tensor | None,
    M: Tensor,
    L: Tensor,
    o: Options,
) -> tuple[Tensor, Tensor]:
    """Put dz in the place of z and ∂⟨u, dz⟩/∂z in that of u; return ∂⟨u, dz⟩ over ∂g and ∂h.

    The classes last, the logits without cap and scale, and all of it where `takes_hvp`.
    """
    return _chosen(z, target, weight, u, g, h).cross_entropy_hvp_(
        z, target, weight, u, g, h, M, L, o
    )


def total(x: Tensor) -> Tensor:
    """Σ x, 0-d; the C++ kernel adds in one order, however many threads there are."""
    return _chosen(x).total(x)


def add_product_(total: Tensor, dz: Tensor, x: Tensor, first: bool = False) -> None:
    """Σ += dzᵀ x, added up in the dtype of the sum; dz and x may be of a half type.

    The `first` product finds memory in Σ that nothing was written to.
    """
    if total.dtype != dz.dtype and products.widens(dz):
        return products.add_wide_(total, dz.t(), x, beta=int(not first))
    if first:
        total.zero_()
    if total.dtype == dz.dtype:
        total.addmm_(dz.t(), x)
    elif not native.add_product_(total, dz, x):
        total.addmm_(dz.t().to(total.dtype), x.to(total.dtype))


def put_product_(out: Tensor, dz: Tensor, W: Tensor, beta: int) -> None:
    """out = β out + dz W; dz and W may be of a half type, to which a CPU rounds their product."""
    if out.dtype == dz.dtype:
        torch.addmm(out, dz, W, beta=beta, out=out)
    elif products.widens(dz):
        products.add_wide_(out, dz, W, beta)
    elif beta:
        out += torch.mm(dz, W)
    else:
        out.copy_(torch.mm(dz, W))


def scaled(product: Tensor, g: Tensor, dtype: torch.dtype, give: bool) -> Tensor:
    """Return g times the product in `dtype`: in its place if it is to be given away."""
    narrower = dtype != product.dtype and not is_watched()
    if narrower and products.widens(product):
        return products.narrowed(product, g, dtype)
    return (product.mul_(g) if give else product * g).to(dtype)


def advised(fresh: Tensor) -> Tensor:
    """Return `fresh`, memory not touched so far, in huge pages where the system gives them."""
    if native.takes(fresh):
        native.advise_huge_pages(fresh)
    return fresh
