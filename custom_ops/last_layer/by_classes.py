"""Slabs of classes: each has one product of dW, and logits lie in dW's own memory until then.

A pass over the slabs finds M and L of each, and with them those of the rows:

    M = max_j M_j        L = log Σ_j exp((M_j − M) + L_j)        ℓ = w_t ((M − z_t) + L) + λ·lse²

The backward turns each slab's logits into dz; dW of the slab is one product over all rows, so it is
rounded once, whatever the slab. The kernels see a slab as a cross-entropy of its classes. A row
whose label is elsewhere has no ỹ there, dz = a·p: it is handed on with g = 0 and q = a.

Nothing here is differentiated, and nothing watches the operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from custom_ops import kernels
from custom_ops.kernels import Found, Problem, Rows, statistics_dtype
from custom_ops.kernels.eager import capped
from custom_ops.kernels.eager.targets import ignored_rows
from custom_ops.kernels.labels import reported
from custom_ops.last_layer.layer import Kept, Layer, Products
from custom_ops.last_layer.plan import Plan
from custom_ops.last_layer.products import advised, fresh_logits, put_product_
from custom_ops.last_layer.readable import clean

__all__ = ["backward", "forward", "takes"]


def takes(layer: Layer) -> bool:
    """Whether the order is possible: for labels without smoothing, and the loss alone."""
    x, W, _, target, _, o, _ = layer
    plain = not (target.is_floating_point() or o.label_smoothing or o.stats)
    return plain and 0 not in (*x.shape, len(W))


def forward(layer: Layer, plan: Plan) -> tuple[Found, Kept]:
    """Return ℓ, M and L of each row, and the logits of the first rows."""
    x, W, _, target, _, o, _ = layer
    memory = _Memory.fresh(layer, plan.kept)
    ignored = ignored_rows(target, o)
    M = x.new_full((len(x),), -torch.inf, dtype=o.dtype)
    S, z_t = torch.zeros_like(M), torch.full_like(M, torch.nan)  # NaN where t is no class
    buffer = fresh_logits(x, len(x) - plan.kept, min(plan.block, len(W)))
    for classes in _slabs(layer, plan):
        for rows, z in memory.logits(classes, buffer[:, : classes.stop - classes.start]):
            layer.put_logits(z, rows, classes)
            m, L = _statistics(layer, z, ignored[rows])
            largest = torch.maximum(M[rows], m)
            of_slab = torch.where(m == -torch.inf, 0.0, ((m - largest) + L).exp())
            before = torch.where(M[rows] == -torch.inf, 0.0, (M[rows] - largest).exp())
            S[rows], M[rows] = S[rows] * before + of_slab, largest
            here, t = _labels(target[rows], classes)
            of_label, _, _ = capped(z.gather(1, t.unsqueeze(1)).squeeze(1), o)
            z_t[rows] = torch.where(here, of_label, z_t[rows])
    L = S.log()
    loss = _label_weights(layer) * ((M - z_t) + L) + o.z_loss * (M + L) ** 2
    loss, M, L = (t.masked_fill(ignored, 0.0) for t in (loss, M, L))
    return Found(loss, M, L, None, None), memory.kept


def backward(layer: Layer, rows: Rows, kept: Kept, plan: Plan) -> Products:
    """Return dx, dW, db for the upstream gradients of the rows; dW takes the kept logits' place."""
    x, W, b, *_, blocks = layer
    wants_x, wants_W, wants_b = blocks.wanted
    memory, slabs = _Memory(kept, len(x), len(W)), _Slabs.of(layer, rows)
    rows_kept = 0 if kept.more is None else plan.kept
    dx = torch.empty_like(x) if wants_x else None
    dtype = statistics_dtype(x.dtype)
    wide = dtype != x.dtype
    # where dx is added up in float32, its own memory is idle and takes what `clean` may copy
    factor = clean(layer, out=dx if wide else None) if wants_W else x
    sums = dx if dx is None or not wide else torch.empty_like(dx, dtype=dtype)
    dW = kept.dW if wants_W else None
    if wants_W and dW is None:
        dW = advised(W.new_empty(W.shape))
    db = b.new_empty(b.shape, dtype=dtype) if wants_b and b is not None else None
    buffer = fresh_logits(x, len(x), min(plan.block, len(W)))
    for classes in _slabs(layer, plan):
        dz = buffer[:, : classes.stop - classes.start]
        for part, z in memory.logits(classes, dz[rows_kept:]):
            if part.start == rows_kept:
                layer.put_logits(z, part, classes)
            slabs.put_gradient(z, part, classes, dz[part])
        if dW is not None:
            torch.mm(dz.t(), factor, out=dW[classes])
        if sums is not None:
            put_product_(sums, dz, W[classes], beta=int(classes.start > 0))
        if db is not None:
            db[classes] = dz.sum(0, dtype=dtype)
    if dx is not None and sums is not None and dx is not sums:
        dx.copy_(sums)
    return Products(dx, dW, db)


