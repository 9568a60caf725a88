"""Which tensors an opaque kernel may answer for: where autograd and torch.func see nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn import Parameter

__all__ = ["is_plain"]


def is_plain(t: Tensor, device: str) -> bool:
    """Whether `t` is a tensor of torch's own class on `device`, not differentiated here."""
    if t.device.type != device or (t.requires_grad and torch.is_grad_enabled()):
        return False
    if torch.compiler.is_compiling():
        return True
    return (
        type(t) in (Tensor, Parameter)
        and forward_ad._current_level < 0
        and not is_functorch_wrapped_tensor(t)
        and not is_legacy_batchedtensor(t)
        and not t.is_neg()  # such a view's memory holds other numbers
    )
