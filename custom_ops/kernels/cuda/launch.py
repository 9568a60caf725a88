"""What every launch needs, and a short way to one that is like an earlier."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.layout import units
from custom_ops.kernels.cuda.tiles import Tiles, power_of_two

__all__ = ["ACCUMULATORS", "launch", "on_device", "tile_of"]

ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}

#: Compiled kernels by all that a launch consists of, but for the memory of its tensors.
_launched: dict[tuple[Any, ...], Any] = {}
MOST = 4096


def launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: dict[str, Any],
) -> None:
    """kernel[programs](*tensors, *numbers, …), on the current device.

    The first tensor is there; of the constants a kernel takes those that it has parameters for.
    Triton looks at every argument to find what it has compiled, and takes longer for it than to
    launch: at MNIST's batch that is most of a step. What it looks at are the numbers, and of a
    tensor the type and whether its memory begins at a multiple of 16; where all of these are those
    of an earlier launch, so is the kernel.
    """
    names = kernel.arg_names[len(tensors) + len(numbers) :]
    tail = tuple([constants[name] for name in names])
    warps, device = constants["num_warps"], tensors[0].device  # type: ignore[union-attr]
    looked_at = [None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
    key = (kernel, device, warps, numbers, tail, *looked_at)
    compiled = _launched.get(key)
    if compiled is None:
        if len(_launched) >= MOST:
            _launched.clear()
        # Triton's interpreter has nothing to keep
        _launched[key] = kernel[(programs,)](*tensors, *numbers, *tail, num_warps=warps)
    else:
        compiled[programs, 1, 1](*tensors, *numbers, *tail)


def on_device(x: Tensor) -> AbstractContextManager:
    """The device of x as the current one, where Triton launches."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def tile_of(sizes: tuple[int, int, int, int], t: Tiles) -> dict[str, Any]:
    """What a kernel over tiles is compiled for; the sizes are those of the view."""
    return {
        "ROWS": t.rows,
        "BLOCK": t.classes,
        "UNITS": units(*sizes),
        "CHUNKS": power_of_two(t.chunks),
        "num_warps": t.warps,
    }
