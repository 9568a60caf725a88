"""The same for DTensor: each process takes its own rows with all classes of them.

Rows that are sharded stay so. Classes that are sharded are gathered first, and so is the last
layer's weight; its gradient, summed over each process's rows, is summed over the processes. The
losses of the rows are one DTensor, and a sum or mean of them is replicated.

The mean divides by the sum over all processes. torch 2.13 takes the mean of the processes' means,
which is another number where these differ in Σ w_t.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops.checks import ArgumentError
from custom_ops.kernels import statistics_dtype

__all__ = ["cross_entropy", "is_sharded", "linear_cross_entropy", "softmax"]


def is_sharded(*tensors: object) -> bool:
    """Whether one of them is a DTensor; its module, slow to import, is not imported to know."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def softmax(function: Callable[[Tensor, int], Tensor], input: Any, dim: int) -> Tensor:
    """Return function(input, dim), with the shards of all dimensions but `dim`."""
    rows = _Rows(input, dim)
    return rows.wrap(function(rows.of(input), dim), input.shape, rows.placements)


def cross_entropy(
    function: Callable[..., Any],
    input: Any,
    target: Any,
    weight: Any,
    *,
    reduction: str,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
    **others: Any,
) -> Any:
    """Return function(input, target, weight, …), `function` being that for plain tensors.

    `dtype` is that of the loss; rows and sums are in float32 or better until the end.
    """
    _expect_sharded("input", input)
    dim = 1 if input.dim() > 1 else 0
    rows = _Rows(input, dim)
    soft = target.is_floating_point() and target.shape == input.shape
    shape = torch.Size(size for d, size in enumerate(input.shape) if d != dim)
    if not soft and target.shape != shape:
        raise ArgumentError(
            f"target must hold a label for each row of input, shape {tuple(shape)}, or class "
            f"probabilities, shape {tuple(input.shape)}; got shape {tuple(target.shape)}"
        )
    local = rows.of(target, None if soft else rows.of_rows)
    found = function(
        *(rows.of(input), local, rows.whole(weight)),
        reduction="none",
        dtype=statistics_dtype(dtype),
        **others,
    )
    loss, *stats = found if isinstance(found, tuple) else (found,)
    loss = rows.wrap(loss, shape, rows.of_rows)
    if reduction != "none":
        loss = _everywhere(loss.sum())
    if reduction == "mean":
        index = others["ignore_index"]
        counts = _counts(local, rows.whole(weight), soft, index, dim, loss.dtype)
        n = _everywhere(rows.wrap(counts, shape, rows.of_rows).sum())
        loss = loss / (n if normalizer is None else rows.replicated(normalizer))
    loss = loss.to(dtype)
    if not stats:
        return loss
    return loss, type(stats[0])(*(rows.wrap(t, shape, rows.of_rows) for t in stats[0]))


def linear_cross_entropy(
    function: Callable[..., Any],
    tensors: tuple[Any, ...],
    *,
    reduction: str,
    ignore_index: int | None,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
    **others: Any,
) -> Any:
    """Return function(*tensors, …), as `cross_entropy` does; the last tensor is the weight."""
    input, linear_weight, target, linear_bias, weight = tensors
    _expect_sharded("input", input)
    _expect_sharded("linear_weight", linear_weight)
    if linear_weight.dim() > 2:
        raise NotImplementedError(
            "linear_cross_entropy of DTensors takes linear_weight (C, D), got shape "
            f"{tuple(linear_weight.shape)}: a layer for each position is not supported"
        )
    if linear_bias is not None:
        _expect_sharded("linear_bias", linear_bias)
    rows = _Rows(input, input.dim() - 1)
    shape = input.shape[:-1]
    soft = target.is_floating_point() and target.dim() == input.dim()
    if target.shape != ((*shape, linear_weight.shape[0]) if soft else shape):
        raise ArgumentError(
            f"target must hold a label for each row, shape {tuple(shape)}, or class probabilities, "
            f"shape {(*shape, linear_weight.shape[0])}; got shape {tuple(target.shape)}"
        )
    local = rows.of(target, None if soft else rows.of_rows)
    found = function(
        *(rows.of(input), rows.whole(linear_weight), local, rows.whole(linear_bias)),
        weight=rows.whole(weight),
        ignore_index=ignore_index,
        reduction="none" if reduction == "none" else "sum",
        dtype=statistics_dtype(dtype),
        **others,
    )
    loss, *stats = found if isinstance(found, tuple) else (found,)
    loss = rows.wrap(loss, shape, rows.of_rows) if reduction == "none" else rows.summed(loss)
    if reduction == "mean":
        index = -100 if ignore_index is None else ignore_index
        counts = _counts(local, rows.whole(weight), soft, index, local.dim() - 1, loss.dtype)
        n = rows.summed(counts.sum())
        loss = loss / (n if normalizer is None else rows.replicated(normalizer))
    loss = loss.to(dtype)
    if not stats:
        return loss
    return loss, type(stats[0])(*(rows.wrap(t, shape, rows.of_rows) for t in stats[0]))


