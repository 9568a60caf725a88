"""The maps of two tensors: one sum a row, then an element-wise map.

contract            v ↦ p ⊙ (v − Σ_k p_k v_k)      J v = vᵀJ, J = diag(p) − p pᵀ
log_softmax_vjp     v ↦ v − p Σ_k v_k              p = exp(y)
log_softmax_jvp     v ↦ v − Σ_k p_k v_k            p = exp(y)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.launch import ACCUMULATORS, on_device
from custom_ops.kernels.cuda.layout import fresh_like, unview, view, view_like
from custom_ops.kernels.cuda.rows import place, row_starts
from custom_ops.kernels.cuda.tiles import power_of_two, tiles
from custom_ops.kernels.options import statistics_dtype

__all__ = ["contract", "log_softmax_jvp", "log_softmax_vjp"]


@triton.jit
def terms(p, v, MAP: tl.constexpr):
    """What is summed over the classes."""
    if MAP == "contract":
        return p * v
    if MAP == "log_softmax_vjp":
        return v
    return tl.exp(p) * v


@triton.jit
def mapped(p, v, total, MAP: tl.constexpr):
    """The result, from the row's sum."""
    if MAP == "contract":
        return p * (v - total)
    if MAP == "log_softmax_vjp":
        return v - tl.exp(p) * total
    return v - total


@triton.jit
def read(x, starts, k, inside, inner, ACC: tl.constexpr):
    """A tile, 0 in the padding: it adds nothing to the sum."""
    at = starts[:, None] + (k.to(tl.int64) * inner)[None, :]
    return tl.load(x + at, mask=inside, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["rows"])
def map_whole(
    p,
    v,
    out,
    rows,
    classes,
    inner,
    stride,
    dense,
    MAP: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows that fit in a tile."""
    r, k, _ = place(rows, 1, ROWS, BLOCK)
    inside = (r < rows)[:, None] & (k < classes)[None, :]
    starts = row_starts(r, inner, dense)
    a = read(p, row_starts(r, inner, stride), k, inside, inner, ACC)
    b = read(v, starts, k, inside, inner, ACC)
    total = tl.sum(terms(a, b, MAP), 1)
    to = starts[:, None] + (k.to(tl.int64) * inner)[None, :]
    tl.store(out + to, mapped(a, b, total[:, None], MAP), mask=inside)


@triton.jit(do_not_specialize=["rows", "chunks"])
def map_partial(
    p,
    v,
    partials,
    rows,
    classes,
    inner,
    stride,
    dense,
    chunks,
    MAP: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of each chunk: partials[r, chunk]."""
    r, k, chunk = place(rows, chunks, ROWS, BLOCK)
    inside = (r < rows)[:, None] & (k < classes)[None, :]
    a = read(p, row_starts(r, inner, stride), k, inside, inner, ACC)
    b = read(v, row_starts(r, inner, dense), k, inside, inner, ACC)
    total = tl.sum(terms(a, b, MAP), 1)
    tl.store(partials + r.to(tl.int64) * chunks + chunk, total, mask=r < rows)


@triton.jit(do_not_specialize=["rows", "chunks"])
def map_chunks(
    p,
    v,
    out,
    partials,
    rows,
    classes,
    inner,
    stride,
    dense,
    chunks,
    MAP: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The results of a chunk, from the sums of all chunks of its row."""
    r, k, _ = place(rows, chunks, ROWS, BLOCK)
    j = tl.arange(0, CHUNKS)
    known = (r < rows)[:, None] & (j < chunks)[None, :]
    at = (r.to(tl.int64) * chunks)[:, None] + j[None, :]
    total = tl.sum(tl.load(partials + at, mask=known, other=0.0), 1)
    inside = (r < rows)[:, None] & (k < classes)[None, :]
    starts = row_starts(r, inner, dense)
    a = read(p, row_starts(r, inner, stride), k, inside, inner, ACC)
    b = read(v, starts, k, inside, inner, ACC)
    to = starts[:, None] + (k.to(tl.int64) * inner)[None, :]
    tl.store(out + to, mapped(a, b, total[:, None], MAP), mask=inside)


def _launch(p: Tensor, v: Tensor, dim: int, name: str) -> Tensor:
    x = view(p, dim)
    u, out = view_like(x, v, dim), fresh_like(x)
    if p.numel() == 0:
        return unview(out, dim)
    dtype = statistics_dtype(p.dtype)
    t = tiles(x.classes, x.inner, dtype, tensors=2)
    shape = {"ACC": ACCUMULATORS[dtype], "ROWS": t.rows, "BLOCK": t.classes, "num_warps": t.warps}
    grid = (t.programs(x.rows),)
    with on_device(p):
        if t.chunks == 1:
            map_whole[grid](x.tensor, u.tensor, out.tensor, *x.sizes, u.stride, name, **shape)
        else:
            partials = torch.empty(x.rows, t.chunks, dtype=dtype, device=p.device)
            sizes = (*x.sizes, u.stride, t.chunks, name)
            map_partial[grid](x.tensor, u.tensor, partials, *sizes, **shape)
            map_chunks[grid](
                x.tensor,
                u.tensor,
                out.tensor,
                partials,
                *sizes,
                CHUNKS=power_of_two(t.chunks),
                **shape,
            )
    return unview(out, dim)


def contract(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """p ⊙ (v − ⟨p, v⟩)."""
    return _launch(p, v, dim, "contract")


def log_softmax_vjp(y: Tensor, v: Tensor, dim: int) -> Tensor:
    """v − p Σ_k v_k, with p = exp(y)."""
    return _launch(y, v, dim, "log_softmax_vjp")


def log_softmax_jvp(y: Tensor, v: Tensor, dim: int) -> Tensor:
    """v − ⟨p, v⟩, with p = exp(y)."""
    return _launch(y, v, dim, "log_softmax_jvp")
