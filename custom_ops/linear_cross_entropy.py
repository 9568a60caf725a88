"""The last layer in one piece: logits, loss and gradients of W, a block of rows at a time.

    ∂C/∂W_ij = Σ_k Σ_s ∂C/∂p_k · J_ks · ∂z_s/∂W_ij        with z = x Wᵀ + b

is a statement about weights, softmax and loss together. With dz = ∂Σ g ℓ/∂z of the rows, from
`custom_ops.cross_entropy`,

    dx = dz W        dW = dzᵀ x        db = Σ_r dz_r

and for cotangents (v_x, v_W, v_b) of these, or tangents of (x, W, b), which are the same as the
Hessian is symmetric: with u = v_x Wᵀ + x v_Wᵀ + v_b and r = ∂⟨u, dz⟩/∂z, which is g·(m·J u) and
what z-loss and cap add,

    H_x = r W + dz v_W        H_W = rᵀ x + dzᵀ v_x        H_b = Σ_r r_r

Each is a sum over rows or stays with its row, so that logits, probabilities and their gradients
exist for a block of rows at a time and never as N × C numbers.

The gradient of Σℓ is taken in the forward, while a block's logits are there, if it is going to be
asked for; the backward multiplies it with the upstream gradient. Where that is one number a row,
or lse has a gradient of its own, the backward takes the logits again.

Sources: the blocks, Hsu et al. (2024, "Liger Kernel") and Wijmans et al. (2024, "Cut your losses in
large-vocabulary language models"); the product with the Hessian, Pearlmutter (1994).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from custom_ops import kernels, sharded
from custom_ops.apply import apply, forward_mode_of
from custom_ops.autocast import autocast_linear, autocast_widened, without_autocast
from custom_ops.checks import (
    check_class_weight,
    check_dense,
    check_dtype,
    check_input,
    check_label_dtype,
    check_label_weight,
    check_normalizer,
    check_probabilities,
)
from custom_ops.cross_entropy import CrossEntropyStats, make_options, promoted
from custom_ops.kernels import (
    Options,
    eager,
    last_layer,
    last_layer_ops,
    statistics_dtype,
    targets,
)
from custom_ops.kernels.labels import checked_labels
from custom_ops.kernels.last_layer import Blocks, Products
from custom_ops.last_layer_checks import check_block_rows, check_linear, chosen_ignore_index
from custom_ops.reduction import denominator
from custom_ops.row import Row, blank_ignored
from custom_ops.surroundings import (
    graph_is_kept,
    is_exporting,
    is_known,
    is_onnx_tracing,
    is_watched,
)

__all__ = ["linear_cross_entropy"]

#: What the algebra of a second derivative holds of each logit of a block, at most.
NUMBERS_A_LOGIT = 12
LEAST_ROWS = 8


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = ...,
    *,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    options: Any = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    normalizer: float | Tensor | None = ...,
    dtype: torch.dtype | None = ...,
    block_rows: int | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = ...,
    *,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    options: Any = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    normalizer: float | Tensor | None = ...,
    dtype: torch.dtype | None = ...,
    block_rows: int | None = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, CrossEntropyStats]: ...
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
    block_rows: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """Return cross_entropy(input @ linear_weight.T + linear_bias, target) without the N × C logits.

        ℓ = Σ_k ỹ_k (lse − z_k) + z_loss · lse²,   z = s·tanh(logit_scale · (W x + b) / s)

    Names and order are those of torch.nn.functional.linear_cross_entropy; what it computes, with
    every option, is `custom_ops.cross_entropy` of the logits. Logits and their gradient exist for a
    block of rows at a time: at most 50 MiB (of 64 rows at least), on CUDA 512 MiB (of 256 rows),
    whatever N. Every derivative of any order is exact, and double backward, Hessian-vector products
    and forward mode go by blocks as well.

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
        options: torch's LinearCrossEntropyOptions, of which the size of a chunk is taken for
            `block_rows`; the rest chooses between errors that are not made here.
        z_loss: λ ≥ 0; adds λ·lse² to the loss of a row.
        softcap: s > 0; caps the logits smoothly to (−s, s).
        logit_scale: α; multiplies W x + b, before the cap.
        normalizer: replaces the denominator of the mean, as in `cross_entropy`.
        dtype: of the loss.
        block_rows: rows of a block; None takes as many as its memory holds. The answer depends on
            it only by the order in which the rows of dW are added.
        return_stats: whether to return (loss, stats) with the rows' `lse` and `prediction`.

    Returns:
        The loss: 0-d, or for "none" in the shape of the labels.

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
    rows = check_block_rows(block_rows, options)
    if sharded.is_sharded(input, linear_weight, target, linear_bias, weight):
        return sharded.linear_cross_entropy(
            linear_cross_entropy,
            *(input, linear_weight, target, linear_bias, weight),
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            normalizer=normalizer,
            dtype=dtype or promoted(*autocast_widened(input, target, weight)),
            block_rows=rows,
            return_stats=return_stats,
        )
    C = linear_weight.shape[0]
    (check_probabilities if soft else check_label_dtype)(target)
    if weight is not None:
        check_class_weight(input, C, weight)

    input, linear_weight = autocast_linear(input), autocast_linear(linear_weight)
    linear_bias = None if linear_bias is None else autocast_linear(linear_bias)
    input_dtype, target, weight = autocast_widened(input, target, weight)
    result_dtype = dtype or promoted(input_dtype, target, weight)
    o = make_options(
        1,
        statistics_dtype(result_dtype),
        index,
        reduction,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        return_stats,
        False,
    )
    positions = rows_shape[1:] if linear_weight.dim() > 2 else ()
    if soft:
        target = target.flatten(2).movedim(1, -1) if positions else target
        target = _as_rows(target)
    else:
        target = checked_labels(target, C, index).reshape(-1)
    if not soft:
        check_label_weight(input_dtype, weight, result_dtype)
    if weight is not None:
        weight = weight.to(o.dtype)

    total = reduction != "none"
    layers = _layers(_as_rows(input), linear_weight, linear_bias, target, positions)
    found = [_pass(*layer, weight, o, total, rows) for layer in layers]
    columns = list(zip(*found, strict=True))
    loss, M, L = (torch.stack(column, -1) if positions else column[0] for column in columns[:3])
    if total:
        loss = loss.sum() if positions else loss
        if reduction == "mean":
            loss = loss / denominator(C, target, weight, o, normalizer)
    else:
        loss = loss.reshape(rows_shape)
    loss = loss.to(result_dtype)
    if not return_stats:
        return loss
    prediction = torch.stack(columns[3], -1) if positions else columns[3][0]
    lse = (M + L).reshape(rows_shape)
    return loss, CrossEntropyStats(lse, prediction.reshape(rows_shape))


