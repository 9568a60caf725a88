"""The product with the Hessian, a block of rows at a time.

With cotangents or tangents v = (v_x, v_W, v_b) of (x, W, b), u = v_x Wᵀ + x v_Wᵀ + v_b is the
change of the logits and H u = ∂⟨u, dz⟩/∂z that of their gradient. Then

    H_x = H u W + dz v_W        H_W = (H u)ᵀ x + dzᵀ v_x        H_b = Σ_r (H u)_r

Nothing here is differentiated, and nothing watches the operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import kernels
from custom_ops.kernels import Options, Rows, statistics_dtype
from custom_ops.last_layer.layer import Layer, Products
from custom_ops.last_layer.plan import parts, rows_at_a_time
from custom_ops.last_layer.products import Sums, fresh_logits
from custom_ops.last_layer.readable import blank
from custom_ops.surroundings import is_watched

__all__ = ["hvp", "takes_hvp"]


def takes_hvp(o: Options, *tensors: Tensor | None) -> bool:
    """Whether `hvp` can answer: a kernel is there, and logits are as they are."""
    identity = o.softcap is None and o.logit_scale == 1
    same = all(t is None or statistics_dtype(t.dtype) == o.dtype for t in tensors[:2])
    return identity and same and kernels.takes_hvp(*tensors) and not is_watched()


def hvp(layer: Layer, rows: Rows, v: Products) -> tuple[Products, Tensor, Tensor]:
    """Return the gradients of ⟨v, (dx, dW, db)⟩: to (x, W, b), to g and to q.

    One buffer for both, one above the other: z, which becomes dz, and u, which becomes H u. So the
    products with W, and those with x and v_x, are one product each.
    """
    layer = blank(layer)
    x, W, *_ = layer
    size = min(rows_at_a_time(layer, 2 * len(W) * x.element_size()), len(x))
    sums = Sums(layer, layer.blocks.wanted, one_block=size == len(x))
    d_g, d_q = torch.empty_like(rows.M), torch.empty_like(rows.M)
    buffer = fresh_logits(x, 2 * size, len(W))
    for part in parts(x, size):
        n = part.stop - part.start
        both = buffer[: 2 * n]
        z, u = both[:n], both[n:]
        xs = x[part] if v.x is None else torch.cat((x[part], v.x[part]))
        torch.mm(xs, W.t(), out=both[: len(xs)])
        if layer.b is not None:
            z += layer.b
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
