"""Which tensors an opaque kernel may answer for: where autograd and torch.func see nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import surroundings

__all__ = ["can_be_read", "is_plain"]


def is_plain(t: Tensor, device: str) -> bool:
    """Whether a kernel on `device` may read `t`, and nothing differentiates it here."""
    if t.device.type != device or (t.requires_grad and torch.is_grad_enabled()):
        return False
    if torch.compiler.is_compiling():
        return surroundings.tracing_levels() == 0 and not surroundings.is_exporting()
    return surroundings.is_plain(t, device)


def can_be_read(t: Tensor) -> bool:
    """Whether Python may ask for a value of `t`: no device is waited for, no tracer sees it."""
    return surroundings.is_plain(t, "cpu") and not surroundings.is_watched()