def _as_rows(x: Tensor) -> Tensor:
    """(…, D) as (N, D)."""
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def _layers(
    x: Tensor, W: Tensor, b: Tensor | None, target: Tensor, positions: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """Yield x, W, b and the target of every position; of the one there is without positions."""
    if not positions:
        yield x, W, b, target
        return
    W, b = W.flatten(1, -2), None if b is None else b.flatten(1)
    if W.shape[1] == 0:  # no row of no layer, so that the gradients are zeros of the right shapes
        yield x[:0], W.sum(1), None if b is None else b.sum(1), target[:0]
    for position in range(W.shape[1]):
        yield (
            x,
            W[:, position],
            None if b is None else b[:, position],
            target[position :: W.shape[1]],
        )


def _pass(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    o: Options,
    total: bool,
    rows: int | None,
) -> tuple[Any, ...]:
    """ℓ or Σℓ, M, L and the prediction; the gradient of Σℓ with it, if it will be asked for."""
    grad = total and torch.is_grad_enabled()
    wanted = (
        grad and x.requires_grad,
        grad and W.requires_grad,
        grad and b is not None and b.requires_grad,
    )
    if is_exporting() and not is_onnx_tracing():
        # the operator with a formula of its own: of a Function, export keeps the forward alone
        blocks = Blocks(total, (False, False, False), rows)
        return last_layer_ops.linear_cross_entropy(x, W, b, target, weight, o, blocks)[:4]
    blocks = Blocks(total, wanted, rows)
    return apply(LinearCrossEntropyFunction, x, W, b, target, weight, o, blocks)[:4]


def _kernels(*tensors: Tensor | None) -> ModuleType | None:
    """Who takes the blocks; None for tensors of other classes and layouts: plain algebra.

    Where a mode or a tracer sees the operators, the loop over the blocks is one operator: its
    buffer is used again for each block, and it reads labels.
    """
    if torch.compiler.is_compiling():
        return last_layer_ops
    if not all(t is None or is_known(t) for t in tensors):
        return None
    return last_layer_ops if is_watched() else last_layer


class LinearCrossEntropyFunction(Function):
    """(ℓ or Σℓ, M, L, prediction, dx, dW, db); of the last three what was wanted, for Σℓ.

    M is a constant shift, as in `cross_entropy`: its cotangent goes nowhere.
    """

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        o: Options,
        blocks: Blocks,
    ) -> Any:
        taker = _kernels(x, W, b, target, weight)
        if taker is None:
            return LinearCrossEntropyFunction.plain(x, W, b, target, weight, o, blocks)
        loss, M, L, prediction, products = taker.linear_cross_entropy(
            x, W, b, target, weight, o, blocks
        )
        return loss, M, L, prediction, *products

    @staticmethod
    @without_autocast
    def plain(
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        o: Options,
        blocks: Blocks,
    ) -> Any:
        columns: list[tuple[Any, ...]] = []
        for part, xs in _parts(x, W, target, o, blocks):
            t = target[part]
            z = blank_ignored(F.linear(xs, W, b), t, o)
            columns.append(eager.cross_entropy(z, t, weight, o))
        loss, M, L = (torch.cat([column[i] for column in columns]) for i in range(3))
        prediction = torch.cat([column[3] for column in columns]) if o.predict else None
        return (eager.total(loss) if blocks.total else loss), M, L, prediction, None, None, None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.o, ctx.blocks = inputs
        _, M, L, *constants = output
        ctx.mark_non_differentiable(*(t for t in constants if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, M, L, *constants[1:])
        ctx.save_for_forward(*tensors, M, L, *constants[1:])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor | None, _: None, h: Tensor | None, *__: None) -> Any:
        x, W, b, target, weight, M, L, *products = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_x = d_W = d_b = d_target = d_weight = None
        if any(needs[:3]):
            G = torch.zeros_like(L) if g is None else g
            blocks = Blocks(ctx.blocks.total, needs[:3], ctx.blocks.rows)
            d_x, d_W, d_b = apply(
                LinearCrossEntropyVjpFunction,
                *(x, W, b, target, weight, G, h, M, L, *products, ctx.o, blocks),
                not graph_is_kept(),
            )
        if g is not None and any(needs[3:5]):
            d_target, d_weight = _target_vjp(x, W, b, target, weight, g, ctx.o, ctx.blocks)
        return d_x, d_W, d_b, d_target, d_weight, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_by_one(LinearCrossEntropyFunction, info, in_dims, args)


