"""What stays behind a backward."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from custom_ops.testing.entry import Check
from custom_ops.testing.rows import batch_or_reason, selected
from custom_ops.testing.structure import flatten
from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import Fault

__all__ = ["CHECKS"]


def nothing_kept(subject: Subject) -> str:
    """Inputs and results are freed without the garbage collector once the caller lets go."""
    _used(subject)  # whatever is cached at a first call
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        alive = {name: ref for name, ref in _used(subject).items() if ref() is not None}
        if not alive:
            return "nothing"
        names = ", ".join(alive)
        gc.collect()
        if all(ref() is None for ref in alive.values()):
            raise Fault(
                f"{names} live until the garbage collector runs: the graph holds itself in a "
                "cycle; save results by save_for_backward, not as an attribute of ctx",
                "cycle",
            )
        raise Fault(f"{names} live on after backward: something keeps them", "kept")
    finally:
        if enabled:
            gc.enable()


def _used(subject: Subject) -> dict[str, Any]:
    """Run forward and backward, and return weak references to all that the caller held."""
    inputs = [x * 1 if isinstance(x, Tensor) and x.requires_grad else x for x in subject.fresh()]
    outputs = subject.outputs(*inputs)
    kept, vs = subject.differentiable(outputs)
    if kept:
        torch.autograd.backward(kept, vs)
    named = {subject.names[i]: x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    named |= {f"result {o}": y for o, y in enumerate(outputs)}
    return {name: weakref.ref(x) for name, x in named.items()}


class _Living(TorchFunctionMode):
    """Count the bytes of the tensors that Python code has made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.holders: dict[int, int] = {}
        self.most = 0

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = f(*args, **(kwargs or {}))
        for y in flatten(result)[0]:
            if type(y) is Tensor and y.device.type == "cpu" and y.layout == torch.strided:
                self._hold(y)
        return result

    def _hold(self, y: Tensor) -> None:
        storage = y.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        self.sizes[address] = size
        self.holders[address] = self.holders.get(address, 0) + 1
        self.most = max(self.most, sum(self.sizes.values()))
        weakref.finalize(y, self._drop, address)

    def _drop(self, address: int) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            self.sizes.pop(address, None)


def peak(subject: Subject) -> str:
    """Forward and backward of 1,024 rows hold at most 16 times inputs and results at once.

    Counted are the tensors that Python code makes, not those inside one operator of torch.
    """
    positions = batch_or_reason(subject)
    n = subject.inputs[positions[0]].shape[0]
    many = selected(subject, positions, torch.arange(1024) % n)
    inputs = many.fresh()
    with _Living() as living:
        outputs = [y for y in many.outputs(*inputs) if y.requires_grad]
    for node in {
        y.grad_fn for y in outputs if y.grad_fn is not None
    }:  # the engine's calls do not see the mode around it
        node.register_prehook(lambda _: living.__enter__() and None)
        node.register_hook(lambda *_: living.__exit__(None, None, None))
    if outputs:
        vs = many.cotangents(outputs)
        torch.autograd.grad(outputs, [inputs[i] for i in many.wrt], vs, allow_unused=True)
    size = sum(x.numel() * x.element_size() for x in [*inputs, *outputs] if isinstance(x, Tensor))
    if living.most > 16 * size:
        raise Fault(
            f"forward and backward of 1,024 rows hold {living.most / size:.0f} times the size of "
            "inputs and results; expected at most 16: is a matrix built for each row?",
            "peak",
        )
    return f"{living.most / size:.1f} times inputs and results"


CHECKS = (
    Check("memory", "nothing kept", nothing_kept),
    Check("memory", "peak", peak),
)
