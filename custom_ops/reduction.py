"""From the rows' losses to one number: the sum, and what the mean divides it by."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from custom_ops import kernels
from custom_ops.apply import apply, forward_mode_of
from custom_ops.kernels import Options, eager
from custom_ops.kernels.eager import targets

__all__ = ["Total", "denominator"]


def denominator(
    classes: int,
    target: Tensor,
    weight: Tensor | None,
    o: Options,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return what the mean divides by, 0-d: the `normalizer`, Σ w_t, or the number of rows.

    A tensor also where the number is known, so that autograd saves the same tensors in every case:
    a checkpoint compares what forward and recomputation saved.
    """
    if isinstance(normalizer, Tensor):
        return normalizer
    if normalizer is not None:
        return target.new_full((), normalizer, dtype=o.dtype)
    if target.is_floating_point():
        rows = target.numel() / classes if classes else float("nan")
        return target.new_full((), rows, dtype=o.dtype)
    if weight is None or not classes:
        return (~targets.ignored_rows(target, o)).sum().to(o.dtype)
    return apply(Total, targets.label_weights(target, classes, weight, o))


class Total(Function):
    """Σ_r x_r, in an order that does not depend on the number of threads."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Σ_r x_r."""
        return kernels.total(x)

    algebra = staticmethod(eager.total)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], _: Tensor) -> None:
        """Keep the shape."""
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """∂Σ/∂x_r = 1."""
        return g.expand(ctx.shape)


@forward_mode_of(Total)
class TotalWithJvp(Total):
    @staticmethod
    def jvp(_: Any, dx: Tensor) -> Tensor:
        return kernels.total(dx)
