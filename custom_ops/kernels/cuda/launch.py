"""What every launch needs, and a short way to one that is like an earlier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["launch", "on_device"]

#: Compiled kernels by all that a launch consists of, but for the memory of its tensors.
_launched: dict[tuple[Any, ...], Any] = {}
MOST = 4096


def launch(kernel: Any, programs: int, warps: int, *args: Any) -> None:
    """kernel[programs](*args), on the current device; args[0] is a tensor.

    Triton looks at every argument to find what it has compiled, and takes longer for it than to
    launch: at MNIST's batch that is most of a step. What it looks at are the numbers, and of a
    tensor the type and whether its memory begins at a multiple of 16; where all of these are those
    of an earlier launch, so is the kernel.
    """
    key = (kernel, args[0].device, warps, *_looked_at(args))
    compiled = _launched.get(key)
    if compiled is None:
        if len(_launched) >= MOST:
            _launched.clear()
        # Triton's interpreter has nothing to keep
        _launched[key] = kernel[(programs,)](*args, num_warps=warps)
    else:
        compiled[programs, 1, 1](*args)


def _looked_at(args: tuple[Any, ...]) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg.dtype
            yield arg.data_ptr() % 16 == 0
        elif isinstance(arg, tuple):
            yield from _looked_at(arg)
        else:
            yield arg


def on_device(x: Tensor) -> AbstractContextManager:
    """The device of x as the current one, where Triton launches."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
