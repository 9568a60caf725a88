"""From the sums of the programs that wrote the rows to one number: Σℓ, or Σℓ/n and n.

One program adds them all up, in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.cuda.arithmetic import divided, stored
from custom_ops.kernels.cuda.launch import fresh, launch, on_device
from custom_ops.kernels.cuda.parameters import ACCUMULATORS
from custom_ops.kernels.problem import statistics_dtype

__all__ = ["FEW", "finish", "total"]

LEAST, MOST = 1024, 8192  # numbers that are added at once
FEW = 8 * MOST  #: numbers: the time of about two launches


@triton.jit(do_not_specialize=["n"])
def finished(
    losses,
    counts,
    result,
    divisor,
    n,
    given: tl.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ of the n losses, divided by Σ of the counts, or without counts by what is `given`.

    Not divided where there is no `divisor` to keep what it is divided by.
    """
    value = tl.zeros((BLOCK,), ACC)
    count = tl.zeros((BLOCK,), ACC)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value += tl.load(losses + i, mask=i < n, other=0.0).to(ACC)
        if counts is not None:
            count += tl.load(counts + i, mask=i < n, other=0.0).to(ACC)
    total = tl.sum(value, 0)
    if divisor is not None:
        rows = tl.full((), given, ACC)
        if counts is not None:
            rows = tl.sum(count, 0)
        tl.store(divisor, stored(rows, divisor))
        total = divided(total, rows)
    tl.store(result, stored(total, result))


def total(x: Tensor) -> Tensor:
    """Σ x, 0-d; torch adds up many."""
    if x.numel() > FEW or not x.is_contiguous():
        return x.sum()
    return finish(x, None, 0.0, False, x.dtype)[0]


def finish(
    losses: Tensor, counts: Tensor | None, given: float, mean: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return Σ of the losses in `dtype`; or, for a mean, that over n, and n: two 0-d tensors.

    n is Σ of the counts, or without them what is `given`.
    """
    result = fresh(losses, dtype=dtype)
    n = fresh(losses, dtype=losses.dtype) if mean else None
    block, warps = (LEAST, 4) if losses.numel() <= LEAST else (MOST, 16)
    tensors, numbers = (losses, counts, result, n), (losses.numel(), float(given))
    acc = ACCUMULATORS[statistics_dtype(losses.dtype)]
    with on_device(losses):
        launch(finished, 1, warps, *tensors, *numbers, acc, block)
    return result, n
