"""The autograd Functions of the last layer."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from custom_ops.apply import apply, forward_mode_of
from custom_ops.autocast import without_autocast
from custom_ops.kernels import Rows
from custom_ops.kernels.eager.targets import ignored_rows
from custom_ops.last_layer import algebra, hessian, loop, operators
from custom_ops.last_layer.algebra import Tangents
from custom_ops.last_layer.layer import Kept, Layer, Products
from custom_ops.last_layer.products import scaled
from custom_ops.surroundings import graph_is_kept, is_known, is_watched

__all__ = ["LinearCrossEntropyFunction", "LinearCrossEntropyVjpFunction"]

#: Both Functions take the tensors of a Layer first; the second then those of Rows.
LAYER, ROWS = 5, 10


def _kernels(*tensors: Tensor | None) -> ModuleType | None:
    """Return what takes the blocks; None for tensors of other classes and layouts: the algebra.

    Where a mode or a tracer sees the operators, the loop over the blocks is one operator: its
    buffer is used again for each block, and it reads labels.
    """
    if torch.compiler.is_compiling():
        return operators
    if not all(t is None or is_known(t) for t in tensors):
        return None
    return operators if is_watched() else loop


class LinearCrossEntropyFunction(Function):
    """(ℓ or Σℓ, M, L, prediction, H, dx, dW, db, and two that hold logits for the backward).

    The products are those of Σℓ. Either these or the logits are there, or, where nothing is kept,
    none of them. M is a constant shift, as in `cross_entropy`: its cotangent goes nowhere.
    """

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, *rest: Any
    ) -> Any:
        layer = Layer(x, W, b, target, weight, *rest)
        taker = _kernels(*layer.tensors)
        if taker is None:
            return LinearCrossEntropyFunction.algebra(*layer)
        found, products, kept = taker.forward(layer)
        return *found, *products, *(kept if layer.blocks.keeps else Kept(None, None))

    @staticmethod
    @without_autocast
    def algebra(*layer: Any) -> Any:
        return *algebra.forward(Layer(*layer)), *[None] * 5

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.o, ctx.blocks = inputs
        _, M, L, prediction, _, *begun = output
        constants = (prediction, *begun)
        ctx.mark_non_differentiable(*(t for t in constants if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, M, L, *begun)
        ctx.save_for_forward(*tensors, M, L)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, g: Tensor | None, _: Any, q: Tensor | None, *rest: Any) -> Any:
        *tensors, M, L, dx, dW, db, logits_in_dW, logits = ctx.saved_tensors
        e, needs = rest[1] if ctx.o.stats else None, ctx.needs_input_grad
        d_x = d_W = d_b = d_target = d_weight = None
        if any(needs[:3]):
            wanted = (needs[0], needs[1], needs[2])
            rows = Rows(torch.zeros_like(L) if g is None else g, q, M, L, e)
            layer, kept = Layer.of(tensors, ctx.o, ctx.blocks), Kept(logits_in_dW, logits)
            if _can_use_up(kept, rows):
                d_x, d_W, d_b = _finished(layer, rows, kept, wanted)
            else:
                blocks = replace(ctx.blocks, wanted=wanted)
                d_x, d_W, d_b = apply(
                    LinearCrossEntropyVjpFunction,
                    *(*tensors, *rows, dx, dW, db, ctx.o, blocks, not graph_is_kept()),
                )
        if g is not None and any(needs[3:5]):
            d_target, d_weight = algebra.target_vjp(Layer.of(tensors, ctx.o, ctx.blocks), g)
        return d_x, d_W, d_b, d_target, d_weight, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_by_one(LinearCrossEntropyFunction, info, in_dims, args)


@forward_mode_of(LinearCrossEntropyFunction)
class _LinearCrossEntropyWithJvp(LinearCrossEntropyFunction):
    @staticmethod
    @without_autocast
    def jvp(ctx: Any, *tangents: Any) -> Any:
        layer = Layer.of(ctx.saved_tensors[:LAYER], ctx.o, ctx.blocks)
        loss_t, L_t, H_t = algebra.forward_jvp(layer, Tangents(*tangents[:LAYER]))
        entropy_t = H_t if ctx.o.stats else None
        return loss_t, torch.zeros_like(L_t), L_t, None, entropy_t, *[None] * 5


class LinearCrossEntropyVjpFunction(Function):
    """(dx, dW, db) for the upstream gradients g of ℓ or Σℓ, q of lse and e of the entropy.

    M, L and the products of the forward only save work: they receive nothing.
    """

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, b: Tensor | None, target: Tensor, weight: Tensor | None, *rest: Any
    ) -> Any:
        *numbers, dx, dW, db, o, blocks, give = rest
        layer, rows = Layer(x, W, b, target, weight, o, blocks), Rows(*numbers)
        products = Products(dx, dW, db)
        # under vmap the forward does not see that an outer level differentiates
        taken = all(t is not None for t, w in zip(products, blocks.wanted, strict=True) if w)
        of_sum = rows.q is None and rows.e is None and rows.g.dim() == 0
        if taken and of_sum:
            return _scaled(layer, products, rows.g, give)
        taker = _kernels(*layer.tensors, rows.g, rows.q, rows.e)
        if taker is None:
            args = (x, W, b, target, weight, *rest)
            return LinearCrossEntropyVjpFunction.algebra(*args)
        if of_sum and taker is loop and loop.planned_for(layer).order == "rows":
            # as the forward does it: the products of Σℓ, times g
            one = torch.ones_like(rows.L[:1]).expand(rows.L.shape)
            return _scaled(layer, loop.backward(layer, rows._replace(g=one)), rows.g, True)
        G = rows.g.to(o.dtype).expand(rows.L.shape)
        products = taker.backward(layer, rows._replace(g=G))
        return tuple(None if t is None else t.to(x.dtype) for t in products)

    @staticmethod
    @without_autocast
    def algebra(*args: Any) -> Any:
        rows, (_, _, _, o, blocks, _) = Rows(*args[LAYER:ROWS]), args[ROWS:]
        return tuple(algebra.backward(Layer.of(args[:LAYER], o, blocks), rows))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, _, _, _, ctx.o, ctx.blocks, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        layer, rows = _saved(ctx)
        needs = ctx.needs_input_grad
        if all(v is None for v in cotangents):
            return (None,) * len(needs)
        # the operator's results are wider than the Function's, and so are their cotangents
        v = Products(*(None if v is None else v.to(layer.x.dtype) for v in cotangents))
        kernels_take = rows.e is None and not any(needs[3:5])
        if kernels_take and hessian.takes_hvp(ctx.o, *layer.tensors, *rows.flat, *v):
            found = _hvp(layer, rows, v, needs)
        else:
            found = algebra.backward_vjp(layer, rows, v, needs)
        return *found, *[None] * (len(needs) - len(found))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_by_one(LinearCrossEntropyVjpFunction, info, in_dims, args)


@forward_mode_of(LinearCrossEntropyVjpFunction)
class _LinearCrossEntropyVjpWithJvp(LinearCrossEntropyVjpFunction):
    @staticmethod
    @without_autocast
    def jvp(ctx: Any, *tangents: Any) -> Any:
        layer, rows = _saved(ctx)
        g_t, q_t, _, _, e_t = tangents[LAYER:ROWS]
        g_t = g_t if g_t is None or g_t.dim() else g_t.expand(len(layer.x))
        t = Tangents(*tangents[:LAYER])
        return tuple(algebra.backward_jvp(layer, rows, t, (g_t, q_t, e_t)))


def _can_use_up(kept: Kept, rows: Rows) -> bool:
    """Whether a backward may write over the logits that were kept: nobody asks for them again."""
    if kept.more is None or rows.e is not None or graph_is_kept() or torch.is_grad_enabled():
        return False
    return all(t is None or is_known(t) for t in (rows.g, rows.q))


def _finished(
    layer: Layer, rows: Rows, kept: Kept, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients from the logits that were kept."""
    G = rows.g.to(layer.options.dtype).expand(rows.L.shape)
    products = loop.backward(layer, rows._replace(g=G), kept, wanted)
    return tuple(None if t is None else t.to(layer.x.dtype) for t in products)


