"""A Function's backward called by hand, with other tensors for those that it saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from custom_ops.testing.source import attribute_tensors, saved_names
from custom_ops.testing.structure import flatten
from custom_ops.testing.subject import Subject

__all__ = ["Backward", "hand_backward"]


class _Context:
    """ctx with its tensors replaced; everything else is the true ctx's."""

    def __init__(self, node: Any, saved: Sequence[Tensor], attributes: dict[str, Tensor]) -> None:
        self._node = node
        self.saved_tensors = tuple(saved)
        self.needs_input_grad = node.needs_input_grad
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)


@dataclass
class Backward:
    """backward(ctx, *v) of one call, as a function of v and of the tensors on ctx."""

    function: type[Function]
    node: Any
    inputs: list[Any]
    outputs: list[Tensor]
    count: int  # so many of `tensors` are saved ones, the others attributes

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that backward can read: saved ones, then ctx's attributes."""
        return [*self.node.saved_tensors, *attribute_tensors(self.node).values()]

    @property
    def names(self) -> list[str]:
        """What the user calls each of `tensors`."""
        saved = saved_names(self.function)
        if len(saved) != self.count:
            saved = [f"saved_tensors[{k}]" for k in range(self.count)]
        return [*saved, *(f"ctx.{k}" for k in attribute_tensors(self.node))]

    def __call__(self, vs: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Return what backward gives for each input of forward."""
        attributes = dict(zip(attribute_tensors(self.node), tensors[self.count :], strict=True))
        ctx = _Context(self.node, tensors[: self.count], attributes)
        method = self.function.backward
        if method is Function.backward:
            method = self.function.vjp
        return list(flatten((method(ctx, *vs),))[0])


def hand_backward(subject: Subject) -> Backward | None:
    """Return the backward of a subject that is a Function by itself."""
    function = subject.written_function()
    if function is None:
        return None
    inputs = subject.fresh()
    outputs = subject.outputs(*inputs)
    node: Any = next((y.grad_fn for y in outputs if y.grad_fn is not None), None)
    if getattr(type(node), "_forward_cls", None) != function:
        return None
    try:
        count = len(node.saved_tensors)
    except RuntimeError:
        return None
    return Backward(function, node, inputs, outputs, count)


def cotangents_of(outputs: Sequence[Tensor], one: int, v: Tensor) -> list[Tensor]:
    """Return `v` for one output and zeros for the others."""
    return [v if o == one else torch.zeros_like(y) for o, y in enumerate(outputs)]
