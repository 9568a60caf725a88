"""The last layer with the classes outermost: `plan`'s second order, for labels without smoothing.

A pass over slabs of classes finds M and L of each slab, and with them those of the rows:

    M = max_j M_j        L = log Σ_j exp((M_j − M) + L_j)        ℓ = w_t ((M − z_t) + L) + λ·lse²

A second pass turns each slab's logits into dz; dW of the slab is one product over all rows, so it
is rounded once, whatever the slab. The kernels see a slab as a cross-entropy of its classes. A row
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
from custom_ops.kernels import Found, Problem, Rows
from custom_ops.kernels.eager import capped
from custom_ops.kernels.eager.targets import ignored_rows
from custom_ops.kernels.labels import reported
from custom_ops.last_layer.layer import Layer, Products
from custom_ops.last_layer.products import put_product_

__all__ = ["Memory", "Slabs", "backward", "forward"]


class Memory(NamedTuple):
    """Where logits lie until the backward: those of the first D rows in dW, then of some more."""

    dW: Tensor  #: (C, D), the gradient's own memory
    more: Tensor  #: (rows, C)

    def rows(self, N: int) -> tuple[slice, slice, slice]:
        """Return the rows in dW, the rows in `more`, and those that are kept nowhere."""
        low = min(N, self.dW.shape[1])
        high = min(N, low + len(self.more))
        return slice(0, low), slice(low, high), slice(high, N)

    def of(self, classes: slice, N: int) -> tuple[Tensor, Tensor]:
        """Return the logits of these classes, as far as they are kept."""
        a, b, (low, high, _) = classes.start, classes.stop, self.rows(N)
        kept = []
        for memory, part in ((self.dW, low), (self.more, high)):
            n, width = part.stop - part.start, memory.numel() // len(self.dW)
            kept.append(memory.view(-1)[a * width :][: n * (b - a)].view(n, b - a))
        return kept[0], kept[1]


class Slabs(NamedTuple):
    """A layer, so many of its classes at a time."""

    layer: Layer
    size: int
    memory: Memory

    def __iter__(self) -> Iterator[slice]:  # type: ignore[override]
        """Yield the classes of each slab."""
        C = len(self.layer.W)
        return (slice(a, min(a + self.size, C)) for a in range(0, C, self.size))

    def put_logits_(self, out: Tensor, rows: slice, classes: slice) -> None:
        """out = x Wᵀ + b of these rows and classes."""
        x, W, b, *_ = self.layer
        if b is None:
            torch.mm(x[rows], W[classes].t(), out=out)
        else:
            torch.addmm(b[classes], x[rows], W[classes].t(), out=out)

    def problem(self, z: Tensor, classes: slice, target: Tensor) -> Problem:
        """Return the cross-entropy of a slab's logits z, with labels among its classes."""
        weight = self.layer.weight
        return Problem(z, target, None if weight is None else weight[classes], self.layer.options)


def forward(slabs: Slabs) -> Found:
    """Return ℓ, M and L, one a row; the logits of the first rows are left in the memory."""
    layer, N = slabs.layer, len(slabs.layer.x)
    o, target = layer.options, layer.target
    ignored = ignored_rows(target, o)
    M = layer.x.new_full((N,), -torch.inf, dtype=o.dtype)
    S, z_t = torch.zeros_like(M), torch.full_like(M, torch.nan)  # NaN where t is no class
    for classes in slabs:
        for rows, z in _logits(slabs, classes):
            # any class of the slab will do: M and L are not the label's
            anyone = torch.where(ignored[rows], o.ignore_index, 0)
            plain = replace(o, z_loss=0.0, stats=False)
            with reported():
                problem = slabs.problem(z, classes, anyone)._replace(options=plain, weight=None)
                _, m, L, *_ = kernels.cross_entropy(problem)
            largest = torch.maximum(M[rows], m)
            of_slab = torch.where(m == -torch.inf, 0.0, ((m - largest) + L).exp())
            before = torch.where(M[rows] == -torch.inf, 0.0, (M[rows] - largest).exp())
            S[rows], M[rows] = S[rows] * before + of_slab, largest
            here, t = _labels(target[rows], classes)
            of_label, _, _ = capped(z.gather(1, t.unsqueeze(1)).squeeze(1), o)
            z_t[rows] = torch.where(here, of_label, z_t[rows])
    L = S.log()
    loss = _weights(layer) * ((M - z_t) + L) + o.z_loss * (M + L) ** 2
    return Found(*(x.masked_fill(ignored, 0.0) for x in (loss, M, L)), None, None)


def backward(slabs: Slabs, rows: Rows) -> Products:
    """Return dx, dW, db for the upstream gradients of the rows; dW is the memory's."""
    layer, dW, N = slabs.layer, slabs.memory.dW, len(slabs.layer.x)
    x, W, b, target, _, o, _ = layer
    ignored = ignored_rows(target, o)
    a = rows.g * (_weights(layer) + 2 * o.z_loss * (rows.M + rows.L))
    a = a if rows.q is None else a + rows.q
    dx = x.new_empty(x.shape, dtype=o.dtype)
    db = None if b is None else b.new_empty(b.shape, dtype=o.dtype)
    buffer = x.new_empty(N * min(slabs.size, len(W)))
    for classes in slabs:
        dz = buffer[: N * (classes.stop - classes.start)].view(N, -1)
        for part, kept in zip(slabs.memory.rows(N), slabs.memory.of(classes, N), strict=False):
            dz[part] = kept
        *_, again = slabs.memory.rows(N)
        slabs.put_logits_(dz[again], again, classes)
        here, t = _labels(target, classes)
        of_slab = Rows(torch.where(here, rows.g, 0.0), rows.q, rows.M, rows.L)
        q = torch.zeros_like(a) if rows.q is None else rows.q
        of_slab = of_slab._replace(q=torch.where(here, q, a))
        labels = torch.where(ignored, o.ignore_index, t)
        plain = slabs.problem(dz, classes, labels)
        kernels.cross_entropy_vjp_(plain, of_slab)
        torch.mm(dz.t(), x, out=dW[classes])
        put_product_(dx, dz, W[classes], beta=int(classes.start > 0))
        if db is not None:
            db[classes] = dz.sum(0, dtype=o.dtype)
    return Products(dx, dW, db)


def _logits(slabs: Slabs, classes: slice) -> Iterator[tuple[slice, Tensor]]:
    """Yield a slab's rows and logits: those that are kept, where they are kept, then the others."""
    N = len(slabs.layer.x)
    low, high, again = slabs.memory.rows(N)
    fresh = slabs.layer.x.new_empty(again.stop - again.start, classes.stop - classes.start)
    for rows, z in zip((low, high, again), (*slabs.memory.of(classes, N), fresh), strict=True):
        if len(z):
            slabs.put_logits_(z, rows, classes)
            yield rows, z


def _labels(target: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """Return which labels are in the slab, and all as its classes, 0 where they are not."""
    here = (target >= classes.start) & (target < classes.stop)
    return here, torch.where(here, target - classes.start, 0)


def _weights(layer: Layer) -> Tensor:
    """w_t of each row; 1 where the label is no class, whose row is NaN or does not count."""
    N, C = len(layer.x), len(layer.W)
    if layer.weight is None:
        return layer.x.new_ones(N, dtype=layer.options.dtype)
    here, t = _labels(layer.target, slice(0, C))
    return torch.where(here, layer.weight[t], 1.0)
