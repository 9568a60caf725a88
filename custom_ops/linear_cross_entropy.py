"""The last layer in one piece: logits, loss and gradients of W, a part of the logits at a time.

    ∂C/∂W_ij = Σ_k Σ_s ∂C/∂p_k · J_ks · ∂z_s/∂W_ij        with z = x Wᵀ + b

is a statement about weights, softmax and loss together. With dz = ∂Σ g ℓ/∂z of the rows, from
`custom_ops.cross_entropy`,

    dx = dz W        dW = dzᵀ x        db = Σ_r dz_r

and for cotangents (v_x, v_W, v_b) of these, or tangents of (x, W, b), which are the same as the
Hessian is symmetric: with u = v_x Wᵀ + x v_Wᵀ + v_b and H u = ∂⟨u, dz⟩/∂z, which is g·(m·J u) and
what z-loss and cap add,

    H_x = H u W + dz v_W      H_W = (H u)ᵀ x + dzᵀ v_x    H_b = Σ_r (H u)_r

Each is a sum over rows or stays with its row or its class, so that logits, probabilities and their
gradients exist for a block of rows, or a slab of classes, at a time and never as N × C numbers.
Which, and what is kept for the backward, follows from the memory that may be used
(`custom_ops.last_layer.plan`).

Sources: the blocks, Hsu et al. (2024, "Liger Kernel") and Wijmans et al. (2024, "Cut your losses in
large-vocabulary language models"); the product with the Hessian, Pearlmutter (1994).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from custom_ops import sharded
from custom_ops.apply import apply
from custom_ops.autocast import autocast_linear, autocast_widened
from custom_ops.checks import (
    check_class_weight,
    check_dense,
    check_dtype,
    check_input,
    check_label_dtype,
    check_label_weight,
    check_normalizer,
    check_probabilities,
    checked_numbers,
)
from custom_ops.cross_entropy import CrossEntropyStats, LossAndStats, promoted
from custom_ops.kernels import Options, statistics_dtype
from custom_ops.kernels.labels import checked_labels
from custom_ops.last_layer import operators
from custom_ops.last_layer.checks import check_blocks, check_linear, chosen_ignore_index
from custom_ops.last_layer.functions import LinearCrossEntropyFunction
from custom_ops.last_layer.layer import Blocks, Layer
from custom_ops.reduction import denominator
from custom_ops.surroundings import (
    is_exporting,
    is_onnx_tracing,
    is_saved_as_it_is,
    is_transformed,
    is_watched,
)

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: float | Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    block_rows: int | None = None,
    return_stats: bool = False,
) -> LossAndStats:
    """Return cross_entropy(input @ linear_weight.T + linear_bias, target) without the N × C logits.

        ℓ = Σ_k ỹ_k (lse − z_k) + z_loss · lse²,   z = s·tanh(logit_scale · (W x + b) / s)

    Names and order are those of torch.nn.functional.linear_cross_entropy; what it computes, with
    every option, is `custom_ops.cross_entropy` of the logits. These exist a part at a time, within
    the `memory` that is named. Every derivative of any order is exact, and double backward,
    Hessian-vector products and forward mode go by blocks as well.

    Args:
        input: what the last layer gets, (D), (N, D) or (B, …, D); float64, float32, bfloat16 or
            float16.
        linear_weight: W, (C, D), in the dtype of `input`. (C, d1, …, dk, D) with an `input` (N, D)
            is a layer for each of d1 × … × dk positions, as in torch.
        target: labels in 0 … C − 1, in the shape of `input` without D, of any integer dtype; or
            class probabilities, (…, C), to which the gradient flows too. With positions, (N, d1,
            …, dk) or (N, C, d1, …, dk).
        linear_bias: b, (C) or (C, d1, …, dk), or None.
        weight: the class weights, (C).
        reduction: "none", "sum" or "mean", as in `cross_entropy`.
        ignore_index: a label whose rows are left out of everything; −100 if None. Not with
            probabilities.
        label_smoothing: ε in [0, 1].
        options: torch's LinearCrossEntropyOptions. Its chunk size is taken as the rows of a block;
            its other fields choose between roundings that do not occur here.
        z_loss: λ ≥ 0; adds λ·lse² to the loss of a row.
        softcap: s > 0; caps the logits smoothly to (−s, s).
        logit_scale: α; multiplies W x + b, before the cap.
        normalizer: replaces the denominator of the mean, as in `cross_entropy`.
        dtype: of the loss.
        memory: bytes beyond the gradients, between forward and backward too; with too few for
            anything, the least that is possible. The fastest order within them is chosen. None is
            50 MiB or the logits of 64 rows, on CUDA 512 MiB, the logits of 256 rows or the
            gradients' own size, whichever is more.
            The answer depends on it only by the order in which dW or dx is added up. A half type
            on a CPU, and a graph that torch.compile makes, take blocks of rows whatever is named,
            and add dx and dW up in float32.
        block_rows: in place of the memory, the rows of a block.
        return_stats: whether to return (loss, stats): the rows' `lse`, `prediction` and `entropy`.

    Returns:
        The loss: 0-d, or for "none" in the shape of the labels. With return_stats=True, (loss,
        stats), where stats is a `CrossEntropyStats` in the shape of the labels.

    Raises:
        IndexError: a label out of range (on the CPU; elsewhere the loss of that row is NaN, and on
            CUDA a later call raises).
        ValueError: an option or a shape that cannot be used (also a RuntimeError, as in torch).
        NotImplementedError: the input is not of a floating-point type.
        TypeError: not a tensor.

    >>> x, W = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> linear_cross_entropy(x, W, torch.tensor([0, 1]), reduction="none")
    tensor([0.1269, 0.6931])
    """
    check_input("linear_cross_entropy", input, None)
    check_dense("linear_cross_entropy", input)
    check_dtype("linear_cross_entropy", dtype)
    rows_shape, soft = check_linear(input, linear_weight, linear_bias, target)
    index = chosen_ignore_index(ignore_index, soft)
    check_normalizer(normalizer, reduction)
    rows, memory = check_blocks(memory, block_rows, options)
    numbers: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    numbers |= {"softcap": softcap, "logit_scale": logit_scale}
    if sharded.is_sharded(input, linear_weight, target, linear_bias, weight):
        numbers |= {"reduction": reduction, "ignore_index": ignore_index, "normalizer": normalizer}
        return sharded.linear_cross_entropy(
            linear_cross_entropy,
            (input, linear_weight, target, linear_bias, weight),
            **numbers,
            dtype=dtype or promoted(*autocast_widened(input, target, weight)),
            memory=memory,
            block_rows=rows,
            return_stats=return_stats,
        )
    C = linear_weight.shape[0]
    (check_probabilities if soft else check_label_dtype)(target)
    check_class_weight(input, C, weight)

    input, linear_weight = autocast_linear(input), autocast_linear(linear_weight)
    linear_bias = None if linear_bias is None else autocast_linear(linear_bias)
    input_dtype, target, weight = autocast_widened(input, target, weight)
    result_dtype = dtype or promoted(input_dtype, target, weight)
    numbers = checked_numbers(reduction, **numbers)
    o = Options(1, statistics_dtype(result_dtype), index, **numbers, stats=bool(return_stats))
    positions = rows_shape[1:] if linear_weight.dim() > 2 else ()
    if soft:
        target = _as_rows(target.flatten(2).movedim(1, -1) if positions else target)
    else:
        target = checked_labels(target, C, index).reshape(-1)
        check_label_weight(input_dtype, weight, result_dtype)
    weight = None if weight is None else weight.to(o.dtype)
    blocks = Blocks(reduction != "none", rows=rows, memory=memory)
    layer = Layer(_as_rows(input), linear_weight, linear_bias, target, weight, o, blocks)
    loss, M, L, *stats = _of_positions(layer, positions)
    if reduction == "mean":
        loss = loss / denominator(C, target, weight, o, normalizer)
    loss = loss.to(result_dtype) if blocks.total else loss.reshape(rows_shape).to(result_dtype)
    if not return_stats:
        return loss
    return loss, CrossEntropyStats(*(t.reshape(rows_shape) for t in (M + L, *stats)))


def _of_positions(layer: Layer, positions: tuple[int, ...]) -> list[Any]:
    """Return ℓ or Σℓ and the rows' statistics, of all positions together."""
    parts = (_pass(part, alone=not positions) for part in _layers(layer, positions))
    columns = list(zip(*parts, strict=True))
    if not positions:
        return [column[0] for column in columns]
    found = [None if column[0] is None else torch.stack(column, -1) for column in columns]
    if layer.blocks.total and found[0] is not None:
        found[0] = found[0].sum()
    return found


