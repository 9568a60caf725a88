"""What torch's autocast does to the built-in softmax and cross-entropy, done to ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from custom_ops.surroundings import autocast_is_available

__all__ = [
    "autocast_dtype",
    "autocast_is_on",
    "autocast_linear",
    "autocast_widened",
    "without_autocast",
]

HALVES = (torch.float16, torch.bfloat16)


def autocast_is_on(input: Tensor) -> bool:
    """Return whether autocast is on for the device of `input`."""
    device = input.device.type
    return autocast_is_available(device) and torch.is_autocast_enabled(device)


def autocast_dtype(input: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that a softmax takes: `dtype` if given, else float32 where autocast says so.

    On the CPU, autocast leaves softmax and log-softmax as they are; elsewhere it widens them.
    """
    if (
        dtype is None
        and input.device.type != "cpu"
        and input.dtype in HALVES
        and autocast_is_on(input)
    ):
        return torch.float32
    return dtype


def autocast_widened(
    input: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[torch.dtype, Tensor, Tensor | None]:
    """Return what cross-entropy takes: the logits' dtype, the target and the class weights.

    On every device, autocast widens the half-precision ones to float32. The logits are not copied
    for it: their statistics are taken in float32 in any case.
    """
    if not autocast_is_on(input):
        return input.dtype, target, weight
    if target.dtype in HALVES:
        target = target.float()
    if weight is not None and weight.dtype in HALVES:
        weight = weight.float()
    return torch.float32 if input.dtype in HALVES else input.dtype, target, weight


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate what takes its tensors as they are, though autocast may be on when it is called.

    A backward can run under another autocast than its forward did: its products would be rounded.
    """

    @wraps(function)
    def exact(*args: Any) -> Any:
        tensor = next((a for a in args if isinstance(a, Tensor)), None)
        if tensor is None or not autocast_is_on(tensor):
            return function(*args)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args)

    return exact


def autocast_linear(tensor: Tensor) -> Tensor:
    """Return a linear layer's input or parameter: under autocast, in the lower precision."""
    if not autocast_is_on(tensor) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
