"""The last layer as operators of torch: what Dynamo and export see instead of the loop over blocks.

Their arguments are numbers and tensors, so `Options` and `Blocks` come apart and together here. In
export the operator stays in the program, and its autograd formula with it; elsewhere the
Functions of `custom_ops.linear_cross_entropy` differentiate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops.kernels import last_layer
from custom_ops.kernels.last_layer import Blocks, Outputs, Products
from custom_ops.kernels.options import Options, statistics_dtype

__all__ = ["linear_cross_entropy", "linear_cross_entropy_vjp"]


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
        blocks.wanted,
        blocks.rows,
    )
    return Outputs(
        loss, M, L, prediction if o.predict else None, _wanted_of(products, blocks.wanted)
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
    tensors = x, W, b, target, weight, g, h, M, L
    products = torch.ops.custom_ops.linear_cross_entropy_vjp(
        *tensors, o.dtype, *o.numbers, blocks.wanted, blocks.rows
    )
    return _wanted_of(products, blocks.wanted)


def _options(
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    predict: bool,
) -> Options:
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


def _wanted_of(products: Sequence[Tensor], wanted: Sequence[bool]) -> Products:
    return Products(*(t if w else None for t, w in zip(products, wanted, strict=True)))


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns tensors; one that is not wanted is empty."""
    return like.new_empty(0) if t is None else t


@torch.library.custom_op("custom_ops::linear_cross_entropy", mutates_args=())
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
    wanted: Sequence[bool],
    block_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    o = _options(dtype, ignore_index, label_smoothing, z_loss, logit_scale, softcap, predict)
    blocks = Blocks(total, tuple(wanted), block_rows)  # type: ignore[arg-type]
    with torch.no_grad():
        loss, M, L, prediction, products = last_layer.linear_cross_entropy(
            input, linear_weight, linear_bias, target, weight, o, blocks
        )
    dx, dW, db = (_or_empty(t, M) for t in products)
    prediction = target.new_empty(0, dtype=torch.int64) if prediction is None else prediction
    return loss, M, L, prediction, dx, dW, db


@_op.register_fake
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


@torch.library.custom_op("custom_ops::linear_cross_entropy_vjp", mutates_args=())
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
    wanted: Sequence[bool],
    block_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    o = _options(dtype, ignore_index, label_smoothing, z_loss, logit_scale, softcap, False)
    blocks = Blocks(False, tuple(wanted), block_rows)  # type: ignore[arg-type]
    tensors = input, linear_weight, linear_bias, target, weight, g, h, M, L
    with torch.no_grad():
        products = last_layer.linear_cross_entropy_vjp(*tensors, o, blocks)
    dx, dW, db = (_or_empty(t, M) for t in products)
    return dx, dW, db


@_vjp_op.register_fake
def _(input, linear_weight, linear_bias, *rest):  # type: ignore[no-untyped-def]
    M, wanted, sums = rest[5], rest[-2], statistics_dtype(input.dtype)
    return tuple(
        t.new_empty(t.shape, dtype=sums) if w and t is not None else M.new_empty(0)
        for t, w in zip((input, linear_weight, linear_bias), wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, dtype, ignore_index, eps, z_loss, scale, cap = inputs[:11]
    ctx.numbers = dtype, ignore_index, eps, z_loss, scale, cap
    ctx.rows = inputs[-1]
    _, M, L, *_ = output
    ctx.save_for_backward(*tensors, M, L)


def _backward(ctx: Any, g: Tensor, _: Tensor, h: Tensor, *__: Tensor) -> tuple[Any, ...]:
    x, W, b, target, weight, M, L = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if any(needs[3:5]):
        raise NotImplementedError(
            "an exported linear_cross_entropy has gradients for input, linear_weight and "
            "linear_bias; probabilities and class weights that require grad were given"
        )
    tensors = x, W, b, target, weight, g.expand(L.shape), h, M, L
    products = torch.ops.custom_ops.linear_cross_entropy_vjp(
        *tensors, *ctx.numbers, needs[:3], ctx.rows
    )
    wanted = _wanted_of(products, needs[:3])
    return *(None if t is None else t.to(x.dtype) for t in wanted), *[None] * 12


_op.register_autograd(_backward, setup_context=_setup_context)
