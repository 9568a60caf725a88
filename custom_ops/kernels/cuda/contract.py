"""The maps of two tensors: one sum a row, then an element-wise map.

contract            v ↦ p ⊙ (v − Σ_k p_k v_k)      J v = vᵀJ, J = diag(p) − p pᵀ
log_softmax_vjp     v ↦ v − p Σ_k v_k              p = exp(y)
log_softmax_jvp     v ↦ v − Σ_k p_k v_k            p = exp(y)
"""

import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arithmetic import vanishing_exp
from custom_ops.kernels.cuda.launch import fresh, launch, on_device
from custom_ops.kernels.cuda.layout import fresh_like, unview, view, view_like
from custom_ops.kernels.cuda.parameters import tile_of
from custom_ops.kernels.cuda.rows import chunk_cells, dense, multiples, place, placed
from custom_ops.kernels.cuda.tile import across, located, located_rest, read, write
from custom_ops.kernels.cuda.tiles import CHUNK, split_tiles, tiles
from custom_ops.kernels.cuda.turns import announced, awaited, counters, drawn, lead
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
def pair(p, v, r, tile, shape, KIND: tl.constexpr):
    """The tiles, 0 in the padding, which adds nothing to a sum; and where v and the result lie."""
    rows, classes, inner, _ = shape
    to = across(tile, r, inner, dense(classes, inner), KIND)
    a = read(p, tile, r < rows, 0.0, KIND).to(KIND.ACC)
    return a, read(v, to, r < rows, 0.0, KIND).to(KIND.ACC), to


@triton.jit(do_not_specialize=["rows"])
def map_whole(p, v, out, rows, sizes, MAP: tl.constexpr, KIND: tl.constexpr):
    """Rows that fit in a tile, or in two."""
    shape = multiples(rows, sizes, KIND)
    rows = shape[0]
    r, first, _ = place(rows, 1, KIND)
    a, b, to = pair(p, v, r, located(r, first, shape, KIND), shape, KIND)
    total = tl.sum(terms(a, b, MAP), 1)
    if KIND.REST > 0:
        c, d, to_rest = pair(p, v, r, located_rest(r, shape, KIND), shape, KIND)
        total += tl.sum(terms(c, d, MAP), 1)
        write(out, to_rest, r < rows, mapped(c, d, total[:, None], MAP), KIND)
    write(out, to, r < rows, mapped(a, b, total[:, None], MAP), KIND)


@triton.jit
def chunk_sum(p, v, partials, program, shape, chunks, MAP: tl.constexpr, KIND: tl.constexpr):
    """The sum of a chunk: partials[r, chunk]."""
    r, first, chunk = placed(program, shape[0], chunks, KIND)
    a, b, _ = pair(p, v, r, located(r, first, shape, KIND), shape, KIND)
    to = partials + r.to(tl.int64) * chunks + chunk
    tl.store(to, tl.sum(terms(a, b, MAP), 1), mask=r < shape[0])


@triton.jit
def chunk_map(p, v, out, partials, program, shape, chunks, MAP: tl.constexpr, KIND: tl.constexpr):
    """The results of a chunk, from the sums of all chunks of its row."""
    rows = shape[0]
    r, first, _ = placed(program, rows, chunks, KIND)
    at, known = chunk_cells(r, rows, chunks, KIND)
    total = tl.sum(tl.load(partials + at, mask=known, other=0.0), 1)
    a, b, to = pair(p, v, r, located(r, first, shape, KIND), shape, KIND)
    write(out, to, r < rows, mapped(a, b, total[:, None], MAP), KIND)


@triton.jit(do_not_specialize=["rows", "chunks", "lead"])
def map_chunks(
    p, v, out, partials, counters, rows, sizes, chunks, lead, MAP: tl.constexpr, KIND: tl.constexpr
):
    """Longer rows, as `turns` has it."""
    shape = multiples(rows, sizes, KIND)
    program = drawn(counters)
    behind = program - lead
    if program < tl.num_programs(0) - lead:
        chunk_sum(p, v, partials, program, shape, chunks, MAP, KIND)
        announced(counters, program // chunks)
    if behind >= 0:
        awaited(counters, behind // chunks, chunks)
        chunk_map(p, v, out, partials, behind, shape, chunks, MAP, KIND)


def _launch(p: Tensor, v: Tensor, dim: int, name: str) -> Tensor:
    x = view(p, dim)
    u, out = view_like(x, v, dim), fresh_like(x)
    if p.numel() == 0:
        return unview(out, dim)
    dtype = statistics_dtype(p.dtype)
    # with whole ones, too many registers where numbers are read one by one
    t = tiles(x.classes, x.inner, dtype, tensors=2, chunk=CHUNK // 2)
    t = split_tiles(t, x.classes, x.inner)
    kind, programs = tile_of(x, t, dtype), t.programs(x.rows)
    pair = (x.tensor, u.tensor)
    with on_device(p):
        if t.chunks == 1:
            launch(map_whole, programs, t.warps, *pair, out.tensor, x.rows, x.sizes, name, kind)
        else:
            partials = fresh(p, x.rows, t.chunks, dtype=dtype)
            shared, ahead = (partials, counters(p, t, x.rows)), lead(t, x.rows, p.dtype, 2)
            tensors, numbers = (*pair, out.tensor, *shared), (x.rows, x.sizes, t.chunks, ahead)
            launch(map_chunks, programs + ahead, t.warps, *tensors, *numbers, name, kind)
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
