"""The last layer as operators of torch, in place of the loop over blocks.

Dynamo, export, tracers and modes that keep the operators' results see these. Their
arguments are numbers and tensors, so `Options` and `Blocks` come apart and together here. Their
derivatives are registered in `custom_ops.derivatives`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops.kernels import flops, last_layer
from custom_ops.kernels.expect import expect
from custom_ops.kernels.last_layer import Blocks, Outputs, Products
from custom_ops.kernels.options import Options, statistics_dtype

__all__ = ["blocks", "linear_cross_entropy", "linear_cross_entropy_vjp", "options", "wanted_of"]


def linear_cross_entropy(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    o: Options,
    blocks: Blocks,
) -> Outputs:
    """Return what `last_layer.linear_cross_entropy` does, through the operator."""
    flops.register()
    loss, M, L, prediction, *products = torch.ops.custom_ops.linear_cross_entropy(
        x,
        W,
        b,
        target,
        weight,
        o.dtype,
        *o.numbers,
        o.predict,
        blocks.total,
        [*map(int, blocks.wanted)],
        blocks.rows,
    )
    return Outputs(
        loss, M, L, prediction if o.predict else None, wanted_of(products, blocks.wanted)
    )


def linear_cross_entropy_vjp(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    M: Tensor,
    L: Tensor,
    o: Options,
    blocks: Blocks,
) -> Products:
    """Return what `last_layer.linear_cross_entropy_vjp` does, through the operator."""
    flops.register()
    tensors = x, W, b, target, weight, g, h, M, L
    products = torch.ops.custom_ops.linear_cross_entropy_vjp(
        *tensors, o.dtype, *o.numbers, [*map(int, blocks.wanted)], blocks.rows
    )
    return wanted_of(products, blocks.wanted)


def options(
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    predict: bool,
) -> Options:
    """Return the Options whose numbers an operator was given."""
    return Options(
        dim=1,
        dtype=dtype,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_scale=logit_scale,
        softcap=softcap,
        predict=predict,
        inplace=False,
    )


def blocks(total: bool, wanted: Sequence[int], rows: int | None) -> Blocks:
    """Return the Blocks whose numbers an operator was given."""
    wants_x, wants_W, wants_b = map(bool, wanted)
    return Blocks(total, (wants_x, wants_W, wants_b), rows)


def wanted_of(products: Sequence[Tensor], wanted: Sequence[int]) -> Products:
    """Return the products that were wanted; an operator returns an empty tensor for the others."""
    return Products(*(t if w else None for t, w in zip(products, wanted, strict=True)))


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


_NUMBERS = (
    "ScalarType dtype, int ignore_index, float label_smoothing, float z_loss, float logit_scale, "
    "float? softcap"
)
_LAYER = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight"
torch.library.define(
    "custom_ops::linear_cross_entropy",
    f"({_LAYER}, {_NUMBERS}, bool predict, bool total, int[] wanted, int? block_rows) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "custom_ops::linear_cross_entropy_vjp",
    f"({_LAYER}, Tensor g, Tensor? h, Tensor M, Tensor L, {_NUMBERS}, int[] wanted, "
    "int? block_rows) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("custom_ops::linear_cross_entropy", "CompositeExplicitAutograd")
def _op(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    predict: bool,
    total: bool,
    wanted: Sequence[int],
    block_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(input, linear_weight, linear_bias, target, weight, dtype)
    o = options(dtype, ignore_index, label_smoothing, z_loss, logit_scale, softcap, predict)
    with torch.no_grad():
        loss, M, L, prediction, products = last_layer.linear_cross_entropy(
            *(input, linear_weight, linear_bias, target, weight, o),
            blocks(total, wanted, block_rows),
        )
    dx, dW, db = (_or_empty(t, M) for t in products)
    prediction = target.new_empty(0, dtype=torch.int64) if prediction is None else prediction
    return loss, M, L, prediction, dx, dW, db


@torch.library.register_fake("custom_ops::linear_cross_entropy")
def _(input, linear_weight, linear_bias, target, weight, dtype, *rest):  # type: ignore[no-untyped-def]
    predict, total, wanted, _ = rest[-4:]
    N, sums = input.shape[0], statistics_dtype(input.dtype)
    M, L = input.new_empty(N, dtype=dtype), input.new_empty(N, dtype=dtype)
    loss = input.new_empty(() if total else N, dtype=dtype)
    prediction = input.new_empty(N if predict else 0, dtype=torch.int64)
    products = (
        t.new_empty(t.shape, dtype=sums) if w and t is not None else M.new_empty(0)
        for t, w in zip((input, linear_weight, linear_bias), wanted, strict=True)
    )
    return loss, M, L, prediction, *products


@torch.library.impl("custom_ops::linear_cross_entropy_vjp", "CompositeExplicitAutograd")
def _vjp_op(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    M: Tensor,
    L: Tensor,
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    wanted: Sequence[int],
    block_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(input, linear_weight, linear_bias, target, weight, dtype)
    for name, rows in (("g", g), ("h", h), ("M", M), ("L", L)):
        if rows is not None:
            expect(name, rows, input.shape[:1], dtype, input)
    o = options(dtype, ignore_index, label_smoothing, z_loss, logit_scale, softcap, False)
    tensors = input, linear_weight, linear_bias, target, weight, g, h, M, L
    with torch.no_grad():
        products = last_layer.linear_cross_entropy_vjp(
            *tensors, o, blocks(False, wanted, block_rows)
        )
    dx, dW, db = (_or_empty(t, M) for t in products)
    return dx, dW, db


@torch.library.register_fake("custom_ops::linear_cross_entropy_vjp")
def _(input, linear_weight, linear_bias, *rest):  # type: ignore[no-untyped-def]
    M, wanted, sums = rest[5], rest[-2], statistics_dtype(input.dtype)
    return tuple(
        t.new_empty(t.shape, dtype=sums) if w and t is not None else M.new_empty(0)
        for t, w in zip((input, linear_weight, linear_bias), wanted, strict=True)
    )


def _check(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Raise unless the shapes fit: a saved graph may be run with other tensors than its own."""
    if x.dim() != 2 or W.dim() != 2 or x.shape[1] != W.shape[1]:
        raise ValueError(
            "input must be (N, D) and linear_weight (C, D), got shapes "
            f"{tuple(x.shape)} and {tuple(W.shape)}"
        )
    (N, _), (C, _) = x.shape, W.shape
    expect("linear_weight", W, W.shape, x.dtype, x)
    expect("target", target, (N, C) if target.is_floating_point() else (N,), target.dtype, x)
    if b is not None:
        expect("linear_bias", b, (C,), x.dtype, x)
    if weight is not None:
        expect("weight", weight, (C,), dtype, x)
