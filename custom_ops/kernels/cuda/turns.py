"""One launch for the sums of long rows and for what is made of them.

A row that no tile holds is read twice: for its sums, and once they are known. In two launches all
of the tensor goes through the cache in between. Here the programs of one launch draw numbers, and
program t takes the sums of chunk t and then maps chunk t − lead, which the cache should still have,
so that the device's memory is read once. (Programs wait for one another in this way in single-pass
scans: Merrill and Garland, 2016, who call it decoupled look-back.)

Before it maps, a program waits for the sums of its row. All of them are of smaller numbers, and a
program that has drawn its number runs, and takes its sums before it waits. So no wait is for ever,
in whichever order a device begins its programs and however few it has at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.launch import fresh, launch
from custom_ops.kernels.cuda.tiles import Tiles, ceil_div

__all__ = ["announced", "awaited", "counters", "drawn", "lead"]

#: Bytes that are summed, beside a row, before the first chunk is mapped. With as many that are
#: written it is about half of the cache of an A100 or H100, and about what is under way at once:
#: less would wait longer, more would be read again from memory.
AHEAD = 12 * 2**20
BLOCK = 1024  # counters that a program clears


def lead(t: Tiles, rows: int, dtype: torch.dtype, tensors: int) -> int:
    """Return how many chunks are summed before the first is mapped: those of a row at least."""
    chunks = t.chunks + AHEAD // (t.rows * t.classes * dtype.itemsize * tensors)
    return min(chunks, t.programs(rows))


def counters(like: Tensor, t: Tiles, rows: int) -> Tensor:
    """Return 0 for the next number, and for each tile's rows the chunks whose sums are there."""
    n = 1 + ceil_div(rows, t.rows)
    made = fresh(like, n, dtype=torch.int32)
    launch(cleared, ceil_div(n, BLOCK), 4, made, n, BLOCK)
    return made


@triton.jit(do_not_specialize=["n"])
def cleared(counters, n, BLOCK: tl.constexpr):
    """0 in each."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counters + i, 0, mask=i < n)


@triton.jit
def drawn(counters):
    """The number of this program."""
    return tl.atomic_add(counters, 1, sem="relaxed")


@triton.jit
def announced(counters, group):
    """Say that the sums of one more chunk of these rows are there."""
    tl.debug_barrier()  # one thread says it for all of the program
    tl.atomic_add(counters + 1 + group, 1, sem="release")


@triton.jit
def awaited(counters, group, chunks):
    """Wait for the sums of all chunks of these rows."""
    while tl.atomic_add(counters + 1 + group, 0, sem="acquire") < chunks:
        pass
    tl.debug_barrier()  # one thread has waited for all
