"""The last layer and its loss, a block of rows at a time: N × C logits never exist.

    z = x Wᵀ + b        dz = ∂Σℓ/∂z        dx = dz W        dW = dzᵀ x        db = Σ_r dz_r

The logits of a block live in one buffer, become their gradient in place, and are consumed by the
matrix products. dW and db are added up in float32 or better, and dx stays there until it has met
the upstream gradient: whatever the block, each is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from custom_ops import kernels
from custom_ops.kernels.options import Options, statistics_dtype
from custom_ops.kernels.targets import ignored_rows

__all__ = ["Blocks", "Outputs", "Products", "linear_cross_entropy", "linear_cross_entropy_vjp"]

#: What the logits of a block may take. Few rows make slow products: each reads all of W again.
BLOCK_BYTES = 48 << 20
LEAST_ROWS = 64


@dataclass(frozen=True)
class Blocks:
    """What is wanted of the last layer, and in how large blocks."""

    total: bool  #: Σℓ instead of a loss a row
    wanted: tuple[bool, bool, bool]  #: whether dx, dW, db are, of Σℓ
    rows: int | None  #: of a block; None for as many as `BLOCK_BYTES` allows

    def of(self, rows: int, classes: int, itemsize: int) -> int:
        """Return the rows of a block; all blocks but the last have as many."""
        most = self.rows or max(BLOCK_BYTES // max(classes * itemsize, 1), LEAST_ROWS)
        count = -(-rows // most) or 1
        return most if self.rows else -(-rows // count) or 1


class Products(NamedTuple):
    """dx, dW and db, None where not wanted; in float32 for the half types."""

    input: Tensor | None
    linear_weight: Tensor | None
    linear_bias: Tensor | None


class Outputs(NamedTuple):
    """What the pass over the rows found."""

    loss: Tensor  #: ℓ, one a row, or Σℓ
    M: Tensor
    L: Tensor
    prediction: Tensor | None
    products: Products


def linear_cross_entropy(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    o: Options,
    blocks: Blocks,
) -> Outputs:
    """Return ℓ or Σℓ, M, L, the prediction, and the gradient of Σℓ as far as it is wanted.

    x is (N, D), W (C, D), b (C,), the target (N,) or (N, C).
    """
    counted = _counted_rows(x, target, o)
    if counted is not None:
        found = linear_cross_entropy(x[counted], W, b, target[counted], weight, o, blocks)
        return _spread(found, counted, len(x))
    x = _blank_ignored(x, target, o)
    rows, N = x.new_empty, len(x)
    loss, M, L = (rows(N, dtype=o.dtype) for _ in range(3))
    prediction = rows(N, dtype=torch.int64) if o.predict else None
    sums = _Sums(x, W, b, blocks)
    one = loss.new_ones(()).expand(N)
    for part, z in _logits(x, W, b, blocks):
        t = target[part]
        loss[part], M[part], L[part], predicted = kernels.cross_entropy(z, t, weight, o)
        if prediction is not None:
            prediction[part] = predicted
        if any(blocks.wanted):
            dz = kernels.cross_entropy_vjp_(z, t, weight, one[part], None, M[part], L[part], o)
            sums.add(part, dz)
    return Outputs(kernels.total(loss) if blocks.total else loss, M, L, prediction, sums.products())


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
    """Return dx, dW, db for the upstream gradients g of ℓ and h of lse, one a row."""
    counted = _counted_rows(x, target, o)
    if counted is not None:
        g, M, L = g[counted], M[counted], L[counted]
        h = None if h is None else h[counted]
        part = linear_cross_entropy_vjp(
            x[counted], W, b, target[counted], weight, g, h, M, L, o, blocks
        )
        return part._replace(input=_spread_rows(part.input, counted, len(x)))
    x = _blank_ignored(x, target, o)
    sums = _Sums(x, W, b, blocks)
    for part, z in _logits(x, W, b, blocks):
        hs = None if h is None else h[part]
        sums.add(
            part,
            kernels.cross_entropy_vjp_(z, target[part], weight, g[part], hs, M[part], L[part], o),
        )
    return sums.products()


def _logits(x: Tensor, W: Tensor, b: Tensor | None, blocks: Blocks):  # type: ignore[no-untyped-def]
    """Yield each block's rows and logits, all in the same memory."""
    N, C = len(x), len(W)
    size = blocks.of(N, C, x.element_size())
    buffer = kernels.advised(x.new_empty(min(size, N), C))
    for start in range(0, N, size):
        part = slice(start, min(start + size, N))
        z = buffer[: part.stop - start]
        if b is None:
            torch.mm(x[part], W.t(), out=z)
        else:
            torch.addmm(b, x[part], W.t(), out=z)
        yield part, z


class _Sums:
    """dx, dW and db while the blocks come in."""

    def __init__(self, x: Tensor, W: Tensor, b: Tensor | None, blocks: Blocks) -> None:
        self.x, self.W = x, W
        dtype = statistics_dtype(x.dtype)
        wants_x, wants_W, wants_b = blocks.wanted
        self.dx = x.new_empty(x.shape, dtype=dtype) if wants_x else None
        self.dW = kernels.advised(W.new_empty(W.shape, dtype=dtype)).zero_() if wants_W else None
        self.db = b.new_zeros(b.shape, dtype=dtype) if wants_b and b is not None else None

    def add(self, part: slice, dz: Tensor) -> None:
        if self.dx is not None:
            if self.dx.dtype == dz.dtype:
                torch.mm(dz, self.W, out=self.dx[part])
            else:
                self.dx[part] = torch.mm(dz, self.W)
        if self.dW is not None:
            self.dW.addmm_(dz.t().to(self.dW.dtype), self.x[part].to(self.dW.dtype))
        if self.db is not None:
            self.db += dz.sum(0, dtype=self.db.dtype)

    def products(self) -> Products:
        return Products(self.dx, self.dW, self.db)


def _counted_rows(x: Tensor, target: Tensor, o: Options) -> Tensor | None:
    """Return the rows that count, where some do not and asking does not wait for a device."""
    if target.is_floating_point() or not _can_be_read(target):
        return None
    ignored = ignored_rows(target, o)
    return (~ignored).nonzero().squeeze(1) if ignored.any() else None


def _can_be_read(x: Tensor) -> bool:
    return x.device.type == "cpu" and type(x) is Tensor


def _blank_ignored(x: Tensor, target: Tensor, o: Options) -> Tensor:
    """Return x with 0 in the rows that are ignored: 0 · NaN would reach dW."""
    if target.is_floating_point() or _can_be_read(target):
        return x
    return x.masked_fill(ignored_rows(target, o).unsqueeze(1), 0.0)


def _spread(found: Outputs, counted: Tensor, N: int) -> Outputs:
    loss = found.loss if found.loss.dim() == 0 else _spread_rows(found.loss, counted, N)
    M, L = _spread_rows(found.M, counted, N), _spread_rows(found.L, counted, N)
    prediction = _spread_rows(found.prediction, counted, N, -1)
    dx = _spread_rows(found.products.input, counted, N)
    return Outputs(loss, M, L, prediction, found.products._replace(input=dx))


def _spread_rows(x: Tensor | None, counted: Tensor, N: int, fill: float = 0.0) -> Tensor | None:
    """Return the counted rows among all N, the others filled."""
    if x is None:
        return None
    return x.new_full((N, *x.shape[1:]), fill).index_copy_(0, counted, x)
