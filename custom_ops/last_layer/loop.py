"""The kernels over parts of the logits: what the forward and the backward do, in the plan's order.

Nothing here is differentiated, and nothing watches the operators.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from custom_ops import kernels
from custom_ops.kernels import Found, Rows
from custom_ops.last_layer import by_classes, by_rows, whole
from custom_ops.last_layer.layer import Kept, Layer, Products
from custom_ops.last_layer.plan import Plan, Sizes, planned, rows_at_a_time
from custom_ops.last_layer.products import rounds_once
from custom_ops.last_layer.readable import counted_rows, spread

__all__ = ["Pass", "backward", "finish", "forward"]

#: Numbers of each logit that the eager kernels hold for the gradient of the entropy, at most.
TEMPORARIES = 8


class Pass(NamedTuple):
    """What the pass over the logits found."""

    found: Found  #: the loss is Σℓ where that is wanted
    products: Products = Products(None, None, None)  #: of Σℓ, where rows are taken in blocks
    kept: Kept = Kept(None, None)  #: for `finish`, in the other orders


def forward(layer: Layer) -> Pass:
    """Return ℓ or Σℓ, the rows' statistics, and what the backward begins with."""
    counted = counted_rows(layer)
    if counted is not None:
        return _spread(forward(layer.part(counted)), counted, len(layer.x))
    plan = _plan(layer)
    if plan.order == "whole":
        found, kept = whole.forward(layer)
        done = Pass(found, kept=kept)
    elif plan.order == "classes":
        found, kept = by_classes.forward(layer, plan)
        done = Pass(found, kept=kept)
    else:
        done = Pass(*by_rows.forward(layer, plan.block))
    if not layer.blocks.total:
        return done
    return done._replace(found=done.found._replace(loss=kernels.total(done.found.loss)))


def finish(layer: Layer, rows: Rows, kept: Kept, needs: tuple[bool, bool, bool]) -> Products:
    """Return the products that are needed from the logits that were kept, which are used up."""
    counted = counted_rows(layer)
    if counted is not None:
        found = finish(layer.part(counted), rows.part(counted), kept, needs)
        return found._replace(x=spread(found.x, counted, len(layer.x)))
    plan = _plan(layer)
    layer = layer._replace(blocks=replace(layer.blocks, wanted=needs))
    if plan.order == "whole":
        return whole.backward(layer, rows, kept)
    return by_classes.backward(layer, rows, kept, plan)


def backward(layer: Layer, rows: Rows) -> Products:
    """Return dx, dW, db for the upstream gradients of the rows; the logits are taken again."""
    counted = counted_rows(layer)
    if counted is not None:
        found = backward(layer.part(counted), rows.part(counted))
        return found._replace(x=spread(found.x, counted, len(layer.x)))
    s = Sizes.of(layer)
    numbers = 1 if rows.e is None else TEMPORARIES
    size = rows_at_a_time(layer, s.logit_bytes * numbers, s.wide * s.products)
    return by_rows.backward(layer, rows, size)


def _plan(layer: Layer) -> Plan:
    if not rounds_once(layer.x):
        layer = layer._replace(blocks=replace(layer.blocks, keeps=False))
    return planned(layer, by_classes=by_classes.takes(layer))


def _spread(of_counted: Pass, counted: Tensor, N: int) -> Pass:
    """Return the pass over all N rows from that over the counted ones."""
    (loss, M, L, prediction, entropy), products, _ = of_counted
    found = Found(
        loss if loss.dim() == 0 else spread(loss, counted, N),
        spread(M, counted, N),
        spread(L, counted, N),
        spread(prediction, counted, N, -1),
        spread(entropy, counted, N),
    )
    return of_counted._replace(
        found=found, products=products._replace(x=spread(products.x, counted, N))
    )