def _slabs(layer: Layer, plan: Plan) -> Iterator[slice]:
    """Yield the classes of each slab."""
    C = len(layer.W)
    return (slice(a, min(a + plan.block, C)) for a in range(0, C, plan.block))


class _Memory(NamedTuple):
    """Where logits lie until the backward: those of the first D rows in dW, then of some more."""

    kept: Kept
    N: int
    classes: int

    @staticmethod
    def fresh(layer: Layer, kept: int) -> _Memory:
        """Return memory for the logits of so many rows."""
        x, W, wants_W = layer.x, layer.W, layer.blocks.wanted[1]
        dW = advised(W.new_empty(W.shape)) if wants_W else None
        more = max(kept - x.shape[1], 0) if wants_W else kept
        return _Memory(Kept(dW, advised(x.new_empty(more, len(W)))), len(x), len(W))

    def logits(self, classes: slice, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows and the memory of their logits: where they are kept, then the `others`."""
        start, width = 0, classes.stop - classes.start
        for memory in self.kept:
            if memory is None or start == self.N:
                continue
            height = memory.numel() // self.classes  # D, or the rows of `more`
            rows = min(height, self.N - start)
            slab = memory.view(-1)[classes.start * height :][: rows * width].view(rows, width)
            yield slice(start, start + rows), slab
            start += rows
        if start < self.N:
            yield slice(start, self.N), others


class _Slabs(NamedTuple):
    """The rows' upstream gradients, for any slab."""

    layer: Layer
    rows: Rows
    q: Tensor  #: of lse where there is no ỹ: a of the whole row
    ignored: Tensor

    @staticmethod
    def of(layer: Layer, rows: Rows) -> _Slabs:
        """Return them of a layer."""
        o = layer.options
        a = rows.g * (_label_weights(layer) + 2 * o.z_loss * (rows.M + rows.L))
        a = a if rows.q is None else a + rows.q
        return _Slabs(layer, rows, a, ignored_rows(layer.target, o))

    def put_gradient(self, z: Tensor, part: slice, classes: slice, out: Tensor) -> None:
        """Write the gradient of these logits into `out`, which may be their own memory."""
        o, rows = self.layer.options, self.rows.part(part)
        here, t = _labels(self.layer.target[part], classes)
        t = torch.where(self.ignored[part], o.ignore_index, t)
        g = torch.where(here, rows.g, 0.0)
        q = torch.where(here, 0.0 if rows.q is None else rows.q, self.q[part])
        weight = self.layer.weight
        problem = Problem(z, t, None if weight is None else weight[classes], o)
        kernels.cross_entropy_vjp_out(problem, Rows(g, q, rows.M, rows.L), out)


def _statistics(layer: Layer, z: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """Return M and L of the rows of a slab's logits."""
    o = layer.options
    # any class of the slab will do: M and L are not the label's
    anyone = torch.where(ignored, o.ignore_index, 0)
    with reported():
        found = kernels.cross_entropy(Problem(z, anyone, None, replace(o, z_loss=0.0)))
    return found.M, found.L


def _labels(target: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """Return which labels are in the slab, and all as its classes, 0 where they are not."""
    here = (target >= classes.start) & (target < classes.stop)
    return here, torch.where(here, target - classes.start, 0)


def _label_weights(layer: Layer) -> Tensor:
    """w_t of each row; NaN where the label is no class, whatever it is where it is ignored."""
    here, t = _labels(layer.target, slice(0, len(layer.W)))
    weight = 1.0 if layer.weight is None else layer.weight[t]
    return torch.where(here, weight, torch.nan).to(layer.options.dtype)
