"""The last layer as operators of torch, in place of the loop over blocks.

Dynamo, export, tracers and modes that keep the operators' results see these. Their derivatives are
registered in `custom_ops.derivatives`. What was not wanted comes as an empty tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from custom_ops.kernels import Found, Rows
from custom_ops.kernels.expect import expect
from custom_ops.kernels.problem import SCHEMA, Options, statistics_dtype
from custom_ops.last_layer import flops, loop
from custom_ops.last_layer.layer import Blocks, Layer, Products
from custom_ops.last_layer.loop import Pass

__all__ = ["backward", "forward", "layer_of", "layer_of_vjp", "wanted_of"]

_LAYER = "Tensor x, Tensor W, Tensor? b, Tensor target, Tensor? weight"
_BLOCKS = "bool total, int[] wanted, int? rows, int? memory=None"


def forward(layer: Layer) -> Pass:
    """Return what `loop.forward` does, through the operator."""
    flops.register()
    o, blocks = layer.options, replace(layer.blocks, wanted=layer.blocks.of_total)
    loss, M, L, prediction, H, *products = torch.ops.custom_ops.linear_cross_entropy(
        *layer.tensors, *o.flat(), o.stats, *_flat(blocks)
    )
    found = Found(loss, M, L, *((prediction, H) if o.stats else (None, None)))
    return Pass(found, wanted_of(products, blocks))


def backward(layer: Layer, rows: Rows) -> Products:
    """Return what `loop.backward` does, through the operator."""
    flops.register()
    products = torch.ops.custom_ops.linear_cross_entropy_vjp(
        *layer.tensors, *rows, *layer.options.flat(), *_flat(layer.blocks)
    )
    return wanted_of(products, layer.blocks)


def _flat(blocks: Blocks) -> tuple[bool, list[int], int | None, int | None]:
    return blocks.total, [*map(int, blocks.wanted)], blocks.rows, blocks.memory


def layer_of(args: Sequence[Any]) -> Layer:
    """Return the layer whose tensors, options and blocks the forward's operator was given."""
    return _layer(args[:5], args[5:10], args[10:])


def layer_of_vjp(args: Sequence[Any]) -> Layer:
    """Return the layer that the backward's operator was given, beside the numbers of the rows."""
    return _layer(args[:5], args[10:14], args[14:])


def _layer(tensors: Sequence[Any], options: Sequence[Any], blocks: Sequence[Any]) -> Layer:
    total, wanted, rows, *rest = blocks
    wants_x, wants_W, wants_b = map(bool, wanted)
    memory = rest[0] if rest else None  # torch leaves an argument out that is its default
    # what the forward's operator is asked for, it leaves for the backward
    given = Blocks(total, (wants_x, wants_W, wants_b), rows, memory, keeps=True)
    return Layer.of(tensors, Options.of(*options), given)


def wanted_of(products: Sequence[Tensor], blocks: Blocks) -> Products:
    """Return the products that were wanted."""
    return Products(*(t if w else None for t, w in zip(products, blocks.wanted, strict=True)))


torch.library.define(
    "custom_ops::linear_cross_entropy",
    f"({_LAYER}, {SCHEMA}, bool stats, {_BLOCKS}) -> ({', '.join(['Tensor'] * 8)})",
)
torch.library.define(
    "custom_ops::linear_cross_entropy_vjp",
    f"({_LAYER}, Tensor g, Tensor? q, Tensor M, Tensor L, Tensor? e, {SCHEMA}, {_BLOCKS}) -> "
    "(Tensor, Tensor, Tensor)",
)


@torch.library.impl("custom_ops::linear_cross_entropy", "CompositeExplicitAutograd")
def _forward(*args: Any) -> tuple[Tensor, ...]:
    layer = layer_of(args)
    _check(layer)
    with torch.no_grad():
        (loss, M, L, prediction, H), products, _ = loop.forward(layer)
    labels = M.new_empty(0, dtype=torch.int64)
    return (
        *(loss, M, L, labels if prediction is None else prediction, _or_empty(H, M)),
        *(_or_empty(t, M) for t in products),
    )


@torch.library.register_fake("custom_ops::linear_cross_entropy")
def _(*args: Any) -> tuple[Tensor, ...]:
    layer = layer_of(args)
    N, o = layer.x.shape[0], layer.options
    of_stats = N if o.stats else 0
    rows = [layer.x.new_empty(n, dtype=o.dtype) for n in (N, N, of_stats)]
    loss = layer.x.new_empty(() if layer.blocks.total else N, dtype=o.dtype)
    prediction = layer.x.new_empty(of_stats, dtype=torch.int64)
    return loss, *rows[:2], prediction, rows[2], *_fake_products(layer)


@torch.library.impl("custom_ops::linear_cross_entropy_vjp", "CompositeExplicitAutograd")
def _backward(*args: Any) -> tuple[Tensor, ...]:
    layer, rows = layer_of_vjp(args), Rows(*args[5:10])
    _check(layer)
    for name, t in rows._asdict().items():
        if t is not None:
            expect(name, t, layer.x.shape[:1], layer.options.dtype, layer.x)
    with torch.no_grad():
        products = loop.backward(layer, rows)
    return tuple(_or_empty(t, rows.M) for t in products)


@torch.library.register_fake("custom_ops::linear_cross_entropy_vjp")
def _(*args: Any) -> tuple[Tensor, ...]:
    return tuple(_fake_products(layer_of_vjp(args)))


def _fake_products(layer: Layer) -> list[Tensor]:
    dtype = statistics_dtype(layer.x.dtype)
    return [
        layer.x.new_empty(t.shape if w and t is not None else 0, dtype=dtype)
        for t, w in zip(layer[:3], layer.blocks.wanted, strict=True)
    ]


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


def _check(layer: Layer) -> None:
    """Raise unless the shapes fit: a saved graph may be run with other tensors than its own."""
    x, W, b, target, weight, o, _ = layer
    if x.dim() != 2 or W.dim() != 2 or x.shape[1] != W.shape[1]:
        raise ValueError(
            f"x must be (N, D) and W (C, D), got shapes {tuple(x.shape)} and {tuple(W.shape)}"
        )
    (N, _), (C, _) = x.shape, W.shape
    expect("W", W, W.shape, x.dtype, x)
    expect("target", target, (N, C) if target.is_floating_point() else (N,), target.dtype, x)
    if b is not None:
        expect("b", b, (C,), x.dtype, x)
    if weight is not None:
        expect("weight", weight, (C,), o.dtype, x)
