"""The arguments of a cross-entropy as its kernels take them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from custom_ops.kernels.cuda.launch import ACCUMULATORS, tile_of
from custom_ops.kernels.cuda.layout import View, view, view_like
from custom_ops.kernels.cuda.tiles import Tiles, tiles
from custom_ops.kernels.problem import Problem

__all__ = ["Arguments"]


class Arguments(NamedTuple):
    """A `Problem`, in the layouts that the kernels read."""

    x: View
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    numbers: tuple[float, ...]  #: 1 − ε, ε/C, λ, α (α/s under a cap), s
    kind: dict[str, Any]  #: what a kernel is compiled for; not to be changed
    tiles: Tiles

    @staticmethod
    def of(problem: Problem) -> Arguments:
        """Lay the tensors out, and choose what is compiled."""
        input, target, weight, o = problem
        dim, dtype, soft = o.dim, o.dtype, problem.soft
        x = view(input, dim)
        options = (o.label_smoothing, o.z_loss, o.logit_scale, o.softcap)
        numbers, kind, t = _compiled_for(x.sizes, soft, dtype, *options)
        return Arguments(
            x,
            view_like(x, target, dim).tensor if soft else target.contiguous(),
            None if weight is None else weight.contiguous(),
            o.ignore_index,
            numbers,
            kind,
            t,
        )

    def mean_weight(self) -> Tensor | None:
        """Σ_k w_k / C, where labels are smoothed; 0-d."""
        if self.weight is None or self.kind["SOFT"] or self.kind["SMOOTHING"] == "none":
            return None
        return self.weight.mean()


@lru_cache(maxsize=256)
def _compiled_for(
    sizes: tuple[int, int, int, int],
    soft: bool,
    dtype: torch.dtype,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
) -> tuple[tuple[float, ...], dict[str, Any], Tiles]:
    """The numbers, what a kernel is compiled for, and its tiles; `sizes` are the view's."""
    _, classes, inner, _ = sizes
    scale, cap = (logit_scale, 0.0) if softcap is None else (logit_scale / softcap, softcap)
    even = label_smoothing / max(classes, 1)
    logits = "capped" if softcap is not None else "plain" if logit_scale == 1 else "scaled"
    smoothing = "none" if not label_smoothing else "some" if label_smoothing < 1 else "all"
    t = tiles(classes, inner, dtype, tensors=2)
    kind = {
        "SOFT": soft,
        "SMOOTHING": smoothing,
        "LOGITS": logits,
        "Z_LOSS": bool(z_loss),
        "ACC": ACCUMULATORS[dtype],
        **tile_of(sizes, t),
    }
    return (1 - label_smoothing, even, z_loss, scale, cap), kind, t
