"""Whether a function treats the rows of a batch one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops.testing.subject import Subject

__all__ = ["batch", "batch_or_reason", "selected", "sums_over_rows"]


def selected(subject: Subject, positions: Sequence[int], rows: object) -> Subject:
    """Return the subject with `rows`, an index or a slice, of the inputs at `positions`."""
    return subject.with_inputs(
        [x.detach()[rows].clone() if i in positions else x for i, x in enumerate(subject.inputs)]
    )


def batch(subject: Subject) -> tuple[int, ...] | None:
    """Return the inputs that hold a row each of a batch, or None where rows are not independent.

    They are independent where each row alone gives its row of every result.
    """
    for positions in _candidates(subject):
        whole = _results(subject)
        n = subject.inputs[positions[0]].shape[0]
        if any(y.dim() == 0 or y.shape[0] != n for y in whole) or not whole:
            return None
        if all(_same(_row(subject, positions, r), [y[r : r + 1] for y in whole]) for r in range(n)):
            return positions
    return None


def batch_or_reason(subject: Subject) -> tuple[int, ...]:
    """Return `batch`, or raise NotApplicable."""
    from custom_ops.testing.verdict import NotApplicable

    positions = batch(subject)
    if positions is None:
        raise NotApplicable("the rows of dimension 0 are not independent of each other")
    return positions


def sums_over_rows(subject: Subject) -> tuple[int, ...] | None:
    """Return the batch's inputs where each result is the sum of the rows' results."""
    for positions in _candidates(subject):
        whole = _results(subject)
        n = subject.inputs[positions[0]].shape[0]
        parts = [_row(subject, positions, r) for r in range(n)]
        if not whole or not all(_shapes(part) == _shapes(whole) for part in parts):
            continue
        total = [torch.stack(ys).sum(0) for ys in zip(*parts, strict=True)]
        if any(y.any() for y in whole) and _same(total, whole):
            return positions
    return None


def _candidates(subject: Subject) -> list[tuple[int, ...]]:
    """All tensors with as many rows as the first differentiated one; then fewer of them."""
    first = subject.inputs[subject.wrt[0]]
    if first.dim() == 0 or first.shape[0] < 2 or first.shape[0] > 16:
        return []
    n = first.shape[0]
    alike = tuple(
        i
        for i, x in enumerate(subject.inputs)
        if isinstance(x, Tensor) and x.dim() and x.shape[0] == n
    )
    whole = tuple(
        i for i in alike if i == subject.wrt[0] or not subject.inputs[i].is_floating_point()
    )
    return list(dict.fromkeys([alike, whole, (subject.wrt[0],)]))


def _results(subject: Subject) -> list[Tensor]:
    with torch.no_grad():
        return subject.outputs(*subject.fresh(()))


def _row(subject: Subject, positions: tuple[int, ...], r: int) -> list[Tensor] | None:
    try:
        return _results(selected(subject, positions, slice(r, r + 1)))
    except Exception:
        return None


def _shapes(results: list[Tensor] | None) -> list[torch.Size] | None:
    return None if results is None else [y.shape for y in results]


def _same(a: list[Tensor] | None, b: list[Tensor]) -> bool:
    return (
        a is not None
        and len(a) == len(b)
        and all(
            x.shape == y.shape and torch.allclose(x, y, rtol=1e-6, atol=1e-9, equal_nan=True)
            for x, y in zip(a, b, strict=True)
        )
    )
