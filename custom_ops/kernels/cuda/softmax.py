"""softmax and log-softmax of every row.

p = exp(z − M) / S        log p = (z − M) − log S        M = max z,  S = Σ exp(z − M)
"""

import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arithmetic import finite, vanishing_exp
from custom_ops.kernels.cuda.launch import fresh, launch, on_device
from custom_ops.kernels.cuda.layout import fresh_like, unview, view
from custom_ops.kernels.cuda.parameters import tile_of
from custom_ops.kernels.cuda.rows import chunk_cells, dense, multiples, place, placed
from custom_ops.kernels.cuda.tile import across, located, located_rest, read, write
from custom_ops.kernels.cuda.tiles import split_tiles, tiles
from custom_ops.kernels.cuda.turns import announced, awaited, counters, drawn, lead
from custom_ops.kernels.problem import statistics_dtype

__all__ = ["softmax"]


@triton.jit
def normalised(z, M, S, LOG: tl.constexpr):
    """The row's results; NaN where M is infinite, as z − M is then for the classes at M."""
    if LOG:
        return (z - M[:, None]) - tl.log(S)[:, None]
    return tl.exp(z - M[:, None]) * (1.0 / S)[:, None]


@triton.jit(do_not_specialize=["rows"])
def softmax_whole(z, y, rows, sizes, LOG: tl.constexpr, KIND: tl.constexpr):
    """Rows that fit in a tile, or in two."""
    shape = multiples(rows, sizes, KIND)
    rows, classes, inner, _ = shape
    r, first, _ = place(rows, 1, KIND)
    tile = located(r, first, shape, KIND)
    x = read(z, tile, r < rows, float("-inf"), KIND).to(KIND.ACC)
    M = tl.max(x, 1)
    if KIND.REST > 0:
        rest = located_rest(r, shape, KIND)
        more = read(z, rest, r < rows, float("-inf"), KIND).to(KIND.ACC)
        M = tl.maximum(M, tl.max(more, 1))
    S = tl.sum(tl.exp(x - M[:, None]), 1)
    if KIND.REST > 0:
        S += tl.sum(tl.exp(more - M[:, None]), 1)
        to = across(rest, r, inner, dense(classes, inner), KIND)
        write(y, to, r < rows, normalised(more, M, S, LOG), KIND)
    to = across(tile, r, inner, dense(classes, inner), KIND)
    write(y, to, r < rows, normalised(x, M, S, LOG), KIND)


@triton.jit
def chunk_sums(z, partials, program, shape, chunks, KIND: tl.constexpr):
    """max z and Σ exp(z − max) of a chunk: partials[0, r, chunk] and partials[1, r, chunk]."""
    rows = shape[0]
    r, first, chunk = placed(program, rows, chunks, KIND)
    x = read(z, located(r, first, shape, KIND), r < rows, float("-inf"), KIND).to(KIND.ACC)
    m = tl.max(x, 1)
    to = partials + r.to(tl.int64) * chunks + chunk
    tl.store(to, m, mask=r < rows)
    to += tl.cast(rows, tl.int64) * chunks
    tl.store(to, tl.sum(vanishing_exp(x - finite(m)[:, None]), 1), mask=r < rows)


@triton.jit
def chunk_results(z, y, partials, program, shape, chunks, LOG: tl.constexpr, KIND: tl.constexpr):
    """The results of a chunk, from the sums of all chunks of its row."""
    rows, classes, inner, _ = shape
    r, first, _ = placed(program, rows, chunks, KIND)
    at, known = chunk_cells(r, rows, chunks, KIND)
    m = tl.load(partials + at, mask=known, other=float("-inf"))
    at += tl.cast(rows, tl.int64) * chunks
    s = tl.load(partials + at, mask=known, other=0.0)
    M = tl.max(m, 1)
    S = tl.sum(s * vanishing_exp(m - M[:, None]), 1)
    tile = located(r, first, shape, KIND)
    x = read(z, tile, r < rows, float("-inf"), KIND).to(KIND.ACC)
    to = across(tile, r, inner, dense(classes, inner), KIND)
    write(y, to, r < rows, normalised(x, M, S, LOG), KIND)


@triton.jit(do_not_specialize=["rows", "chunks", "lead"])
def softmax_chunks(
    z, y, partials, counters, rows, sizes, chunks, lead, LOG: tl.constexpr, KIND: tl.constexpr
):
    """Longer rows, as `turns` has it."""
    shape = multiples(rows, sizes, KIND)
    program = drawn(counters)
    behind = program - lead
    if program < tl.num_programs(0) - lead:
        chunk_sums(z, partials, program, shape, chunks, KIND)
        announced(counters, program // chunks)
    if behind >= 0:
        awaited(counters, behind // chunks, chunks)
        chunk_results(z, y, partials, behind, shape, chunks, LOG, KIND)


def softmax(input: Tensor, dim: int, log: bool) -> Tensor:
    """Return softmax, or log-softmax, over dimension `dim`."""
    z = view(input, dim)
    y = fresh_like(z)
    if input.numel() == 0:
        return unview(y, dim)
    dtype = statistics_dtype(input.dtype)
    t = split_tiles(tiles(z.classes, z.inner, dtype, tensors=1), z.classes, z.inner)
    kind, programs = tile_of(z, t, dtype), t.programs(z.rows)
    with on_device(input):
        if t.chunks == 1:
            pair = (z.tensor, y.tensor)
            launch(softmax_whole, programs, t.warps, *pair, z.rows, z.sizes, log, kind)
        else:
            partials = fresh(input, 2, z.rows, t.chunks, dtype=dtype)
            tensors = (z.tensor, y.tensor, partials, counters(input, t, z.rows))
            ahead = lead(t, z.rows, input.dtype, 1)
            numbers = (z.rows, z.sizes, t.chunks, ahead)
            launch(softmax_chunks, programs + ahead, t.warps, *tensors, *numbers, log, kind)
    return unview(y, dim)
