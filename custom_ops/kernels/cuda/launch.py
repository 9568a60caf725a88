"""What every launch needs, and a short way to one that is like an earlier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from custom_ops.kernels.cuda.recording import Launch, current

__all__ = ["fresh", "launch", "on_device", "watched"]

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
        compiled = _launched[key] = kernel[(programs,)](*args, num_warps=warps)
    else:
        compiled[programs, 1, 1](*args)
    if (tape := current()) is not None:
        tape.launches.append(Launch(compiled, programs, warps, args))


def _looked_at(args: tuple[Any, ...]) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg.dtype
            yield arg.data_ptr() % 16 == 0
        elif isinstance(arg, tuple):
            yield from _looked_at(arg)
        else:
            yield arg


def fresh(like: Tensor, *sizes: int, dtype: torch.dtype) -> Tensor:
    """Return memory for what a kernel writes, on the device of `like`."""
    made = like.new_empty(sizes, dtype=dtype)
    if (tape := current()) is not None:
        tape.fresh.append(made)
    return made


def watched(record: Tensor) -> Tensor:
    """Return the record of bad labels, which a recorded launch looks at too."""
    if (tape := current()) is not None:
        tape.watched = record
    return record


def on_device(x: Tensor) -> AbstractContextManager:
    """The device of x as the current one, where Triton launches."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
