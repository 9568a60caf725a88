"""From the rows' losses to one number: Σℓ, or Σℓ/n and n.

n counts the rows whose label is not ignored, each with the weight of its class, or is given. Of few
rows one program adds up everything, in one launch and one order; torch adds up many.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arithmetic import divided
from custom_ops.kernels.cuda.launch import launch, on_device
from custom_ops.kernels.cuda.parameters import ACCUMULATORS
from custom_ops.kernels.problem import Problem

__all__ = ["FEW", "mean", "total"]

LEAST, MOST = 1024, 8192  # numbers that are added at once
FEW = 8 * MOST  #: rows: the time of about two launches


@triton.jit(do_not_specialize=["rows", "classes", "ignore_index"])
def reduced(
    loss,
    target,
    weight,
    result,
    divisor,
    rows,
    classes,
    ignore_index,
    given: tl.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σℓ, divided by n if there is a `divisor` to keep n; n is `given` where target is None."""
    sums = tl.zeros((BLOCK,), ACC)
    counts = tl.zeros((BLOCK,), ACC)
    for start in range(0, rows, BLOCK):
        r = start + tl.arange(0, BLOCK)
        sums += tl.load(loss + r, mask=r < rows, other=0.0)
        if target is not None:
            label = tl.load(target + r, mask=r < rows, other=0).to(tl.int64)
            counted = (r < rows) & (label != ignore_index)
            if weight is None:
                counts += counted.to(ACC)
            else:
                inside = (label >= 0) & (label < classes)
                w = tl.load(weight + label, mask=counted & inside, other=float("nan"))
                counts += tl.where(counted, w, 0.0)
    value = tl.sum(sums, 0)
    if divisor is not None:
        n = tl.full((), given, ACC)
        if target is not None:
            n = tl.sum(counts, 0)
        tl.store(divisor, n)
        value = divided(value, n)
    tl.store(result, value)


def total(x: Tensor) -> Tensor:
    """Σ x, 0-d."""
    if x.numel() > FEW or not x.is_contiguous():
        return x.sum()
    result = x.new_empty(())
    _launch(x, None, None, result, None, 0, 0, 0.0)
    return result


def mean(loss: Tensor, problem: Problem, normalizer: float) -> tuple[Tensor, Tensor]:
    """Return Σℓ/n and n of few rows, both 0-d; n counts the labels, or is a normalizer above 0."""
    result, divisor = loss.new_empty(()), loss.new_empty(())
    labels = None if normalizer else problem.target.contiguous()
    weight = None if problem.weight is None else problem.weight.contiguous()
    sizes = problem.classes, problem.options.ignore_index
    _launch(loss, labels, weight, result, divisor, *sizes, normalizer)
    return result, divisor


def _launch(
    loss: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    result: Tensor,
    divisor: Tensor | None,
    *rest: float,
) -> None:
    block, warps = (LEAST, 4) if loss.numel() <= LEAST else (MOST, 16)
    tensors, numbers = (loss, target, weight, result, divisor), (loss.numel(), *rest)
    with on_device(loss):
        launch(reduced, 1, warps, *tensors, *numbers, ACCUMULATORS[loss.dtype], block)
