"""The last layer and its loss, a block of rows at a time: N × C logits never exist.

    z = x Wᵀ + b        dz = ∂Σℓ/∂z        dx = dz W        dW = dzᵀ x        db = Σ_r dz_r

The logits of a block live in one buffer, become their gradient in place, and are consumed by the
matrix products. dW and db are added up in float32 or better, and dx stays there until it has met
the upstream gradient: whatever the block, each is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor

from custom_ops import kernels
from custom_ops.kernels.options import Options, statistics_dtype
from custom_ops.kernels.plain import can_be_read
from custom_ops.kernels.targets import ignored_rows
from custom_ops.surroundings import is_watched

__all__ = [
    "Blocks",
    "Outputs",
    "Products",
    "linear_cross_entropy",
    "linear_cross_entropy_hvp",
    "linear_cross_entropy_vjp",
    "takes_hvp",
]


class Budget(NamedTuple):
    """How large a block may be."""

    bytes: int  #: of its logits
    least: int  #: rows even so; few make slow products, as each block reads all of W again


#: On a CPU memory is the goal.
BUDGET = Budget(50 << 20, 64)
#: A GPU does 300 half-precision operations in the time of a byte (H100: 989 TFLOP/s, 3.35 TB/s).
#: Of a block of n rows, dW += dzᵀ x is the product that moves most: 2nCD operations, while 8CD
#: bytes of float32 dW are read and written and 2nC of dz are read, n / (4 + n/D) operations a byte.
#: At D = 4096 that is 48 with the 195 rows that the CPU's budget leaves of 128,256 classes, and 460
#: with the 2092 that 512 MiB leave. float32 dW itself takes more there: 2.1 GB, twice the bytes of
#: the bfloat16 gradient that it becomes.
CUDA_BUDGET = Budget(512 << 20, 256)


@dataclass(frozen=True)
class Blocks:
    """What is wanted of the last layer, and in how large blocks."""

    total: bool  #: Σℓ instead of a loss a row
    wanted: tuple[bool, bool, bool]  #: whether dx, dW, db are, of Σℓ
    rows: int | None  #: of a block; None for as many as the device's budget allows

    def of(self, x: Tensor, logit_bytes: int, least: int | None = None) -> int:
        """Return the rows of a block of x whose logits take `logit_bytes` a row."""
        if self.rows:
            return self.rows
        rows, budget = len(x), CUDA_BUDGET if x.device.type == "cuda" else BUDGET
        most = max(budget.bytes // max(logit_bytes, 1), least or budget.least)
        count = -(-rows // most)  # as many blocks as that makes, all of a size
        return -(-rows // max(count, 1)) or 1


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
    counted = _counted_rows(target, o)
    if counted is not None:
        found = linear_cross_entropy(x[counted], W, b, target[counted], weight, o, blocks)
        return _spread(found, counted, len(x))
    x = x if can_be_read(target) else _blank(x, target, o)
    rows, N = x.new_empty, len(x)
    loss, M, L = (rows(N, dtype=o.dtype) for _ in range(3))
    prediction = rows(N, dtype=torch.int64) if o.predict else None
    sums = _Sums(x, W, b, blocks)
    one = loss.new_ones(()).expand(N)
    for part, z in _logits(x, W, b, blocks):
        t = target[part]
        loss[part], M[part], L[part], predicted = kernels.cross_entropy(z, t, weight, o)
        if prediction is not None and predicted is not None:
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
    counted = _counted_rows(target, o)
    if counted is not None:
        g, M, L = g[counted], M[counted], L[counted]
        h = None if h is None else h[counted]
        found = linear_cross_entropy_vjp(
            x[counted], W, b, target[counted], weight, g, h, M, L, o, blocks
        )
        return found._replace(input=_spread_rows(found.input, counted, len(x)))
    x = x if can_be_read(target) else _blank(x, target, o)
    sums = _Sums(x, W, b, blocks)
    for part, z in _logits(x, W, b, blocks):
        hs = None if h is None else h[part]
        sums.add(
            part,
            kernels.cross_entropy_vjp_(z, target[part], weight, g[part], hs, M[part], L[part], o),
        )
    return sums.products()


def takes_hvp(o: Options, *tensors: Tensor | None) -> bool:
    """Whether `linear_cross_entropy_hvp` can answer: a kernel is there, logits are as they are."""
    identity = o.softcap is None and o.logit_scale == 1
    same = all(t is None or statistics_dtype(t.dtype) == o.dtype for t in tensors[:2])
    return identity and same and kernels.takes_hvp(*tensors) and not is_watched()


def linear_cross_entropy_hvp(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    g: Tensor,
    h: Tensor | None,
    M: Tensor,
    L: Tensor,
    v: Products,
    o: Options,
    blocks: Blocks,
) -> tuple[Products, Tensor, Tensor]:
    """Return what v, a cotangent of (dx, dW, db), is to (x, W, b), and to g and h.

    One buffer for both, one above the other: z, which becomes dz, and u = v_x Wᵀ + x v_Wᵀ + v_b,
    which becomes r. So the products with W, and those with x and v_x, are one product each.
    """
    x, (v_x, v_W, v_b) = _blank(x, target, o), v
    sums = _Sums(x, W, b, blocks)
    d_g, d_h = torch.empty_like(M), torch.empty_like(M)
    N, C = len(x), len(W)
    size = blocks.of(x, C * x.element_size())
    buffer = kernels.advised(x.new_empty(2 * min(size, N), C))
    for part, n in _parts(N, size):
        both = buffer[: 2 * n]
        z, u = both[:n], both[n:]
        rows = x[part] if v_x is None else torch.cat((x[part], v_x[part]))
        torch.mm(rows, W.t(), out=both[: len(rows)])
        if b is not None:
            z += b
        if v_W is not None:
            torch.addmm(u, x[part], v_W.t(), beta=int(v_x is not None), out=u)
        elif v_x is None:
            u.zero_()
        if v_b is not None:
            u += v_b
        hs = None if h is None else h[part]
        d_g[part], d_h[part] = kernels.cross_entropy_hvp_(
            z, target[part], weight, u, g[part], hs, M[part], L[part], o
        )
        sums.add_dx(part, u, W)
        if v_W is not None:
            sums.add_dx(part, z, v_W, beta=1)
        if v_x is None:
            sums.add_dW(u, x[part])
        else:
            sums.add_dW(both, torch.cat((v_x[part], x[part])))
        sums.add_db(u)
    return sums.products(), d_g, d_h


def _parts(N: int, size: int) -> Iterator[tuple[slice, int]]:
    """Yield each block's rows, and how many they are."""
    for start in range(0, N, size):
        stop = min(start + size, N)
        yield slice(start, stop), stop - start


