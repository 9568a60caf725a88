"""The smallest input that still shows a mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from custom_ops.testing.subject import Subject, floating

__all__ = ["smallest"]


def smallest(subject: Subject, shows: Callable[[Subject], bool]) -> Subject:
    """Return a smaller subject for which `shows` holds; at most some dozens are tried."""

    def holds(smaller: Subject) -> bool:
        try:
            return shows(smaller)
        except Exception:
            return False

    for _ in range(4):
        for smaller in _smaller(subject):
            if holds(smaller):
                subject = smaller
                break
        else:
            break
    rounded = subject.with_inputs(
        [(x.detach() * 10).round() / 10 if floating(x) else x for x in subject.inputs]
    )
    return rounded if holds(rounded) else subject


def _smaller(subject: Subject) -> Iterator[Subject]:
    """Yield the subject with every dimension of one size cut to 1, then to 2."""
    tensors = [x for x in subject.inputs if isinstance(x, Tensor)]
    sizes = sorted({n for x in tensors for n in x.shape if n > 1}, reverse=True)
    for n in sizes:
        for cut in (1, 2):
            if cut < n:
                yield subject.with_inputs([_cut(x, n, cut) for x in subject.inputs])


def _cut(x: object, n: int, cut: int) -> object:
    if not isinstance(x, Tensor):
        return x
    x = x.detach()
    for d, size in enumerate(x.shape):
        if size == n:
            x = x.narrow(d, 0, cut)
    if (
        not x.is_floating_point()
        and not x.is_complex()
        and x.dtype != torch.bool
        and (x.numel() and x.min() >= 0 and x.max() < n)
    ):
        x = x % cut  # an index among n becomes one among `cut`
    return x.clone()