def _saved(ctx: Any) -> tuple[Layer, Rows]:
    """Return what `LinearCrossEntropyVjpFunction` saved."""
    saved = ctx.saved_tensors
    return Layer.of(saved[:LAYER], ctx.o, ctx.blocks), Rows(*saved[LAYER:])


def _scaled(layer: Layer, products: Products, g: Tensor, give: bool) -> tuple[Tensor | None, ...]:
    """Return g times the products that the forward has found."""
    # without a row that counts g may be 1/0, and the products are 0
    if 0 in (len(layer.x), len(layer.W)):
        g = torch.zeros_like(g)
    elif not layer.target.is_floating_point():
        g = g.masked_fill(ignored_rows(layer.target, layer.options).all(), 0.0)
    return tuple(
        None if t is None or not wanted else scaled(t, g, layer.x.dtype, give)
        for t, wanted in zip(products, layer.blocks.wanted, strict=True)
    )


def _hvp(layer: Layer, rows: Rows, v: Products, needs: tuple[bool, ...]) -> tuple[Any, ...]:
    """Return what `algebra.backward_vjp` does, in two buffers; it is not differentiated again."""
    wanted = (needs[0], needs[1], needs[2])
    layer = layer._replace(blocks=replace(layer.blocks, total=False, wanted=wanted))
    G = rows.g.to(layer.options.dtype).expand(rows.L.shape)
    products, d_g, d_q = hessian.hvp(layer, rows._replace(g=G), v)
    d_x, d_W, d_b = (None if t is None else t.to(layer.x.dtype) for t in products)
    d_g = d_g.sum() if rows.g.dim() == 0 else d_g
    return d_x, d_W, d_b, None, None, d_g, None if rows.q is None else d_q


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
