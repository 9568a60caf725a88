"""The maps of two tensors: one sum a row, then an element-wise map.

contract            v ↦ p ⊙ (v − Σ_k p_k v_k)      J v = vᵀJ, J = diag(p) − p pᵀ
log_softmax_vjp     v ↦ v − p Σ_k v_k              p = exp(y)
log_softmax_jvp     v ↦ v − Σ_k p_k v_k            p = exp(y)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arithmetic import vanishing_exp
from custom_ops.kernels.cuda.launch import ACCUMULATORS, launch, on_device, tile_of
from custom_ops.kernels.cuda.layout import fresh_like, unview, view, view_like
from custom_ops.kernels.cuda.rows import cells, dense, multiples, place
from custom_ops.kernels.cuda.tiles import tiles
from custom_ops.kernels.problem import statistics_dtype

__all__ = ["contract", "log_softmax_jvp", "log_softmax_vjp"]


@triton.jit
def terms(p, v, MAP: tl.constexpr):
    """What is summed over the classes."""
    if MAP == "contract":
        return p * v
    if MAP == "log_softmax_vjp":
        return v
    return vanishing_exp(p) * v


@triton.jit
def mapped(p, v, total, MAP: tl.constexpr):
    """The result, from the row's sum."""
    if MAP == "contract":
        return p * (v - total)
    if MAP == "log_softmax_vjp":
        return v - vanishing_exp(p) * total
    return v - total


@triton.jit
def read(p, v, r, k, rows, classes, inner, stride, ACC: tl.constexpr):
    """The tiles, 0 in the padding, which adds nothing to the sum; the padding, and where v lies."""
    inside = (r < rows)[:, None] & (k < classes)[None, :]
    a = tl.load(p + cells(r, k, inner, stride), mask=inside, other=0.0).to(ACC)
    at = cells(r, k, inner, dense(classes, inner))
    return a, tl.load(v + at, mask=inside, other=0.0).to(ACC), inside, at


@triton.jit(do_not_specialize=["rows"])
def map_whole(
    p,
    v,
    out,
    rows,
    classes,
    inner,
    stride,
    MAP: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Rows that fit in a tile."""
    rows, classes, inner, stride = multiples(rows, classes, inner, stride, UNITS)
    r, k, _ = place(rows, 1, ROWS, BLOCK)
    a, b, inside, at = read(p, v, r, k, rows, classes, inner, stride, ACC)
    total = tl.sum(terms(a, b, MAP), 1)
    tl.store(out + at, mapped(a, b, total[:, None], MAP), mask=inside)


@triton.jit(do_not_specialize=["rows", "chunks"])
def map_partial(
    p,
    v,
    partials,
    rows,
    classes,
    inner,
    stride,
    chunks,
    MAP: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The sum of each chunk: partials[r, chunk]."""
    rows, classes, inner, stride = multiples(rows, classes, inner, stride, UNITS)
    r, k, chunk = place(rows, chunks, ROWS, BLOCK)
    a, b, _, _ = read(p, v, r, k, rows, classes, inner, stride, ACC)
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
    chunks,
    MAP: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The results of a chunk, from the sums of all chunks of its row."""
    rows, classes, inner, stride = multiples(rows, classes, inner, stride, UNITS)
    r, k, _ = place(rows, chunks, ROWS, BLOCK)
    j = tl.arange(0, CHUNKS)
    known = (r < rows)[:, None] & (j < chunks)[None, :]
    at = (r.to(tl.int64) * chunks)[:, None] + j[None, :]
    total = tl.sum(tl.load(partials + at, mask=known, other=0.0), 1)
    a, b, inside, at = read(p, v, r, k, rows, classes, inner, stride, ACC)
    tl.store(out + at, mapped(a, b, total[:, None], MAP), mask=inside)


def _launch(p: Tensor, v: Tensor, dim: int, name: str) -> Tensor:
    x = view(p, dim)
    u, out = view_like(x, v, dim), fresh_like(x)
    if p.numel() == 0:
        return unview(out, dim)
    dtype = statistics_dtype(p.dtype)
    t = tiles(x.classes, x.inner, dtype, tensors=2)
    kind = {"MAP": name, "ACC": ACCUMULATORS[dtype], **tile_of(x.sizes, t)}
    programs, tensors = t.programs(x.rows), (x.tensor, u.tensor)
    with on_device(p):
        if t.chunks == 1:
            launch(map_whole, programs, (*tensors, out.tensor), x.sizes, kind)
        else:
            partials = torch.empty(x.rows, t.chunks, dtype=dtype, device=p.device)
            sizes = (*x.sizes, t.chunks)
            launch(map_partial, programs, (*tensors, partials), sizes, kind)
            launch(map_chunks, programs, (*tensors, out.tensor, partials), sizes, kind)
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
