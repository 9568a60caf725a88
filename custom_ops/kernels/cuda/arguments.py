"""The arguments of a cross-entropy as its kernels take them."""

from __future__ import annotations

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
        t = tiles(x.classes, x.inner, o.dtype, tensors=2)
        return Arguments(
            x,
            view_like(x, target, o.dim).tensor if problem.soft else target.contiguous(),
            None if weight is None else weight.contiguous(),
            o.ignore_index,
            _numbers(x.classes, o),
            o.dtype,
            tile_of(x, t, o.dtype)._replace(**_kind_of(o, problem.soft)),
            t,
        )

    @property
    def extent(self) -> tuple[int, int, torch.dtype, int]:
        """What else tiles are chosen by: classes, inner, dtype, and the numbers read at once."""
        x = self.input
        return x.classes, x.inner, self.dtype, x.vector

    def in_steps(self) -> Arguments:
        """Return the same for sums over the classes, which a program takes step by step."""
        t = stepped_tiles(self.tiles, *self.extent)
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


def _numbers(classes: int, o: Options) -> tuple[float, ...]:
    """What the options are to a kernel."""
    ε, α, cap = o.label_smoothing, o.logit_scale, o.softcap
    scale, cap = (α, 0.0) if cap is None else (α / cap, cap)
    return 1 - ε, ε / max(classes, 1), o.z_loss, scale, cap


def _kind_of(o: Options, soft: bool) -> dict[str, Any]:
    """What the options compile into a kernel."""
    ε, α = o.label_smoothing, o.logit_scale
    return {
        "SOFT": soft,
        "SMOOTHING": "none" if not ε else "some" if ε < 1 else "all",
        "LOGITS": "capped" if o.softcap is not None else "identity" if α == 1 else "scaled",
        "Z_LOSS": bool(o.z_loss),
    }
