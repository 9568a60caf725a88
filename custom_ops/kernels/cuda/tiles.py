"""How much a program takes: a tile of rows × classes, all of it in registers.

A tile holds whole rows where they fit. Longer rows come in chunks, a tile each: one kernel takes
the sums of every chunk, and whoever needs a row's sums adds those of its chunks, in one order. So
a few long rows fill a device as many rows do, nothing is looped over, and no atomic is needed.

The choice depends on the classes and the dtype alone, never on the number of rows or on the device:
a row's bits are the same in every batch. It is stated, not tuned: the first call is like any other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Tiles", "ceil_div", "elementwise_tiles", "power_of_two", "tiles"]

WHOLE = 32768  # the longest row in one tile: 32 numbers a thread in as many warps as there are
CHUNK = 8192  # of a longer row
SMALL = 2048  # short rows share a tile of this size
SLICE = 32  # rows side by side in memory: a line of the cache in float32
MAX_SLICE = 128
PER_WARP = 1024  # 32 numbers a thread: enough loads in flight, and no register spilled
SHORT = 128  # a row that one warp has to itself, with no other to wait for: the tile goes to
SHARERS = 4  # as many at least, and a small batch is done sooner
NARROWEST = 128  # classes side by side, which a warp reads at once
NARROWEST_SLICE = 8  # classes of rows that lie side by side: each tile reads their M and L


class Tiles(NamedTuple):
    """The tile of one program, and into how many of them a row's classes are cut."""

    rows: int
    classes: int
    chunks: int
    warps: int

    def programs(self, rows: int) -> int:
        """How many tiles cover `rows` rows."""
        return ceil_div(rows, self.rows) * self.chunks


def tiles(classes: int, inner: int, dtype: torch.dtype, tensors: int) -> Tiles:
    """Return the tiles for a computation in `dtype` that holds a tile of each of `tensors`.

    float64 takes a quarter as many numbers: with half as many its exponential spills registers. So
    do three tensors with as many as two.
    """
    narrow = 4 if dtype == torch.float64 else 1
    share = narrow * (2 if tensors > 2 else 1)
    whole, chunk = power_of_two(classes), CHUNK // share
    if inner == 1:
        if whole <= WHOLE // share // tensors:
            rows, block = max(1, SMALL // share // whole), whole
        else:
            rows, block = 1, chunk
    elif whole * SLICE <= chunk:
        rows, block = min(chunk // whole, MAX_SLICE), whole
    else:
        rows, block = SLICE, chunk // SLICE
    least = SHARERS if whole <= SHORT else 1
    warps = min(max(rows * block * narrow // PER_WARP, least), 32)
    return Tiles(rows, block, ceil_div(classes, block), warps)


def elementwise_tiles(t: Tiles, classes: int, inner: int) -> Tiles:
    """Return tiles for what needs no row whole, narrower than t where an eighth would be idle.

    A power of two just above the classes leaves up to half of a tile to classes that are not there.
    The widest that leaves an eighth or less is taken, or else the widest of those that leave least.
    """

    def idle(block: int) -> int:
        return max(ceil_div(classes, block) * block - classes, classes // 8)

    least = NARROWEST if inner == 1 else NARROWEST_SLICE
    blocks = [t.classes]
    while blocks[-1] >= 2 * least:
        blocks.append(blocks[-1] // 2)
    block = min(blocks, key=idle)
    return t._replace(
        rows=t.rows * (t.classes // block), classes=block, chunks=ceil_div(classes, block)
    )


def ceil_div(a: int, b: int) -> int:
    """⌈a/b⌉."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
