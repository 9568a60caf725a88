"""What a bad input does: an error, never a number."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.testing.entry import Check
from custom_ops.testing.subject import Subject, floating
from custom_ops.testing.verdict import Fault, NotApplicable
from custom_ops.testing.wording import written

__all__ = ["CHECKS", "labels"]

BAD = (-1, 2**31 - 1, 2**40)


def labels(subject: Subject) -> int | None:
    """Return the position of an integer tensor that labels the rows of a floating-point input.

    It has the shape of that input without one dimension, not the first, and holds indices of it.
    """
    for i, t in enumerate(subject.inputs):
        if not isinstance(t, Tensor) or t.dtype not in (torch.int64, torch.int32) or not t.numel():
            continue
        for j in subject.wrt:
            x = subject.inputs[j]
            for d in range(1, x.dim()):
                shape = (*x.shape[:d], *x.shape[d + 1 :])
                if shape == tuple(t.shape) and int(t.max()) < x.shape[d]:
                    return i if _go_with_the_rows(subject, i, j) else None
    return None


def _go_with_the_rows(subject: Subject, i: int, j: int) -> bool:
    """Whether rows and labels that change places together change nothing but the order."""
    if subject.inputs[i].dim() == 0:
        return False
    n = subject.inputs[i].shape[0]
    alike = [
        k
        for k, x in enumerate(subject.inputs)
        if isinstance(x, Tensor) and x.dim() and x.shape[0] == n
    ]
    return any(_only_the_order_changes(subject, n, rows) for rows in ([i, j], alike) if j in rows)


def _only_the_order_changes(subject: Subject, n: int, rows: list[int]) -> bool:
    turned = subject.with_inputs(
        [x.detach().roll(1, 0) if k in rows else x for k, x in enumerate(subject.inputs)]
    )
    try:
        with torch.no_grad():
            before = subject.outputs(*subject.fresh(()))
            after = turned.outputs(*turned.fresh(()))
    except Exception:
        return False
    rolled = [y.roll(1, 0) if y.dim() and y.shape[0] == n else y for y in before]
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6)
        for a, b in zip(after, rolled, strict=True)
    )


def bad_labels(subject: Subject) -> str:
    """A label out of range raises, or gives NaN; never a finite number."""
    i = labels(subject)
    if i is None:
        raise NotApplicable("no integer input has the form of labels")
    first = subject.inputs[i].reshape(-1)[0].item()
    for bad in (*_past_the_end(subject, i), *BAD):
        t = subject.inputs[i].contiguous().clone()
        if bad > torch.iinfo(t.dtype).max:
            continue
        t.view(-1)[0] = bad
        other = subject.replaced(i, t)
        try:
            outputs, gradients = other.gradients()
        except Exception:
            continue
        numbers = [y for y in outputs if torch.isnan(y).any()]
        if not numbers:
            raise Fault(
                f"{subject.input_name(i)} holds the label {bad} and the result is "
                f"{written(outputs[0])}, silently; expected an IndexError that names the label "
                f"(with {first} in its place the call is right)",
                "bad label",
            )
        del gradients
    return "an error or NaN"


def _past_the_end(subject: Subject, i: int) -> list[int]:
    t = subject.inputs[i]
    sizes = [
        x.shape[d]
        for x in subject.inputs
        if floating(x) and x.dim() == t.dim() + 1
        for d in range(x.dim())
        if (*x.shape[:d], *x.shape[d + 1 :]) == tuple(t.shape)
    ]
    return [max(sizes)] if sizes else []


def mismatched_rows(subject: Subject) -> str:
    """One row more in an input that must fit another's raises; it is not broadcast away."""
    i = labels(subject)
    if i is None:
        raise NotApplicable("no integer input has the form of labels")
    t = subject.inputs[i]
    if t.dim() == 0:
        raise NotApplicable("the labels are a number")
    longer = torch.cat([t, t[:1]])
    try:
        with torch.no_grad():
            outputs = subject.outputs(*subject.replaced(i, longer).fresh(()))
    except Exception:
        return "an error"
    raise Fault(
        f"{subject.input_name(i)} has shape {tuple(longer.shape)}, a row more than there are, and "
        f"the result is {written(outputs[0])}; expected an error",
        "mismatched rows",
    )


CHECKS = (
    Check("errors", "bad labels", bad_labels),
    Check("errors", "mismatched rows", mismatched_rows),
)
