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

__all__ = ["Pass", "backward", "forward", "planned_for"]

NOTHING = Kept(None, None)
#: Numbers of each logit that the eager kernels hold for the gradient of the entropy, at most.
TEMPORARIES = 8


class Pass(NamedTuple):
    """What the pass over the logits found."""

    found: Found  #: the loss is Σℓ where that is wanted
    products: Products = Products(None, None, None)  #: of Σℓ, where rows are taken in blocks
    kept: Kept = NOTHING  #: the logits, in the other orders


def forward(layer: Layer) -> Pass:
    """Return ℓ or Σℓ, the rows' statistics, and what the backward begins with."""
    counted = counted_rows(layer)
    if counted is not None:
        return _spread(forward(layer.part(counted)), counted, len(layer.x))
    plan = planned_for(layer)
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


def backward(
    layer: Layer, rows: Rows, kept: Kept = NOTHING, needs: tuple[bool, bool, bool] | None = None
) -> Products:
    """Return dx, dW, db for the upstream gradients of the rows, as far as they are needed.

    Logits that were kept are used up; without them they are taken again, in the same order.
    """
    counted = counted_rows(layer)
    if counted is not None:
        found = backward(layer.part(counted), rows.part(counted), kept, needs)
        return found._replace(x=spread(found.x, counted, len(layer.x)))
    plan = planned_for(layer, rows)
    layer = layer._replace(blocks=replace(layer.blocks, wanted=needs or layer.blocks.wanted))
    if plan.order == "whole":
        return whole.backward(layer, rows, kept)
    if plan.order == "classes":
        return by_classes.backward(layer, rows, kept, plan)
    s = Sizes.of(layer)
    numbers = 1 if rows.e is None else TEMPORARIES
    size = rows_at_a_time(layer, s.logit_bytes * numbers, s.wide * s.products)
    return by_rows.backward(layer, rows, size)


def planned_for(layer: Layer, rows: Rows | None = None) -> Plan:
    """Return the plan of a layer; the gradient of the entropy goes by rows."""
    if not rounds_once(layer.x) or (rows is not None and rows.e is not None):
        layer = layer._replace(blocks=replace(layer.blocks, plans=False))
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