@forward_mode_of(LinearCrossEntropyFunction)
class _LinearCrossEntropyWithJvp(LinearCrossEntropyFunction):
    @staticmethod
    @without_autocast
    def jvp(
        ctx: Any,
        dx: Tensor | None,
        dW: Tensor | None,
        db: Tensor | None,
        dy: Tensor | None,
        dw: Tensor | None,
        *_: None,
    ) -> Any:
        x, W, b, target, weight, *_ = ctx.saved_tensors
        pairs = []
        for part, xs in _parts(x, W, target, ctx.o, ctx.blocks):
            r = Row.of(F.linear(xs, W, b), target[part], weight, ctx.o)
            du = _change_of_logits(xs, W, _at(dx, part), dW, db)
            d_y = targets.push_forward(r.s, weight, _at(dy, part), dw, ctx.o)
            pairs.append(r.loss_jvp(du, d_y))
        d_loss, d_L = (torch.cat(column) for column in zip(*pairs, strict=True))
        if ctx.blocks.total:
            d_loss = d_loss.sum()
        return d_loss, torch.zeros_like(d_L), d_L, None, None, None, None


class LinearCrossEntropyVjpFunction(Function):
    """(dx, dW, db) for the upstream gradients g of ℓ or Σℓ and h of lse.

    M, L and the products of the forward only save work: they receive nothing.
    """

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        g: Tensor,
        h: Tensor | None,
        M: Tensor,
        L: Tensor,
        dx: Tensor | None,
        dW: Tensor | None,
        db: Tensor | None,
        o: Options,
        blocks: Blocks,
        give: bool,
    ) -> Any:
        products = Products(dx, dW, db)
        # under vmap the forward does not see that an outer level differentiates
        taken = all(t is not None for t, w in zip(products, blocks.wanted, strict=True) if w)
        if taken and h is None and g.dim() == 0:
            # without a row that counts g may be 1/0, and the products are 0
            if 0 in (len(x), len(W)):
                g = torch.zeros_like(g)
            elif not target.is_floating_point():
                g = g.masked_fill(targets.ignored_rows(target, o).all(), 0.0)
            scaled = [
                None if t is None or not wanted else kernels.scaled(t, g, x.dtype, give)
                for t, wanted in zip(products, blocks.wanted, strict=True)
            ]
            return tuple(scaled)
        taker = _kernels(x, W, b, target, weight, g, h)
        if taker is None:
            return LinearCrossEntropyVjpFunction.plain(
                *(x, W, b, target, weight, g, h, M, L, dx, dW, db, o, blocks, give)
            )
        G = g.to(o.dtype).expand(L.shape)
        products = taker.linear_cross_entropy_vjp(x, W, b, target, weight, G, h, M, L, o, blocks)
        return tuple(None if t is None else t.to(x.dtype) for t in products)

    @staticmethod
    @without_autocast
    def plain(x: Tensor, W: Tensor, b: Tensor | None, *rest: Any) -> Any:
        target, weight, g, h, *_, o, blocks, _ = rest
        sums = _Sums(blocks.wanted, x.dtype)
        for part, xs in _parts(x, W, target, o, blocks):
            r = Row.of(F.linear(xs, W, b), target[part], weight, o)
            sums.add(r.gradient(*_upstream(r, g, h, part)), xs, W)
        return sums.products()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, M, L, _, _, _, ctx.o, ctx.blocks, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, M, L)
        ctx.save_for_forward(*tensors, M, L)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, v_x: Tensor | None, v_W: Tensor | None, v_b: Tensor | None) -> Any:
        x, W, b, target, weight, g, h, _, _ = ctx.saved_tensors
        o, needs = ctx.o, ctx.needs_input_grad
        if v_x is None and v_W is None and v_b is None:
            return (None,) * len(needs)
        # the operator's results are wider than the Function's, and so are their cotangents
        v_x, v_W, v_b = (None if v is None else v.to(x.dtype) for v in (v_x, v_W, v_b))
        if not any(needs[3:5]) and last_layer.takes_hvp(o, *ctx.saved_tensors, v_x, v_W, v_b):
            return _hvp(ctx, Products(v_x, v_W, v_b))
        sums, rows, others = _Sums(needs[:3], x.dtype), [], []
        for part, xs in _parts(x, W, target, o, ctx.blocks):
            t = target[part]
            r = Row.of(F.linear(xs, W, b), t, weight, o)
            G, H = _upstream(r, g, h, part)
            v = _at(v_x, part)
            u = _change_of_logits(xs, W, v, v_W, v_b)
            assert u is not None  # one of the three is there
            d = r.gradient_vjp(u, G, H)
            sums.add(d.input, xs, W)
            sums.add(r.gradient(G, H), v, v_W, same_rows=True)
            of_y = targets.pull_back(r.s, t, weight, d.y, o) if any(needs[3:5]) else (None, None)
            rows.append((d.g.squeeze(1), d.h.squeeze(1)))
            others.append(of_y)
        d_g, d_h = (torch.cat(column) for column in zip(*rows, strict=True))
        return (
            *sums.products(),
            *_joined(others, needs[3], needs[4]),
            d_g.sum() if g.dim() == 0 else d_g,
            None if h is None else d_h,
            *[None] * 8,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_by_one(LinearCrossEntropyVjpFunction, info, in_dims, args)


@forward_mode_of(LinearCrossEntropyVjpFunction)
class _LinearCrossEntropyVjpWithJvp(LinearCrossEntropyVjpFunction):
    @staticmethod
    @without_autocast
    def jvp(
        ctx: Any,
        dx: Tensor | None,
        dW: Tensor | None,
        db: Tensor | None,
        dy: Tensor | None,
        dw: Tensor | None,
        dg: Tensor | None,
        dh: Tensor | None,
        *_: None,
    ) -> Any:
        x, W, b, target, weight, g, h, _, _ = ctx.saved_tensors
        sums = _Sums(ctx.blocks.wanted, x.dtype)
        dg = dg if dg is None or dg.dim() else dg.expand(len(x))
        for part, xs in _parts(x, W, target, ctx.o, ctx.blocks):
            r = Row.of(F.linear(xs, W, b), target[part], weight, ctx.o)
            G, H = _upstream(r, g, h, part)
            v = _at(dx, part)
            du = _change_of_logits(xs, W, v, dW, db)
            d_y = targets.push_forward(r.s, weight, _at(dy, part), dw, ctx.o)
            sums.add(r.gradient_jvp(du, d_y, G, H, _at(dg, part), _at(dh, part)), xs, W)
            sums.add(r.gradient(G, H), v, dW, same_rows=True)
        return sums.products()


def _hvp(ctx: Any, v: Products) -> tuple[Any, ...]:
    """The same where nothing is differentiated once more, in two buffers."""
    x, W, b, target, weight, g, h, M, L = ctx.saved_tensors
    blocks = Blocks(False, ctx.needs_input_grad[:3], ctx.blocks.rows)
    G = g.to(ctx.o.dtype).expand(L.shape)
    products, d_g, d_h = last_layer.linear_cross_entropy_hvp(
        x, W, b, target, weight, G, h, M, L, v, ctx.o, blocks
    )
    d_x, d_W, d_b = (None if t is None else t.to(x.dtype) for t in products)
    d_g = d_g.sum() if g.dim() == 0 else d_g
    return d_x, d_W, d_b, None, None, d_g, None if h is None else d_h, *[None] * 8


def _target_vjp(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    g: Tensor,
    o: Options,
    blocks: Blocks,
) -> tuple[Tensor | None, Tensor | None]:
    """What g, the upstream gradient of ℓ or Σℓ, is to probabilities and class weights."""
    columns = []
    for part, xs in _parts(x, W, target, o, blocks):
        r = Row.of(F.linear(xs, W, b), target[part], weight, o)
        G, _ = _upstream(r, g, None, part)
        columns.append(targets.pull_back(r.s, target[part], weight, G * r.surprisal, o))
    return _joined(columns, target.is_floating_point(), weight is not None)


def _joined(
    columns: list[tuple[Tensor | None, Tensor | None]], of_target: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The blocks' gradients of the target, side by side, and of the class weights, added up."""
    d_target = [t for t, _ in columns if t is not None]
    d_weight = [w for _, w in columns if w is not None]
    return (
        torch.cat(d_target) if of_target else None,
        torch.stack(d_weight).sum(0) if of_weight else None,
    )


def _parts(
    x: Tensor, W: Tensor, target: Tensor, o: Options, blocks: Blocks
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of each block and their input, 0 where they are ignored."""
    N, C = len(x), len(W)
    size = blocks.of(x, C * NUMBERS_A_LOGIT * o.dtype.itemsize, LEAST_ROWS)
    for start in range(0, N or 1, size):
        part = slice(start, start + size)
        yield part, blank_ignored(x[part], target[part], o)


def _change_of_logits(
    x: Tensor, W: Tensor, v_x: Tensor | None, v_W: Tensor | None, v_b: Tensor | None
) -> Tensor | None:
    """u = v_x Wᵀ + x v_Wᵀ + v_b."""
    terms = []
    if v_x is not None:
        terms.append(v_x @ W.t())
    if v_W is not None:
        terms.append(x @ v_W.t())
    if v_b is not None:
        terms.append(v_b.expand(len(x), -1))
    return sum(terms[1:], terms[0]) if terms else None


def _upstream(r: Row, g: Tensor, h: Tensor | None, part: slice) -> tuple[Tensor, Tensor]:
    g = g.expand(r.c.shape[0]) if g.dim() == 0 else g[part]
    return r.upstream(g), r.upstream(_at(h, part))


def _at(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[part]


class _Sums:
    """dz W, dzᵀ x and Σ dz of the blocks that came in, as far as wanted; differentiable."""

    def __init__(self, wanted: Sequence[bool], dtype: torch.dtype) -> None:
        self.wanted, self.dtype = wanted, dtype
        self.rows: list[Tensor] = []
        self.dW: Tensor | None = None
        self.db: Tensor | None = None

    def add(
        self, dz: Tensor, x: Tensor | None, W: Tensor | None, *, same_rows: bool = False
    ) -> None:
        """Add a block's; with `same_rows` to that of the block before, and nothing to Σ dz."""
        wants_x, wants_W, wants_b = self.wanted
        if wants_x and W is not None:
            dx = dz.to(W.dtype) @ W
            self.rows.append(self.rows.pop() + dx if same_rows else dx)
        if wants_W and x is not None:
            dW = (dz.to(x.dtype).t() @ x).to(statistics_dtype(x.dtype))
            self.dW = dW if self.dW is None else self.dW + dW
        if wants_b and not same_rows:
            db = dz.sum(0)
            self.db = db if self.db is None else self.db + db

    def products(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dW = None if self.dW is None else self.dW.to(self.dtype)
        db = None if self.db is None else self.db.to(self.dtype)
        return torch.cat(self.rows) if self.wanted[0] else None, dW, db


def _one_by_one(
    function: type[Function], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> Any:
    """The vmap rule: one sample after the other, each in its blocks."""
    samples = []
    for i in range(info.batch_size):
        sample = [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
        samples.append(apply(function, *sample))
    columns = zip(*samples, strict=True)
    outputs = [None if column[0] is None else torch.stack(column) for column in columns]
    return tuple(outputs), tuple(None if t is None else 0 for t in outputs)
