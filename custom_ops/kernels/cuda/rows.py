"""Where the tile of a program lies."""

import triton
import triton.language as tl

__all__ = ["place", "row_starts"]


@triton.jit
def place(rows, chunks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows and the classes of this program's tile, and its chunk; the last may overhang."""
    program = tl.program_id(0)
    chunk = program % chunks
    # in the type of `rows`, which is of 64 bits where their number needs it
    r = (program // chunks).to(rows.dtype) * ROWS + tl.arange(0, ROWS)
    return r, chunk * BLOCK + tl.arange(0, BLOCK), chunk


@triton.jit
def row_starts(r, inner, stride):
    """Where row r = o·inner + i begins: o·stride + i. Its class k lies k·inner further."""
    return (r // inner).to(tl.int64) * stride + r % inner
