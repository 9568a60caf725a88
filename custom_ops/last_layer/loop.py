"""The kernels over blocks of rows: one buffer of logits, which become their gradient in place.

    z = x Wᵀ + b        dz = ∂Σℓ/∂z        dx = dz W        dW = dzᵀ x        db = Σ_r dz_r

Nothing here is differentiated, and nothing watches the operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, overload

import torch
from torch import Tensor

from custom_ops import kernels
from custom_ops.kernels import Found, Options, Rows, statistics_dtype
from custom_ops.kernels.eager.targets import ignored_rows
from custom_ops.kernels.labels import reported
from custom_ops.kernels.plain import can_be_read
from custom_ops.last_layer.layer import Layer, Products
from custom_ops.last_layer.products import Sums, advised
from custom_ops.surroundings import is_watched

__all__ = ["Pass", "backward", "forward", "hvp", "takes_hvp"]


#: Numbers of each logit that the eager kernels hold for the gradient of the entropy, at most.
TEMPORARIES = 8


class Pass(NamedTuple):
    """What the pass over the rows found."""

    found: Found  #: the loss is Σℓ where that is wanted
    products: Products  #: of Σℓ, as far as they are wanted


def forward(layer: Layer) -> Pass:
    """Return ℓ or Σℓ, the rows' statistics, and the gradient of Σℓ as far as it is wanted."""
    counted = _counted_rows(layer)
    if counted is not None:
        return _spread(forward(layer.part(counted)), counted, len(layer.x))
    layer = _readable(layer)
    o, blocks, N = layer.options, layer.blocks, len(layer.x)
    loss, M, L = (layer.x.new_empty(N, dtype=o.dtype) for _ in range(3))
    prediction = loss.new_empty(N, dtype=torch.int64) if o.stats else None
    entropy = torch.empty_like(loss) if o.stats else None
    all = Found(loss, M, L, prediction, entropy)
    sums, one = Sums(layer), loss.new_ones(()).expand(N)
    for part, z in _logits(layer):
        problem = layer.problem(z, part)
        with reported():
            of_rows = kernels.cross_entropy(problem)
        for whole, of_part in zip(all, of_rows, strict=True):
            if whole is not None and of_part is not None:
                whole[part] = of_part
        if any(blocks.wanted):
            rows = Rows(one, None, M, L).part(part)
            sums.add(part, kernels.cross_entropy_vjp_(problem, rows))
    found = all._replace(loss=kernels.total(loss)) if blocks.total else all
    return Pass(found, sums.products())


def backward(layer: Layer, rows: Rows) -> Products:
    """Return dx, dW, db for the upstream gradients of the rows."""
    counted = _counted_rows(layer)
    if counted is not None:
        found = backward(layer.part(counted), rows.part(counted))
        return found._replace(x=_spread_rows(found.x, counted, len(layer.x)))
    layer = _readable(layer)
    sums = Sums(layer)
    for part, z in _logits(layer, 1 if rows.e is None else TEMPORARIES):
        sums.add(part, kernels.cross_entropy_vjp_(layer.problem(z, part), rows.part(part)))
    return sums.products()


def takes_hvp(o: Options, *tensors: Tensor | None) -> bool:
    """Whether `hvp` can answer: a kernel is there, and logits are as they are."""
    identity = o.softcap is None and o.logit_scale == 1
    same = all(t is None or statistics_dtype(t.dtype) == o.dtype for t in tensors[:2])
    return identity and same and kernels.takes_hvp(*tensors) and not is_watched()


