"""How much a program takes: a tile of rows × classes, all of it in registers, once or in steps.

A tile holds whole rows where they fit and all of a row is needed at once. Longer rows come in
chunks: the sums of every chunk are taken by themselves, and whoever needs a row's sums adds those
of its chunks, in one order. So a few long rows fill a device as many rows do.
What is but summed up or mapped takes narrower tiles, and a program goes from one to the next.

The choice depends on the classes and the dtype alone, never on the number of rows or on the device:
a row's bits are the same in every batch. It is stated, not tuned: the first call is like any other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = [
    "CHUNK",
    "Tiles",
    "ceil_div",
    "edged_tiles",
    "elementwise_tiles",
    "power_of_two",
    "split_tiles",
    "stepped_tiles",
    "tiles",
]

WHOLE = 32768  # the longest row in one tile: 32 numbers a thread in as many warps as there are
CHUNK = 8192  # of a longer row
LONG = 16384  # classes: rows of which only few tiles are at an end
SMALL = 2048  # short rows share a tile of this size
SLICE = 32  # rows side by side in memory: a line of the cache in float32
MAX_SLICE = 128
PER_WARP = 1024  # 32 numbers a thread: enough loads in flight, and no register spilled
SHORT = 128  # a row that one warp has to itself, with no other to wait for: the tile goes to
SHARERS = 4  # as many at least, and a small batch is done sooner
NARROWEST = 128  # classes side by side, which a warp reads at once
NARROWEST_SLICE = 8  # classes of rows that lie side by side: each tile reads their M and L
SEVERAL = 4  # warps, each of which takes rows of its own
A_THREAD = 16  # numbers that it then has: with as many again the options' sums spill registers
MOST_CLASSES = 8  # that it has of rows side by side


class Tiles(NamedTuple):
    """The tile of one program, and into how many of them a row's classes are cut."""

    rows: int
    classes: int
    chunks: int
    warps: int
    steps: int = 1  #: tiles that a program takes one after the other
    lanes: int = 1  #: parts of a tile's row whose sums are kept apart until the last step
    rest: int = 0  #: classes of a second tile, where a row that is needed whole has two

    def programs(self, rows: int) -> int:
        """How many tiles cover `rows` rows."""
        return ceil_div(rows, self.rows) * self.chunks


def tiles(classes: int, inner: int, dtype: torch.dtype, tensors: int, chunk: int = CHUNK) -> Tiles:
    """Return the tiles for a computation in `dtype` that holds a tile of each of `tensors`.

    Three tensors with as many numbers as two spill registers. `chunk` is how many numbers a program
    has of rows that no tile holds.
    """
    share = narrow(dtype) * (2 if tensors > 2 else 1)
    whole, slices = power_of_two(classes), CHUNK // share
    if inner == 1:
        if whole <= WHOLE // share // tensors:
            rows, block = max(1, SMALL // share // whole), whole
        else:
            rows, block = 1, chunk // share
    elif whole * SLICE <= slices:
        rows, block = min(slices // whole, MAX_SLICE), whole
    else:
        rows, block = SLICE, chunk // share // SLICE
    least = SHARERS if whole <= SHORT else 1
    warps = min(max(rows * block * narrow(dtype) // PER_WARP, least), 32)
    return Tiles(rows, block, ceil_div(classes, block), warps)


def split_tiles(t: Tiles, classes: int, inner: int) -> Tiles:
    """Return two tiles for rows that are needed whole, where an eighth of one would be idle.

    The second has what the larger power of two below the classes leaves. A thread then keeps fewer
    numbers, and twice as many programs may be under way.
    """
    block = t.classes // 2
    rest = max(power_of_two(classes - block), NARROWEST if inner == 1 else NARROWEST_SLICE)
    if t.chunks > 1 or 8 * (t.classes - classes) <= t.classes or rest >= block:
        return t
    return t._replace(classes=block, rest=rest)


def stepped_tiles(t: Tiles, classes: int, inner: int, dtype: torch.dtype, vector: int) -> Tiles:
    """Return tiles for what needs no row whole: sums that are added up over a row's parts.

    `vector` is how many numbers are read at once. A warp takes a row of a thousand classes, and two
    a longer one: its lanes add up what they have seen and put it together once, at the end, and no
    power of two leaves half of a tile idle. Of rows side by side every thread takes its own, and
    none waits for another. What is taken at once was chosen by the instructions that it takes a
    logit, and so that a program has several rows: it takes its time to begin.
    """
    if inner > 1 and t.chunks == 1:
        return side_by_side(t, classes, dtype, vector)
    # the sums of narrow lanes would take longer than what they are of
    if inner > 1 or t.classes <= 2 * SHORT or vector * dtype.itemsize < 16:
        return t
    if t.classes <= SMALL:
        block, rows = 32 * vector, SEVERAL * max(1, A_THREAD // narrow(dtype) // vector)
        return Tiles(rows, block, 1, SEVERAL, ceil_div(classes, block), 32)
    block = PER_WARP // narrow(dtype)
    steps = ceil_div(min(classes, t.classes), block)
    return Tiles(1, block, t.chunks, 2, steps, block // vector)


def edged_tiles(classes: int, dtype: torch.dtype, edge: int) -> Tiles:
    """Return tiles for long rows that begin between two vectors of memory, in an element-wise map.

    In steps, of which only a row's first and last are read and written in part.
    """
    block, steps = PER_WARP // narrow(dtype), CHUNK // PER_WARP
    return Tiles(1, block, ceil_div(classes + edge - 1, block * steps), 2, steps)


def side_by_side(t: Tiles, classes: int, dtype: torch.dtype, vector: int) -> Tiles:
    """Return tiles for rows side by side: a thread has a vector of them, of few classes at once."""
    numbers = A_THREAD // narrow(dtype)
    vector = min(vector, numbers)
    at_once = numbers // vector
    block = tight(min(MOST_CLASSES, at_once, t.classes), 1, classes)
    return Tiles(32 * SEVERAL * vector, block, 1, SEVERAL, ceil_div(classes, block))


def elementwise_tiles(t: Tiles, classes: int, inner: int, dtype: torch.dtype, vector: int) -> Tiles:
    """Return tiles for what needs no sum of a row, narrower where an eighth of t would be idle."""
    if inner > 1 and t.chunks == 1:
        return side_by_side(t, classes, dtype, vector)
    block = tight(t.classes, NARROWEST if inner == 1 else NARROWEST_SLICE, classes)
    return t._replace(
        rows=t.rows * (t.classes // block), classes=block, chunks=ceil_div(classes, block)
    )


def tight(widest: int, least: int, classes: int) -> int:
    """Return the width of a tile in classes.

    A power of two just above the classes leaves up to half of a tile to classes that are not there.
    The widest that leaves an eighth or less is taken, or else the widest of those that leave least.
    """

    def idle(block: int) -> int:
        return max(ceil_div(classes, block) * block - classes, ceil_div(classes, 8))

    blocks = [widest]
    while blocks[-1] >= 2 * least:
        blocks.append(blocks[-1] // 2)
    return min(blocks, key=idle)


def narrow(dtype: torch.dtype) -> int:
    """By what a tile is smaller in this type: with half as many float64 its exponential spills."""
    return 4 if dtype == torch.float64 else 1


def ceil_div(a: int, b: int) -> int:
    """⌈a/b⌉."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