def _logits(
    x: Tensor, W: Tensor, b: Tensor | None, blocks: Blocks
) -> Iterator[tuple[slice, Tensor]]:
    """Yield each block's rows and logits, all in the same memory."""
    N, C = len(x), len(W)
    size = blocks.of(x, C * x.element_size())
    buffer = kernels.advised(x.new_empty(min(size, N), C))
    for part, n in _parts(N, size):
        z = buffer[:n]
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
        self.dW = kernels.advised(W.new_empty(W.shape, dtype=dtype)) if wants_W else None
        self.dW_is_empty = True
        self.db = b.new_zeros(b.shape, dtype=dtype) if wants_b and b is not None else None

    def add(self, part: slice, dz: Tensor) -> None:
        """Add dz W, dzᵀ x and Σ dz."""
        self.add_dx(part, dz, self.W)
        self.add_dW(dz, self.x[part])
        self.add_db(dz)

    def add_dx(self, part: slice, dz: Tensor, W: Tensor, beta: int = 0) -> None:
        """Add dz W, or with β = 0 begin with it."""
        if self.dx is not None:
            kernels.put_product_(self.dx[part], dz, W, beta)

    def add_dW(self, dz: Tensor, x: Tensor) -> None:
        """Add dzᵀ x."""
        if self.dW is not None:
            kernels.add_product_(self.dW, dz, x, first=self.dW_is_empty)
            self.dW_is_empty = False

    def add_db(self, dz: Tensor) -> None:
        """Add Σ dz."""
        if self.db is not None:
            self.db += dz.sum(0, dtype=self.db.dtype)

    def products(self) -> Products:
        """Return the sums; of no block they are 0."""
        if self.dW is not None and self.dW_is_empty:
            self.dW.zero_()
        return Products(self.dx, self.dW, self.db)


def _counted_rows(target: Tensor, o: Options) -> Tensor | None:
    """Return the rows that count, where some do not and asking does not wait for a device."""
    if target.is_floating_point() or not can_be_read(target):
        return None
    ignored = ignored_rows(target, o)
    return (~ignored).nonzero().squeeze(1) if ignored.any() else None


def _blank(x: Tensor, target: Tensor, o: Options) -> Tensor:
    """Return x with 0 in the rows that are ignored: 0 · NaN would reach dW."""
    if target.is_floating_point():
        return x
    return x.masked_fill(ignored_rows(target, o).unsqueeze(1), 0.0)


def _spread(found: Outputs, counted: Tensor, N: int) -> Outputs:
    loss = found.loss if found.loss.dim() == 0 else _spread_rows(found.loss, counted, N)
    M, L = _spread_rows(found.M, counted, N), _spread_rows(found.L, counted, N)
    prediction = _spread_rows(found.prediction, counted, N, -1)
    dx = _spread_rows(found.products.input, counted, N)
    return Outputs(loss, M, L, prediction, found.products._replace(input=dx))


@overload
def _spread_rows(x: Tensor, counted: Tensor, N: int, fill: float = ...) -> Tensor: ...
@overload
def _spread_rows(x: None, counted: Tensor, N: int, fill: float = ...) -> None: ...
def _spread_rows(x: Tensor | None, counted: Tensor, N: int, fill: float = 0.0) -> Tensor | None:
    """Return the counted rows among all N, the others filled."""
    if x is None:
        return None
    return x.new_full((N, *x.shape[1:]), fill).index_copy_(0, counted, x)