def hvp(layer: Layer, rows: Rows, v: Products) -> tuple[Products, Tensor, Tensor]:
    """Return the gradients of ⟨v, (dx, dW, db)⟩: to (x, W, b), to g and to q.

    One buffer for both, one above the other: z, which becomes dz, and u = v_x Wᵀ + x v_Wᵀ + v_b,
    which becomes H u. So the products with W, and those with x and v_x, are one product each.
    """
    layer = _blank(layer)
    x, W, b, *_ = layer
    sums = Sums(layer)
    d_g, d_q = torch.empty_like(rows.M), torch.empty_like(rows.M)
    logit_bytes = len(W) * x.element_size()
    size = min(layer.blocks.size(x, logit_bytes), len(x))
    buffer = advised(x.new_empty(2 * size, len(W)))
    for part in layer.blocks.parts(x, logit_bytes):
        n = part.stop - part.start
        both = buffer[: 2 * n]
        z, u = both[:n], both[n:]
        xs = x[part] if v.x is None else torch.cat((x[part], v.x[part]))
        torch.mm(xs, W.t(), out=both[: len(xs)])
        if b is not None:
            z += b
        _add_change_(u, x[part], v)
        problem = layer.problem(z, part)
        d_g[part], d_q[part] = kernels.cross_entropy_hvp_(problem, u, rows.part(part))
        sums.add_dx(part, u, W)
        if v.W is not None:
            sums.add_dx(part, z, v.W, beta=1)
        if v.x is None:
            sums.add_dW(u, x[part])
        else:
            sums.add_dW(both, torch.cat((v.x[part], x[part])))
        sums.add_db(u)
    return sums.products(), d_g, d_q


def _add_change_(u: Tensor, x: Tensor, v: Products) -> None:
    """Complete u, which holds v_x Wᵀ if there is a v_x, by x v_Wᵀ + v_b."""
    if v.W is not None:
        torch.addmm(u, x, v.W.t(), beta=int(v.x is not None), out=u)
    elif v.x is None:
        u.zero_()
    if v.b is not None:
        u += v.b


def _logits(layer: Layer, numbers: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Yield each block's rows and logits, all in the same memory.

    A block is as large as its memory allows where so many numbers of each logit exist at a time.
    """
    x, W, b, *_ = layer
    logit_bytes = len(W) * x.element_size() * numbers
    size = min(layer.blocks.size(x, logit_bytes), len(x))
    buffer = advised(x.new_empty(size, len(W)))
    for part in layer.blocks.parts(x, logit_bytes):
        z = buffer[: part.stop - part.start]
        if b is None:
            torch.mm(x[part], W.t(), out=z)
        else:
            torch.addmm(b, x[part], W.t(), out=z)
        yield part, z


def _counted_rows(layer: Layer) -> Tensor | None:
    """Return the rows that count, where some do not and asking does not wait for a device."""
    target = layer.target
    if target.is_floating_point() or not can_be_read(target):
        return None
    ignored = ignored_rows(target, layer.options)
    return (~ignored).nonzero().squeeze(1) if ignored.any() else None


def _readable(layer: Layer) -> Layer:
    """Return the layer without what an ignored row holds, where that has not been cut out."""
    return layer if can_be_read(layer.target) else _blank(layer)


def _blank(layer: Layer) -> Layer:
    """Return the layer with 0 in the rows of x that are ignored: 0 · NaN would reach dW."""
    if layer.target.is_floating_point():
        return layer
    ignored = ignored_rows(layer.target, layer.options).unsqueeze(1)
    return layer._replace(x=layer.x.masked_fill(ignored, 0.0))


def _spread(of_counted: Pass, counted: Tensor, N: int) -> Pass:
    """Return the pass over all N rows from that over the counted ones."""
    (loss, M, L, prediction, entropy), products = of_counted
    found = Found(
        loss if loss.dim() == 0 else _spread_rows(loss, counted, N),
        _spread_rows(M, counted, N),
        _spread_rows(L, counted, N),
        _spread_rows(prediction, counted, N, -1),
        _spread_rows(entropy, counted, N),
    )
    return Pass(found, products._replace(x=_spread_rows(products.x, counted, N)))


@overload
def _spread_rows(x: Tensor, counted: Tensor, N: int, fill: float = ...) -> Tensor: ...
@overload
def _spread_rows(x: None, counted: Tensor, N: int, fill: float = ...) -> None: ...
def _spread_rows(x: Tensor | None, counted: Tensor, N: int, fill: float = 0.0) -> Tensor | None:
    """Return the counted rows among all N, the others filled."""
    if x is None:
        return None
    return x.new_full((N, *x.shape[1:]), fill).index_copy_(0, counted, x)