def _counts(
    target: Tensor,
    weight: Tensor | None,
    soft: bool,
    ignore_index: int,
    dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """What each row adds to the denominator of the mean: w_t or 0 for a label, 1 otherwise."""
    if soft:
        return torch.ones_like(target.select(dim, 0), dtype=dtype)
    target = target.to(torch.int64)
    counted = target != ignore_index
    if weight is None:
        return counted.to(dtype)
    return weight[target.masked_fill(~counted, 0)].masked_fill(~counted, 0.0).to(dtype)


def _everywhere(t: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return t.redistribute(t.device_mesh, [Replicate()] * t.device_mesh.ndim)


def _expect_sharded(name: str, t: object) -> None:
    if not is_sharded(t):
        raise ArgumentError(
            f"{name} must be a DTensor, as another argument is one, got {type(t).__name__}: which "
            "rows or columns of it are here is not known"
        )


class _Rows:
    """Where the rows are: the mesh, and the placements of a tensor with and without its classes."""

    def __init__(self, input: Any, dim: int) -> None:
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        self.DTensor, self.Replicate, self.mesh = DTensor, Replicate, input.device_mesh
        dim %= max(input.dim(), 1)
        kept = [p if type(p) is Shard and p.dim != dim else Replicate() for p in input.placements]
        self.placements = kept
        self.of_rows = [Shard(p.dim - (p.dim > dim)) if isinstance(p, Shard) else p for p in kept]
        self.sums = [Partial() if isinstance(p, Shard) else Replicate() for p in kept]

    def replicated(self, t: Any) -> Any:
        """Return a plain tensor, the same on each process, as a DTensor; others as they are."""
        if not isinstance(t, Tensor) or isinstance(t, self.DTensor):
            return t
        placements = [self.Replicate()] * self.mesh.ndim
        return self.DTensor.from_local(t, self.mesh, placements, run_check=False)

    def of(self, t: Any, placements: list[Any] | None = None) -> Tensor:
        """Return this process's rows of t."""
        placements = self.placements if placements is None else placements
        return self.replicated(t).redistribute(self.mesh, placements).to_local()

    def whole(self, t: Any) -> Tensor | None:
        """Return all of t, whose gradient each process has of its own rows."""
        if t is None:
            return None
        everywhere = [self.Replicate()] * self.mesh.ndim
        whole = self.replicated(t).redistribute(self.mesh, everywhere)
        return whole.to_local(grad_placements=self.sums)

    def wrap(self, local: Tensor, shape: torch.Size, placements: list[Any]) -> Any:
        """Return the DTensor of this process's part."""
        stride = torch.empty(shape, device="meta").stride()
        return self.DTensor.from_local(
            local.contiguous(), self.mesh, placements, run_check=False, shape=shape, stride=stride
        )

    def summed(self, local: Tensor) -> Any:
        """Return the sum of the processes' 0-d tensors, on each of them."""
        return _everywhere(self.DTensor.from_local(local, self.mesh, self.sums, run_check=False))
