"""What every launch needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton.language as tl
from torch import Tensor

__all__ = ["ACCUMULATORS", "on_device"]

ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}


def on_device(x: Tensor) -> AbstractContextManager:
    """The device of x as the current one, where Triton launches."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
