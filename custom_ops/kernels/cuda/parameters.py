"""What the kernels take, whole: one tuple a subject, and what they are compiled for.

Triton leaves a None in them out of the compiled code, as it does an argument that is None.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl

from custom_ops.kernels.cuda.layout import View, units
from custom_ops.kernels.cuda.tiles import Tiles, power_of_two

__all__ = ["ACCUMULATORS", "Chunks", "Kind", "Results", "Target", "Upstream", "tile_of"]

ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}


class Kind(NamedTuple):
    """What a kernel is compiled for.

    Handed on whole: Triton 3.6 takes no string and no tuple out of it as an argument of a call.
    """

    ACC: Any  #: Triton's dtype of the computation
    ROWS: int  #: of a tile
    BLOCK: int  #: classes of a tile
    UNITS: tuple[int, int, bool]  #: see `layout.units`
    CHUNKS: int  #: programs a row, rounded up to a power of two
    STEPS: int  #: tiles that a program takes one after the other
    LANES: int  #: parts of a tile's row whose sums are kept apart
    REST: int = 0  #: classes of a row's second tile, or 0
    EDGE: int = 0  #: numbers of a vector, where rows begin between two (`layout.View.edge`)
    SOFT: bool = False  #: the target holds probabilities
    SMOOTHING: str = "none"  #: or "some", or "all" (ε = 1)
    LOGITS: str = "identity"  #: see `logits`
    Z_LOSS: bool = False  #: λ is not 0

    def of_tiles(self, t: Tiles) -> Kind:
        """Return what is compiled for other tiles."""
        chunks = power_of_two(t.chunks)
        return self._replace(
            ROWS=t.rows,
            BLOCK=t.classes,
            CHUNKS=chunks,
            STEPS=t.steps,
            LANES=t.lanes,
            REST=t.rest,
        )


def tile_of(x: View, t: Tiles, dtype: torch.dtype) -> Kind:
    """Return what a kernel over such tiles of x, computing in `dtype`, is compiled for."""
    return _tile_of(t, dtype, units(x.rows, *x.sizes))


@lru_cache(maxsize=1024)
def _tile_of(t: Tiles, dtype: torch.dtype, units: tuple[int, int, bool]) -> Kind:
    return Kind(ACCUMULATORS[dtype], 0, 0, units, 0, 0, 0).of_tiles(t)


class Target(NamedTuple):
    """Of what ỹ is made."""

    target: Any  #: labels or probabilities (a tuple of Triton has `values` of its own)
    weight: Any  #: w, one number a class
    mean_weight: Any = None  #: Σ_k w_k / C, where labels are smoothed
    masses: Any = None  #: Σ ỹ_k of each chunk, for probabilities in chunks


class Upstream(NamedTuple):
    """One number a row: what the gradient is given."""

    g: Any  #: the upstream gradient of the loss
    q: Any  #: of lse
    M: Any
    L: Any
    step: Any = 1  #: from a row's g to the next one's; 0 where one is for all rows
    divisor: Any = None  #: by which g is divided, 0-d


class Results(NamedTuple):
    """Where the forward writes."""

    loss: Any  #: one number a row, as the next four
    M: Any
    L: Any
    prediction: Any
    entropy: Any
    losses: Any  #: Σℓ of each program
    counts: Any  #: Σ w_t of each program, the rows that count where there are no weights
    record: Any  #: see `record`
    dims: Any  #: of the target, for the record


class Chunks(NamedTuple):
    """What the forward keeps of each chunk of a row: sums[field, r, chunk] and bests[r, chunk]."""

    sums: Any  #: m, S, distance, mass, T (`cross_entropy`)
    bests: Any  #: the first class at m
