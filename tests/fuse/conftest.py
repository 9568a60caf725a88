"""A head and its loss, once as they are and once fused: same numbers, and how they came about."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import custom_ops
from custom_ops.fuse.head import Head

CLASSES, FEATURES = 23, 8

#: From a head (or model), the input and the labels to a loss.
Program = Callable[[Any, Tensor, Tensor], Tensor]


def heads(model: nn.Module) -> Iterator[Head]:
    for layer in model.modules():
        yield from (h for h in layer._forward_pre_hooks.values() if isinstance(h, Head))


def fused(model: nn.Module) -> int:
    """How many answers the heads gave without logits."""
    return sum(head.fused for head in heads(model))


def outcome(program: Program, model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The loss and the gradient of the input and of every parameter."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    loss = program(model, x, labels)
    loss.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()} | {"loss": loss, "x": x.grad}
    return {name: t.detach().clone() for name, t in found.items() if t is not None}


@pytest.fixture
def same() -> Callable[..., nn.Module]:
    """Compare a program of the model with the same program of the fused model."""

    def compare(
        program: Program,
        model: nn.Module | None = None,
        head: Any = None,
        *,
        rows: tuple[int, ...] = (3, 5),
        dtype: torch.dtype = torch.float64,
        lazily: bool = True,
        **tolerance: float,
    ) -> nn.Module:
        model = nn.Linear(FEATURES, CLASSES) if model is None else model
        model.to(dtype)
        x = torch.randn(*rows, FEATURES, dtype=dtype)
        labels = torch.randint(CLASSES, rows)
        expected = outcome(program, model, x, labels)
        custom_ops.fuse(model, head)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = outcome(program, model, x, labels)
        torch.testing.assert_close(got, expected, **tolerance)
        if lazily:
            assert fused(model) > 0
            assert not custom_ops.materialized(model)
        return model

    return compare
