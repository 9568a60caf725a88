"""What torch's autocast does to the built-in softmax and cross-entropy, done to ours."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "in_autocast"]


def in_autocast(input: Tensor) -> bool:
    """Whether autocast is on for the device of `input` and takes its dtype."""
    device = input.device.type
    return (
        input.dtype in (torch.float16, torch.bfloat16)
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    )


def autocast_dtype(input: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that a softmax takes: `dtype` if given, else float32 where autocast says so.

    On the CPU, autocast leaves softmax and log-softmax as they are; elsewhere it widens them.
    """
    if dtype is None and input.device.type != "cpu" and in_autocast(input):
        return torch.float32
    return dtype
