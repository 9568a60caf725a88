"""The last layer as differentiable algebra, a block of rows at a time.

It answers where a derivative is differentiated again, in forward mode, and for tensors that the
kernels do not take. The formulas of a row are those of `custom_ops.row`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_ops.kernels import Found, Rows, eager, statistics_dtype
from custom_ops.kernels.eager import targets
from custom_ops.last_layer.layer import Layer, Products
from custom_ops.last_layer.plan import parts, rows_at_a_time
from custom_ops.row import Row, Upstream, blank_ignored

__all__ = [
    "Tangents",
    "backward",
    "backward_jvp",
    "backward_vjp",
    "forward",
    "forward_jvp",
    "target_vjp",
]

#: What the algebra of a second derivative holds of each logit of a block, at most.
NUMBERS_A_LOGIT = 12
LEAST_ROWS = 8


#: g, q and e, or their tangents; g may be that of Σℓ.
OfRows: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


class Tangents(NamedTuple):
    """Tangents of the layer's tensors, None for none."""

    x: Tensor | None
    W: Tensor | None
    b: Tensor | None
    target: Tensor | None
    weight: Tensor | None


def forward(layer: Layer) -> Found:
    """Return ℓ or Σℓ, and the rows' statistics."""
    found = []
    for part, x in _blocks(layer):
        z = blank_ignored(F.linear(x, layer.W, layer.b), layer.target[part], layer.options)
        found.append(eager.cross_entropy(layer.problem(z, part)))
    joined = Found(*(_joined(column) for column in zip(*found, strict=True)))  # type: ignore[arg-type]
    return joined._replace(loss=eager.total(joined.loss)) if layer.blocks.total else joined


def forward_jvp(layer: Layer, t: Tangents) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tangents of ℓ or Σℓ, lse and the entropy."""
    found = []
    for part, x in _blocks(layer):
        r = _row(layer, part, x)
        found.append(r.loss_jvp(_change(layer, part, x, t), _change_of_share(r, layer, part, t)))
    loss_t, lse_t, H_t = (torch.cat(column) for column in zip(*found, strict=True))
    return loss_t.sum() if layer.blocks.total else loss_t, lse_t, H_t


def backward(layer: Layer, rows: Rows) -> Products:
    """Return dx, dW and db for the upstream gradients of the rows; g may be that of Σℓ."""
    sums = _Sums(layer.blocks.wanted, layer.x.dtype)
    for part, x in _blocks(layer):
        r = _row(layer, part, x)
        sums.add(r.gradient(_upstream(r, (rows.g, rows.q, rows.e), part)), x, layer.W)
    return sums.products()


def backward_jvp(layer: Layer, rows: Rows, t: Tangents, rows_t: OfRows) -> Products:
    """Return the tangents of dx, dW and db along those of everything that they are made of."""
    sums = _Sums(layer.blocks.wanted, layer.x.dtype)
    for part, x in _blocks(layer):
        r = _row(layer, part, x)
        up, up_t = _upstream(r, (rows.g, rows.q, rows.e), part), _upstream(r, rows_t, part)
        u, y_t = _change(layer, part, x, t), _change_of_share(r, layer, part, t)
        sums.add(r.gradient_jvp(u, y_t, up, up_t), x, layer.W)
        sums.add(r.gradient(up), _at(t.x, part), t.W, same_rows=True)
    return sums.products()


def backward_vjp(layer: Layer, rows: Rows, v: Products, needs: Sequence[bool]) -> tuple[Any, ...]:
    """Return the gradients of ⟨v, (dx, dW, db)⟩: to the layer's tensors and to the rows.

    `needs` says which of the layer's tensors have one.
    """
    o, dtype = layer.options, layer.x.dtype
    sums = _Sums(needs[:3], dtype)
    of_rows: list[tuple[Tensor, ...]] = []
    of_targets: list[tuple[Tensor | None, Tensor | None]] = []
    t = Tangents(*v, None, None)
    for part, x in _blocks(layer):
        target, r = layer.target[part], _row(layer, part, x)
        up, u = _upstream(r, (rows.g, rows.q, rows.e), part), _change(layer, part, x, t)
        assert u is not None  # one of the three is there
        d = r.gradient_vjp(u, up)
        sums.add(d.input, x, layer.W)
        sums.add(r.gradient(up), _at(v.x, part), v.W, same_rows=True)
        if any(needs[3:5]):
            of_targets.append(targets.pull_back(r.share, target, layer.weight, d.y, o))
        of_rows.append((d.g.squeeze(1), d.q.squeeze(1), d.e.squeeze(1)))
    d_g, d_q, d_e = (torch.cat(column) for column in zip(*of_rows, strict=True))
    return (
        *sums.products(),
        *_joined_targets(of_targets, needs[3], needs[4]),
        d_g.sum() if rows.g.dim() == 0 else d_g,
        None if rows.q is None else d_q,
        *(None, None),  # M and L are functions of the rest
        None if rows.e is None else d_e,
    )


def target_vjp(layer: Layer, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of probabilities and class weights for g, that of ℓ or Σℓ."""
    columns = []
    for part, x in _blocks(layer):
        r, target = _row(layer, part, x), layer.target[part]
        d_y = _upstream(r, (g, None, None), part).g * r.surprisal  # ∂ℓ/∂ỹ_k = lse − z_k
        columns.append(targets.pull_back(r.share, target, layer.weight, d_y, layer.options))
    return _joined_targets(columns, layer.target.is_floating_point(), layer.weight is not None)


