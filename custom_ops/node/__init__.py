"""The short way of a plain call: an autograd node in C++, without Python's frames.

A node does what a Function does, with the same kernels and to the same bits; at MNIST's batch the
frames are most of the time. What it takes is an allow-list (`plain.h`, `plan.h`): tensors of
torch's own class on the CPU, dense and strided, with no transform, mode or forward derivative
around them; options that are Python's own numbers and in range; only the input differentiated.
It declines everything else by returning None, wrong arguments too, so that the checks and their
sentences stand in Python alone. A backward that is differentiated or batched uses the Function's
formulas.

On a GPU the nodes launch the Triton kernels themselves (`launches.h`), as Python launched them for
an earlier call of the same kind (`launcher.py`). There Σℓ is added up from the sums of the kernel's
programs and not from the rows, so that it may differ from the Function's in the last bit.

What stands twice, here and in the Functions, is held together row by row by
tests/kernels/test_native.py: promotion and autocast (`read_dtypes`), the mean's denominator
(`mean_rows`), and the bits of loss and gradient. The sentence of a bad label is C++'s and
`kernels.labels`'s; the same test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops.kernels import cpu, cuda

__all__ = ["node", "set_vjp"]


def node(name: str, *args: Any) -> Any:
    """Return the node's answer, or None where it declines."""
    if cpu.library is None or torch.compiler.is_compiling():
        return None
    return getattr(cpu.library, name)(*args)


def set_vjp(name: str, vjp: Callable[..., Tensor]) -> None:
    """Give the node the function for a backward that is differentiated or batched."""
    if cpu.library is not None:
        cpu.library.set_vjp(name, vjp)


def _launch_for_node() -> None:
    from custom_ops.node.launcher import FUNCTIONS

    if cpu.library is not None:
        cpu.library.set_launcher(cuda.device, FUNCTIONS)
        cuda.set_launched(cpu.library.launched)


cuda.when_running(_launch_for_node)
