"""softmax and log-softmax of every row.

p = exp(z − M) / S        log p = (z − M) − log S        M = max z,  S = Σ exp(z − M)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arithmetic import finite
from custom_ops.kernels.cuda.launch import ACCUMULATORS, on_device
from custom_ops.kernels.cuda.layout import fresh_like, unview, view
from custom_ops.kernels.cuda.rows import place, row_starts
from custom_ops.kernels.cuda.tiles import power_of_two, tiles
from custom_ops.kernels.options import statistics_dtype

__all__ = ["softmax"]


@triton.jit
def normalised(z, M, S, LOG: tl.constexpr):
    """The row's results; NaN where M is infinite, as z − M is then for the classes at M."""
    if LOG:
        return (z - M[:, None]) - tl.log(S)[:, None]
    return tl.exp(z - M[:, None]) * (1.0 / S)[:, None]


@triton.jit
def read(z, starts, k, inside, inner, ACC: tl.constexpr):
    """The tile of logits, −inf in the padding, and where it lies."""
    at = starts[:, None] + (k.to(tl.int64) * inner)[None, :]
    return tl.load(z + at, mask=inside, other=float("-inf")).to(ACC)


@triton.jit(do_not_specialize=["rows"])
def softmax_whole(
    z,
    y,
    rows,
    classes,
    inner,
    stride,
    y_stride,
    LOG: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows that fit in a tile."""
    r, k, _ = place(rows, 1, ROWS, BLOCK)
    inside = (r < rows)[:, None] & (k < classes)[None, :]
    x = read(z, row_starts(r, inner, stride), k, inside, inner, ACC)
    M = tl.max(x, 1)
    S = tl.sum(tl.exp(x - M[:, None]), 1)
    to = row_starts(r, inner, y_stride)[:, None] + (k.to(tl.int64) * inner)[None, :]
    tl.store(y + to, normalised(x, M, S, LOG), mask=inside)


@triton.jit(do_not_specialize=["rows", "chunks"])
def softmax_partial(
    z,
    partials,
    rows,
    classes,
    inner,
    stride,
    chunks,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """max z and Σ exp(z − max) of each chunk: partials[0, r, chunk] and partials[1, r, chunk]."""
    r, k, chunk = place(rows, chunks, ROWS, BLOCK)
    inside = (r < rows)[:, None] & (k < classes)[None, :]
    x = read(z, row_starts(r, inner, stride), k, inside, inner, ACC)
    m = tl.max(x, 1)
    to = partials + r.to(tl.int64) * chunks + chunk
    tl.store(to, m, mask=r < rows)
    to += tl.cast(rows, tl.int64) * chunks
    tl.store(to, tl.sum(tl.exp(x - finite(m)[:, None]), 1), mask=r < rows)


@triton.jit(do_not_specialize=["rows", "chunks"])
def softmax_chunks(
    z,
    y,
    partials,
    rows,
    classes,
    inner,
    stride,
    y_stride,
    chunks,
    LOG: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The results of a chunk, from the sums of all chunks of its row."""
    r, k, _ = place(rows, chunks, ROWS, BLOCK)
    j = tl.arange(0, CHUNKS)
    known = (r < rows)[:, None] & (j < chunks)[None, :]
    at = partials + (r.to(tl.int64) * chunks)[:, None] + j[None, :]
    m = tl.load(at, mask=known, other=float("-inf"))
    s = tl.load(at + tl.cast(rows, tl.int64) * chunks, mask=known, other=0.0)
    M = tl.max(m, 1)
    S = tl.sum(s * tl.exp(m - M[:, None]), 1)
    inside = (r < rows)[:, None] & (k < classes)[None, :]
    x = read(z, row_starts(r, inner, stride), k, inside, inner, ACC)
    to = row_starts(r, inner, y_stride)[:, None] + (k.to(tl.int64) * inner)[None, :]
    tl.store(y + to, normalised(x, M, S, LOG), mask=inside)


def softmax(input: Tensor, dim: int, log: bool) -> Tensor:
    """Return softmax, or log-softmax, over dimension `dim`."""
    z = view(input, dim)
    y = fresh_like(z)
    if input.numel() == 0:
        return unview(y, dim)
    dtype = statistics_dtype(input.dtype)
    t = tiles(z.classes, z.inner, dtype, tensors=1)
    shape = {"ACC": ACCUMULATORS[dtype], "ROWS": t.rows, "BLOCK": t.classes, "num_warps": t.warps}
    grid = (t.programs(z.rows),)
    with on_device(input):
        if t.chunks == 1:
            softmax_whole[grid](z.tensor, y.tensor, *z.sizes, y.stride, log, **shape)
        else:
            partials = torch.empty(2, z.rows, t.chunks, dtype=dtype, device=input.device)
            softmax_partial[grid](z.tensor, partials, *z.sizes, t.chunks, **shape)
            softmax_chunks[grid](
                z.tensor,
                y.tensor,
                partials,
                *z.sizes,
                y.stride,
                t.chunks,
                log,
                CHUNKS=power_of_two(t.chunks),
                **shape,
            )
    return unview(y, dim)
