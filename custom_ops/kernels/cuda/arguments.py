"""The arguments of a cross-entropy as its kernels take them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from custom_ops.kernels.cuda.layout import View, view, view_like
from custom_ops.kernels.cuda.parameters import Kind, Target, tile_of
from custom_ops.kernels.cuda.reduction import finish
from custom_ops.kernels.cuda.tiles import SMALL, Tiles, ceil_div, stepped_tiles, tiles
from custom_ops.kernels.problem import Options, Problem

__all__ = ["Arguments"]


class Arguments(NamedTuple):
    """A `Problem`, in the layouts that the kernels read."""

    input: View
    values: Tensor  #: labels or probabilities
    weight: Tensor | None
    ignore_index: int
    numbers: tuple[float, ...]  #: 1 − ε, ε/C, λ, α (α/s under a cap), s
    dtype: torch.dtype  #: of the computation
    kind: Kind
    tiles: Tiles

    @staticmethod
    def of(problem: Problem) -> Arguments:
        """Lay the tensors out, and choose what is compiled."""
        input, target, weight, o = problem
        x = view(input, o.dim)
        numbers, t = _compiled_for(x.classes, x.inner, o)
        return Arguments(
            x,
            view_like(x, target, o.dim).tensor if problem.soft else target.contiguous(),
            None if weight is None else weight.contiguous(),
            o.ignore_index,
            numbers,
            o.dtype,
            tile_of(x, t, o.dtype)._replace(**_kind_of(o, problem.soft)),
            t,
        )

    def in_steps(self) -> Arguments:
        """Return the same for sums over the classes, which a program takes step by step."""
        x, dtype = self.input, self.dtype
        t = stepped_tiles(self.tiles, x.classes, x.inner, dtype, x.vector)
        return self._replace(tiles=t, kind=self.kind.of_tiles(t))

    @property
    def together(self) -> int:
        """How many rows one program puts together from their chunks."""
        return max(1, SMALL // self.kind.CHUNKS)

    def programs(self) -> int:
        """How many programs write whole rows of the forward."""
        rows = self.tiles.rows if self.tiles.chunks == 1 else self.together
        return ceil_div(self.input.rows, rows)

    def targets(self, mean_weight: bool = False) -> Target:
        """Return what ỹ is made of; its mass needs the mean weight where labels are smoothed."""
        w, mean = self.weight, None
        if mean_weight and w is not None and self.kind.SMOOTHING != "none" and not self.kind.SOFT:
            mean = finish(w, None, w.numel(), True, w.dtype)[0]
        return Target(self.values, w, mean)


@lru_cache(maxsize=256)
def _compiled_for(classes: int, inner: int, o: Options) -> tuple[tuple[float, ...], Tiles]:
    """The numbers, and the tiles."""
    ε, α, cap = o.label_smoothing, o.logit_scale, o.softcap
    scale, cap = (α, 0.0) if cap is None else (α / cap, cap)
    numbers = (1 - ε, ε / max(classes, 1), o.z_loss, scale, cap)
    return numbers, tiles(classes, inner, o.dtype, tensors=2)


def _kind_of(o: Options, soft: bool) -> dict[str, Any]:
    """What the options compile into a kernel."""
    ε, α = o.label_smoothing, o.logit_scale
    return {
        "SOFT": soft,
        "SMOOTHING": "none" if not ε else "some" if ε < 1 else "all",
        "LOGITS": "capped" if o.softcap is not None else "identity" if α == 1 else "scaled",
        "Z_LOSS": bool(o.z_loss),
    }
