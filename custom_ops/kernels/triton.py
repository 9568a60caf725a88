"""The Triton kernels (`cuda/`), where Triton and a CUDA device are there.

They are opaque to autograd and to torch.func, so they answer where nothing is differentiated: in
the forward of a Function, and in a backward that is not differentiated itself. With
TRITON_INTERPRET=1, as the tests without a device run them, they take CPU tensors.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from custom_ops.kernels import eager, native
from custom_ops.kernels.options import Options
from custom_ops.kernels.plain import is_plain
from custom_ops.kernels.warning import warn_once
from custom_ops.surroundings import constant, is_watched

__all__ = [
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
    "running",
    "softmax",
    "takes",
    "total",
    "version",
    "where",
]

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
device, where = ("cpu", "interpreted on the CPU") if interpreted else ("cuda", "on CUDA")
_ABSENT = "Triton is not installed"


def _load() -> tuple[ModuleType | None, str, str]:
    """Return the operators and Triton's version, or why a device here goes without.

    Triton is imported only where there is a device: it takes a second.
    """
    if not interpreted and (torch.version.cuda is None or torch.cuda.device_count() == 0):
        return None, "", ""
    if find_spec("triton") is None:
        return None, "", _ABSENT
    try:
        import triton

        from custom_ops.kernels.cuda import operators
    except Exception as error:  # of any kind: plain ATen operators answer instead
        return None, "", f"Triton cannot be imported ({type(error).__name__}: {error})"
    return operators, triton.__version__, ""


library, version, missing = _load()
# What to warn of at the first use: Triton is there and does not run.
_warning = "" if missing in ("", _ABSENT) else f"no Triton kernels: {missing}"
_tried = interpreted


def running() -> ModuleType | None:
    """Return the operators if Triton can run them, as an empty kernel shows at the first call.

    Without a C compiler, or for a device that is too old, Triton is imported without an error and
    fails at its first launch. The launch starts CUDA, so ask only where a CUDA tensor is there.
    """
    global library, missing, _warning, _tried
    if library is not None and not _tried:
        _tried = True
        try:
            library.launch_nothing()
        except Exception as error:  # of any kind, as above
            missing = f"Triton cannot run here ({type(error).__name__}: {error})"
            library, _warning = None, f"no Triton kernels: {missing}"
        else:
            _hand_to_node()
    return library


@constant
def _runs_or_warns() -> bool:
    if running() is None:
        warn_once(_warning)
    return library is not None


def takes(*tensors: Tensor | None) -> bool:
    """Whether the Triton kernels can answer for these: plain tensors, not differentiated here."""
    if library is None and not _warning:
        return False
    return all(t is None or is_plain(t, device) for t in tensors) and _runs_or_warns()


def _operators() -> Any:
    """The launching functions; where somebody watches the operators, these as torch knows them."""
    return torch.ops.custom_ops_cuda if is_watched() else library


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
    loss, M, L, prediction = _operators().cross_entropy(
        input, target, weight, o.dim, o.dtype, *o.numbers, o.predict
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
    return _operators().cross_entropy_vjp(input, target, weight, g, h, M, L, o.dim, *o.numbers)


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
    logits, operators = input.detach(), _operators()
    operators.cross_entropy_vjp_(logits, target, weight, g, h, M, L, o.dim, *o.numbers)
    if operators is library:  # a kernel launched by hand tells autograd nothing
        torch.autograd.graph.increment_version(logits)
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
    operators = _operators()
    found = operators.cross_entropy_hvp_(z, target, weight, u, g, h, M, L, *o.numbers[:3])
    if operators is library:
        torch.autograd.graph.increment_version([z, u])
    return found


def total(x: Tensor) -> Tensor:
    """Σ x, 0-d: of a batch's rows in one launch, else as torch adds, which is in one order too."""
    if library is None or _operators() is not library:
        return eager.total(x)
    return library.total(x)


def _hand_to_node() -> None:
    """Let the C++ node launch the kernels, which must be known to run."""
    if library is not None and native.library is not None:
        native.library.set_launcher(device, library.FEW, library.forward, library.backward)


if interpreted:
    _hand_to_node()