def _as_rows(x: Tensor) -> Tensor:
    """(…, D) as (N, D)."""
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def _layers(layer: Layer, positions: tuple[int, ...]) -> Iterator[Layer]:
    """Yield the layer of every position; of the one there is without positions."""
    if not positions:
        yield layer
        return
    x, W, b, target, *_ = layer
    W, b = W.flatten(1, -2), None if b is None else b.flatten(1)
    if W.shape[1] == 0:  # no row of no layer, so that the gradients are zeros of the right shapes
        none = None if b is None else b.sum(1)
        yield layer._replace(x=x[:0], W=W.sum(1), b=none, target=target[:0])
    for position in range(W.shape[1]):
        yield layer._replace(
            W=W[:, position],
            b=None if b is None else b[:, position],
            target=target[position :: W.shape[1]],
        )


def _pass(layer: Layer, alone: bool) -> tuple[Any, ...]:
    """ℓ or Σℓ and the rows' statistics; the gradient of Σℓ with them, if it will be asked for."""
    if is_exporting() and not is_onnx_tracing():
        # the operator with a formula of its own: of a Function, export keeps the forward alone
        return tuple(operators.forward(layer).found)
    grad = torch.is_grad_enabled()
    x, W, b = (grad and t is not None and t.requires_grad for t in layer[:3])
    plain = not (is_transformed() or is_watched())
    plain = plain and all(t is None or type(t) in (Tensor, Parameter) for t in layer.tensors)
    # A hook that looks at what is saved gets no logits and no gradients: it may carry them away, or
    # compare what a checkpoint saves in one order and in another. Of several layers what is kept
    # would add up, so that these go by rows.
    keeps = torch.compiler.is_compiling() or is_saved_as_it_is()
    blocks = replace(layer.blocks, wanted=(x, W, b), plans=alone and plain, keeps=keeps)
    return apply(LinearCrossEntropyFunction, *layer._replace(blocks=blocks))[:5]
