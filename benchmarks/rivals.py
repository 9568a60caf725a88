"""Other libraries' kernels for the same ops on a GPU; each takes part where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

LIGER, CCE, QUACK = RIVALS = "liger", "cce", "quack"

#: What is installed to have them.
_DISTRIBUTIONS = {LIGER: "liger-kernel", CCE: "cut-cross-entropy", QUACK: "quack-kernels"}

_LIGER = "liger_kernel.transformers.functional"
_MEAN = {"reduction": "mean"}
#: By op and name: the module, the function, and what makes it compute what torch's does.
_FUNCTIONS: dict[str, dict[str, tuple[str, str, dict[str, Any]]]] = {
    "softmax": {
        LIGER: (_LIGER, "liger_softmax", {}),
        QUACK: ("quack.softmax", "softmax", {}),
    },
    "cross_entropy": {
        LIGER: (_LIGER, "liger_cross_entropy", {}),
        QUACK: ("quack.cross_entropy", "cross_entropy", _MEAN),
    },
    "linear_cross_entropy": {
        # dW added up in float32, as ours is; by default it is in the type of W
        LIGER: (_LIGER, "liger_fused_linear_cross_entropy", {"accum_dtype": torch.float32}),
        CCE: ("cut_cross_entropy", "linear_cross_entropy", {}),
        QUACK: ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", _MEAN),
    },
}


def functions(op: str) -> dict[str, Callable[..., Tensor]]:
    """Return the functions for `op` of those that are there; of logits, or of x, W and labels."""
    found: dict[str, Callable[..., Tensor]] = {}
    for name, (module, function, options) in _FUNCTIONS.get(op, {}).items():
        try:
            found[name] = partial(getattr(importlib.import_module(module), function), **options)
        except (ImportError, AttributeError):
            continue
    return found


def versions() -> dict[str, str]:
    """Return each library's version, or that it is not installed."""
    return {name: _version(distribution) for name, distribution in _DISTRIBUTIONS.items()}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
