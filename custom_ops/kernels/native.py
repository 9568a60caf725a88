"""The C++ kernels for the CPU (`cpu/`), where they were built.

They answer where nothing is differentiated: in the forward of a Function, and in a backward that is
not differentiated itself. Where a mode or a tracer sees the operators, they are called as
torch.ops.custom_ops, whose derivatives are registered in `custom_ops.derivatives`; elsewhere
directly, which spares the dispatcher.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from custom_ops.kernels import built, fakes
from custom_ops.kernels.labels import checked_labels
from custom_ops.kernels.options import Options
from custom_ops.kernels.plain import is_plain
from custom_ops.kernels.warning import warn_once
from custom_ops.surroundings import is_watched

__all__ = [
    "add_product_",
    "advise_huge_pages",
    "capability",
    "contract",
    "cross_entropy",
    "cross_entropy_hvp_",
    "cross_entropy_vjp",
    "cross_entropy_vjp_",
    "library",
    "log_softmax",
    "log_softmax_jvp",
    "log_softmax_vjp",
    "missing",
    "softmax",
    "takes",
    "total",
]

capability = torch.backends.cpu.get_cpu_capability()


def _load() -> tuple[ModuleType | None, str, str]:
    """Return the library for the vector set that torch uses here, or why there is none.

    The last is what to warn of at the first use: kernels that are there and cannot be used.
    """
    found = built.find(built.read(), torch.__version__, capability)
    library, missing, unusable = None, found.missing, found.unusable
    if found.name:
        try:
            library = importlib.import_module(f"custom_ops.kernels.{found.name}")
        except ImportError as error:
            missing, unusable = f"they cannot be loaded ({error}): {built.REINSTALL}", True
    return library, missing, f"no C++ kernels: {missing}" if unusable else ""


library, missing, _warning = _load()


def takes(*tensors: Tensor | None) -> bool:
    """Whether the C++ kernels can answer for these: plain CPU tensors, not differentiated here."""
    if library is None:
        warn_once(_warning)
        return False
    return all(t is None or is_plain(t, "cpu") for t in tensors)


def _operators() -> Any:
    """The kernels as functions; where somebody watches the operators, as torch knows them."""
    return torch.ops.custom_ops if library is None or is_watched() else library.direct


def softmax(z: Tensor, dim: int) -> Tensor:
    """p = exp(z − M) / Σ exp(z − M)."""
    return _operators().softmax(z, dim, False)


def log_softmax(z: Tensor, dim: int) -> Tensor:
    """log p = (z − M) − L."""
    return _operators().softmax(z, dim, True)


def contract(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """J v = vᵀJ = p ⊙ (v − ⟨p, v⟩)."""
    return _operators().contract(p, v, dim)


def log_softmax_vjp(y: Tensor, v: Tensor, dim: int) -> Tensor:
    """v − p Σ_k v_k, with p = exp(y)."""
    return _operators().log_softmax_vjp(y, v, dim)


def log_softmax_jvp(y: Tensor, v: Tensor, dim: int) -> Tensor:
    """v − ⟨p, v⟩, with p = exp(y)."""
    return _operators().log_softmax_jvp(y, v, dim)


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, o: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return ℓ, M, L and the prediction (None unless it is wanted), as `eager.cross_entropy`."""
    if not (target.is_floating_point() or target.dtype == torch.int64):
        target = checked_labels(target, input.shape[o.dim], o.ignore_index)
    loss, M, L, prediction = _operators().cross_entropy(
        _readable(input, o), _readable(target, o), weight, o.dim, o.dtype, *o.numbers, o.predict
    )
    return loss, M, L, prediction if o.predict else None


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
    """Return z'(x) ⊙ (a·p − g·ỹ), as `eager.cross_entropy_vjp`."""
    tensors = _readable(input, o), _readable(target, o), weight, g, h, M, L
    return _operators().cross_entropy_vjp(*tensors, o.dim, *o.numbers).to(input.dtype)


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
    """Write `cross_entropy_vjp` over the input, and return it."""
    logits = input.detach()
    if _readable(logits, o) is not logits:
        return logits.copy_(cross_entropy_vjp(logits, target, weight, g, h, M, L, o))
    tensors = logits, _readable(target, o), weight, g, h, M, L
    _operators().cross_entropy_vjp_(*tensors, o.dim, *o.numbers)
    return logits


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
    """Put dz in the place of z and ∂⟨u, dz⟩/∂z in that of u; return ∂⟨u, dz⟩ over ∂g and ∂h."""
    tensors = z, _readable(target, o), weight, u, g, h, M, L
    return _operators().cross_entropy_hvp_(*tensors, *o.numbers[:3])


def total(x: Tensor) -> Tensor:
    """Σ x, 0-d."""
    return _operators().total(x)


def add_product_(total: Tensor, dz: Tensor, x: Tensor) -> bool:
    """Add dzᵀ x, products of bfloat16 numbers, in float32; return False where it cannot be done."""
    if library is None or not library.has_bf16_products or dz.dtype != torch.bfloat16:
        return False
    if not takes(total, dz, x):
        return False
    library.add_product(total, dz.contiguous(), x.contiguous())
    return True


def advise_huge_pages(fresh: Tensor) -> None:
    """Ask for huge pages under `fresh` before its first touch."""
    assert library is not None
    library.advise_huge_pages(fresh)


def _readable(x: Tensor, o: Options) -> Tensor:
    """x in a type that the kernels for o.dtype read: itself, and for float32 the half types."""
    if not x.is_floating_point():
        return x.to(torch.int64)
    half = o.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)
    return x if half else x.to(o.dtype)


if library is not None:
    fakes.register("custom_ops")
