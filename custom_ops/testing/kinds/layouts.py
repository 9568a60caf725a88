"""Strides, offsets, overlaps, and sizes that are 0, missing or large."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from custom_ops.testing.compare import ROUNDINGS, differing, owed, run
from custom_ops.testing.double import widest
from custom_ops.testing.entry import Check
from custom_ops.testing.rows import batch, batch_or_reason, selected, sums_over_rows
from custom_ops.testing.subject import Subject, floating
from custom_ops.testing.verdict import Fault, NotApplicable

__all__ = ["CHECKS"]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x


def _strided(x: Tensor) -> Tensor:
    if x.dim() == 0:
        return x
    room = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., 1::2]
    return room.copy_(x)


def _offset(x: Tensor) -> Tensor:
    return x.new_zeros(x.numel() + 3)[3:].view(x.shape).copy_(x)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if x.dim() and x.shape[0] > 1 else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _transposed,
    "strided": _strided,
    "offset": _offset,
    "channels last": _channels_last,
    "expanded": _expanded,
}


def strides(subject: Subject) -> str:
    """Each layout of each input gives what the contiguous tensor of the same values gives."""
    double, count = widest(subject), 0
    names = owed(double)
    for i, x in enumerate(double.inputs):
        if not isinstance(x, Tensor) or not x.numel():
            continue
        for what, layout in LAYOUTS.items():
            other = layout(x.detach())
            if other.stride() == x.stride() and other.storage_offset() == x.storage_offset():
                continue
            try:
                want = run(double.replaced(i, other.contiguous()))
            except Exception:
                continue  # the values, not the layout
            inputs = double.fresh()
            inputs[i] = other.requires_grad_() if i in double.wrt else other
            found = differing(run(double, inputs), want, names, ROUNDINGS)
            if found is not None:
                raise Fault(
                    f"{found}, where {double.input_name(i)} is {what}, with strides "
                    f"{other.stride()}: does it read the storage as if it were contiguous?",
                    "layout",
                )
            count += 1
    return f"{count} layouts"


def empty_batch(subject: Subject) -> str:
    """A batch of no rows gives results and gradients of no rows."""
    double = widest(subject)
    positions, kept = batch(double), True
    if positions is None:
        positions, kept = sums_over_rows(double), False
    if positions is None:
        raise NotApplicable("the rows of dimension 0 are neither independent nor summed")
    none = selected(double, positions, slice(0, 0))
    try:
        outputs, gradients = none.gradients()
    except Exception as error:
        raise Fault(
            f"an empty batch raises {type(error).__name__}: {str(error)[:150]}", "empty batch"
        ) from error
    if not kept and any(y.any() or torch.isnan(y).any() for y in outputs):
        raise Fault(
            f"an empty batch gives {outputs[0].tolist()}; a sum of no rows is 0", "empty batch"
        )
    for i, d in zip(none.wrt, gradients, strict=True):
        if d is not None and d.shape != none.inputs[i].shape:
            raise Fault(
                f"the gradient of an empty {none.input_name(i)} has shape {tuple(d.shape)}",
                "empty batch",
            )
        if d is not None and (d.isnan()).any():
            raise Fault(
                f"an empty batch gives NaN in the gradient of {none.input_name(i)}", "empty batch"
            )
    return "no rows, no numbers"


def no_dimensions(subject: Subject) -> str:
    """A function of each entry alone takes a 0-d tensor too."""
    double = widest(subject)
    tensors = [i for i, x in enumerate(double.inputs) if isinstance(x, Tensor)]
    with torch.no_grad():
        outputs = double.outputs(*double.fresh(()))
    shapes = {tuple(double.inputs[i].shape) for i in tensors} | {tuple(y.shape) for y in outputs}
    if len(shapes) != 1 or () in shapes or not all(floating(double.inputs[i]) for i in tensors):
        raise NotApplicable("not a function of each entry alone")
    one = double.with_inputs(
        [x.detach().reshape(-1)[:1].clone() if isinstance(x, Tensor) else x for x in double.inputs]
    )
    try:
        with torch.no_grad():
            alone = one.outputs(*one.fresh(()))
    except Exception as error:
        raise NotApplicable("not a function of each entry alone") from error
    if not all(
        a.shape == (1,) and torch.allclose(a[0], y.reshape(-1)[0], equal_nan=True)
        for a, y in zip(alone, outputs, strict=True)
    ):
        raise NotApplicable("not a function of each entry alone")
    number = one.with_inputs([x[0] if isinstance(x, Tensor) else x for x in one.inputs])
    try:
        got, want = run(number), run(one)
    except Exception as error:
        raise NotApplicable(f"a 0-d tensor is refused: {str(error)[:80]}") from error
    if any(t is not None and t.dim() for t in got):
        raise NotApplicable("the result of a 0-d tensor has a dimension")
    found = differing(got, [None if t is None else t[0] for t in want], owed(number), ROUNDINGS)
    if found is not None:
        raise Fault(f"{found}, where the input is 0-d", "0-d")
    return "a number is an entry"


def many_rows(subject: Subject) -> str:
    """70,000 rows, more than a grid's 65,535, give the rows' own results."""
    positions = batch_or_reason(subject)
    first = subject.inputs[positions[0]]
    n = first.shape[0]
    if first.numel() // n > 64:
        raise NotApplicable("a row has more than 64 entries")
    times = -(-70_000 // n)
    rows = torch.arange(n).repeat(times)
    many = selected(subject, positions, rows)
    with torch.no_grad():
        got = many.outputs(*many.fresh(()))
        want = subject.outputs(*subject.fresh(()))
    found = differing(got, [y[rows] for y in want], owed(many), ROUNDINGS)
    if found is not None:
        raise Fault(f"{found}, among {n * times} rows; the row alone differs", "many rows")
    return f"{n * times} rows"


CHECKS = (
    Check("layouts", "strides", strides, after=("gradient", "inputs unchanged")),
    Check("layouts", "empty batch", empty_batch, after=("gradient", "inputs unchanged")),
    Check("layouts", "0-d", no_dimensions),
    Check("layouts", "many rows", many_rows),
)