def _blocks(layer: Layer) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of each block, one block at least, and their input, 0 where it is ignored."""
    x, row_bytes = layer.x, len(layer.W) * NUMBERS_A_LOGIT * layer.options.dtype.itemsize
    size = rows_at_a_time(layer, row_bytes, least=LEAST_ROWS)
    for part in list(parts(x, size)) or [slice(0, 0)]:
        yield part, blank_ignored(x[part], layer.target[part], layer.options)


def _row(layer: Layer, part: slice, x: Tensor) -> Row:
    z = F.linear(x, layer.W, layer.b)
    return Row.of(z, layer.target[part], layer.weight, layer.options)


def _change(layer: Layer, part: slice, x: Tensor, t: Tangents) -> Tensor | None:
    """u = x_t Wᵀ + x W_tᵀ + b_t."""
    terms = []
    if t.x is not None:
        terms.append(t.x[part] @ layer.W.t())
    if t.W is not None:
        terms.append(x @ t.W.t())
    if t.b is not None:
        terms.append(t.b.expand(len(x), -1))
    return sum(terms[1:], terms[0]) if terms else None


def _change_of_share(r: Row, layer: Layer, part: slice, t: Tangents) -> Tensor | None:
    """The tangent of ỹ."""
    y_t = _at(t.target, part)
    return targets.push_forward(r.share, layer.weight, y_t, t.weight, layer.options)


def _upstream(r: Row, of_rows: OfRows, part: slice) -> Upstream:
    g, q, e = of_rows
    if g is not None:
        g = g.expand(r.c.shape[0]) if g.dim() == 0 else g[part]
    return r.upstream(g, _at(q, part), _at(e, part))


def _at(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[part]


def _joined(column: Sequence[Tensor | None]) -> Tensor | None:
    return None if column[0] is None else torch.cat(column)  # type: ignore[arg-type]


def _joined_targets(
    columns: list[tuple[Tensor | None, Tensor | None]], of_target: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The blocks' gradients of the target, side by side, and of the class weights, added up."""
    d_target = [t for t, _ in columns if t is not None]
    d_weight = [w for _, w in columns if w is not None]
    return (
        torch.cat(d_target) if of_target else None,
        torch.stack(d_weight).sum(0) if of_weight else None,
    )


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

    def products(self) -> Products:
        dW = None if self.dW is None else self.dW.to(self.dtype)
        db = None if self.db is None else self.db.to(self.dtype)
        return Products(torch.cat(self.rows) if self.wanted[0] else None, dW, db)
