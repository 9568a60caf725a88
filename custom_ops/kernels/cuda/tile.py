"""A tile of a program: which classes it has, where they lie, and how they are read and written."""

import triton
import triton.language as tl

from custom_ops.kernels.cuda.rows import cells

__all__ = ["across", "located", "located_rest", "read", "write"]


@triton.jit
def located(r, first, shape, KIND: tl.constexpr):
    """The tile of the rows r that has its first place there, for `read` and `write`."""
    return span(r, first, shape, KIND.BLOCK, KIND)


@triton.jit
def located_rest(r, shape, KIND: tl.constexpr):
    """The second tile of the rows r, where they have two."""
    return span(r, KIND.BLOCK, shape, KIND.REST, KIND)


@triton.jit
def span(r, first, shape, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """The tile of so many places.

    As [row, place]: the class k, where it lies, whether there is such a class, and whether it is
    read with the others; last, whether any place is not. Where rows begin between two vectors of
    memory (KIND.EDGE numbers long), a place counts from the vector that its row begins in, and of
    the classes those in whole vectors are read with the others, a row's ends apart from them.
    """
    _, classes, inner, stride = shape
    k = first + tl.arange(0, BLOCK)[None, :]
    if KIND.EDGE == 0:
        at, there = cells(r, k, inner, stride), k < classes
        whole, cut = there, first + BLOCK > classes
    else:
        start = r.to(tl.int64) * stride
        begun = start // KIND.EDGE * KIND.EDGE
        off = (start - begun).to(tl.int32)[:, None]
        vector = k // KIND.EDGE * KIND.EDGE
        whole = (vector >= off) & (vector + KIND.EDGE <= off + classes)
        cut = (first == 0) | (first + BLOCK + KIND.EDGE > classes)
        at, k = begun[:, None] + k, k - off
        there = (k >= 0) & (k < classes)
    return k, at, there, whole, cut


@triton.jit
def across(tile, r, inner, stride, KIND: tl.constexpr):
    """The same tile in memory of another stride; of the same, where rows begin between vectors."""
    k, at, there, whole, cut = tile
    if KIND.EDGE == 0:
        at = cells(r, k, inner, stride)
    return k, at, there, whole, cut


@triton.jit
def read(memory, tile, wanted, other, KIND: tl.constexpr):
    """The numbers of the tile in the rows that are `wanted`; `other` for the rest."""
    _, at, there, whole, cut = tile
    one_by_one: tl.constexpr = KIND.UNITS[0] * KIND.UNITS[1] == 1
    if KIND.EDGE > 0:
        x = tl.load(memory + at, mask=wanted[:, None] & whole, other=other)
        if cut:
            ends = wanted[:, None] & there & (whole == 0)
            x = tl.where(whole, x, tl.load(memory + at, mask=ends, other=other))
    elif one_by_one:
        # to ask of every number whether it is there takes as long as to read it
        if cut | (tl.min(wanted.to(tl.int32), 0) == 0):
            x = tl.load(memory + at, mask=wanted[:, None] & whole, other=other)
        else:
            x = tl.load(memory + at)
    else:
        x = tl.load(memory + at, mask=wanted[:, None] & whole, other=other)
    return x


@triton.jit
def write(memory, tile, real, x, KIND: tl.constexpr):
    """Write the numbers of the tile in the rows that are `real`."""
    _, at, there, whole, cut = tile
    tl.store(memory + at, x, mask=real[:, None] & whole)
    if KIND.EDGE > 0:  # noqa: SIM102
        if cut:
            tl.store(memory + at, x, mask=real[:, None] & there & (whole == 0))
