"""From the rows' losses to one number: the sum, and what the mean divides it by."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from custom_ops import kernels
from custom_ops.apply import apply, forward_mode_of
from custom_ops.kernels import Options, eager, targets

__all__ = ["Total", "denominator"]


def denominator(classes: int, target: Tensor, weight: Tensor | None, o: Options) -> Tensor | float:
    """Return the mean's denominator: Σ w_t of the rows that count, or the number of rows."""
    if target.is_floating_point():
        return target.numel() / classes if classes else float("nan")
    if weight is None or not classes:
        return (~targets.ignored_rows(target, o)).sum()
    return apply(Total, targets.label_weights(target, classes, weight, o))


class Total(Function):
    """Σ_r x_r, in an order that does not depend on the number of threads."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Σ_r x_r."""
        return kernels.total(x)

    plain = staticmethod(eager.total)

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
