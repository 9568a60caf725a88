"""Where the tile of a program lies."""

import triton
import triton.language as tl

__all__ = ["cells", "chunk_cells", "dense", "multiples", "place", "placed", "row_starts"]


@triton.jit
def multiples(rows, sizes, KIND: tl.constexpr):
    """Return (rows, classes, inner, stride), declared multiples of what they are (`layout.units`).

    So Triton knows that numbers side by side can be read at once. `rows` is of 64 bits where the
    number of a row needs them.
    """
    classes, inner, stride = sizes[0], sizes[1], sizes[2]
    UNITS: tl.constexpr = KIND.UNITS
    UNIT: tl.constexpr = UNITS[0] * UNITS[1]
    if UNITS[2]:
        rows = tl.cast(rows, tl.int64)
    rows = rows // UNITS[1] * UNITS[1]
    classes = classes // UNITS[0] * UNITS[0]
    return rows, classes, inner // UNITS[1] * UNITS[1], stride // UNIT * UNIT


@triton.jit
def place(rows, chunks, KIND: tl.constexpr):
    """The rows r of this program, the place of its first tile, and its chunk; all may overhang."""
    return placed(tl.program_id(0), rows, chunks, KIND)


@triton.jit
def placed(program, rows, chunks, KIND: tl.constexpr):
    """The same for the program of that number."""
    chunk = program % chunks
    r = (program // chunks).to(rows.dtype) * KIND.ROWS + tl.arange(0, KIND.ROWS)
    return r, chunk * (KIND.BLOCK * KIND.STEPS), chunk


@triton.jit
def row_starts(r, inner, stride):
    """Where row r = o·inner + i begins: o·stride + i. Its class k lies k·inner further."""
    return (r // inner).to(tl.int64) * stride + r % inner


@triton.jit
def cells(r, k, inner, stride):
    """Where the classes k of the rows r lie."""
    return row_starts(r, inner, stride)[:, None] + k.to(tl.int64) * inner


@triton.jit
def chunk_cells(r, n, chunks, KIND: tl.constexpr):
    """Where the sums of a row's chunks lie, as [r, chunk], and which of them there are."""
    j = tl.arange(0, KIND.CHUNKS)
    at = (r.to(tl.int64) * chunks)[:, None] + j[None, :]
    return at, (r < n)[:, None] & (j < chunks)[None, :]


@triton.jit
def dense(classes, inner):
    """The stride of memory without gaps."""
    return tl.cast(classes, tl.int64) * inner
