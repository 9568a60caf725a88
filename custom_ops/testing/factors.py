"""The tensors that may be a factor once too often, or be missing as one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from custom_ops.testing.subject import Subject, floating

__all__ = ["factors"]


def factors(subject: Subject) -> Iterator[tuple[Tensor, str]]:
    """Yield every floating-point input, and every 1-D one at the labels: `w` and `w[t]`."""
    named = list(zip(subject.inputs, subject.names, strict=True))
    for x, name in named:
        if floating(x):
            yield x.detach(), name
    for x, name in named:
        if not floating(x) or x.dim() != 1:
            continue
        for t, label in named:
            if _indexes(t, x.numel()):
                yield x.detach()[t.long()], f"{name}[{label}]"


def _indexes(t: object, n: int) -> bool:
    """Whether `t` holds indices among n."""
    if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex() or not t.numel():
        return False
    return bool((t >= 0).all() and (t < n).all())
