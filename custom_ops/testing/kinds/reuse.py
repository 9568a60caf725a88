"""A graph that is kept, a result that is changed, gradients that add up."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from custom_ops.testing.compare import ROUNDINGS, differing, owed, run
from custom_ops.testing.double import widest
from custom_ops.testing.entry import Check
from custom_ops.testing.subject import Subject, floating
from custom_ops.testing.verdict import Fault, NotApplicable

__all__ = ["CHECKS"]


def _graph(subject: Subject) -> tuple[list[object], list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs, leaves, differentiable outputs and their upstream gradients."""
    inputs = subject.fresh()
    outputs, vs = subject.differentiable(subject.outputs(*inputs))
    if not outputs:
        raise NotApplicable("no result has a graph")
    return inputs, [inputs[i] for i in subject.wrt], outputs, vs


def _gradient_names(subject: Subject) -> list[str]:
    return [f"the gradient of {subject.input_name(i)}" for i in subject.wrt]


def retained_graph(subject: Subject) -> str:
    """Two backwards of one graph give the same bits."""
    _, leaves, outputs, vs = _graph(subject)
    first = torch.autograd.grad(outputs, leaves, vs, retain_graph=True, allow_unused=True)
    first = tuple(d if d is None else d.clone() for d in first)
    second = torch.autograd.grad(outputs, leaves, vs, retain_graph=True, allow_unused=True)
    found = differing(second, first, _gradient_names(subject))
    if found is not None:
        raise Fault(
            f"{found}, the first time's: a second backward of a retained graph differs; "
            "backward must not change what it saved",
            "retained graph",
        )
    return "the same bits twice"


def two_losses(subject: Subject) -> str:
    """Two losses of one result, and one loss that is their sum, give the same gradient."""
    double = widest(subject)
    inputs, leaves, outputs, vs = _graph(double)
    torch.autograd.backward(outputs, vs, retain_graph=True)
    torch.autograd.backward(outputs, [-3 * v for v in vs])
    got = [x.grad for x in leaves]
    _, want = double.gradients()
    want = [None if d is None else -2 * d for d in want]
    found = differing(got, want, _gradient_names(double), ROUNDINGS)
    if found is not None:
        raise Fault(f"{found}, the sum: the gradients of two losses do not add up", "two losses")
    del inputs
    return "add up"


def accumulation(subject: Subject) -> str:
    """Two calls on the same leaves add their gradients, and no leaf's changes another's."""
    double = widest(subject)
    inputs = double.fresh()
    leaves = [inputs[i] for i in double.wrt]
    for _ in range(2):
        outputs, vs = double.differentiable(double.outputs(*inputs))
        if not outputs:
            raise NotApplicable("no result has a graph")
        torch.autograd.backward(outputs, vs)
    _, want = double.gradients()
    want = [None if d is None else 2 * d for d in want]
    found = differing([x.grad for x in leaves], want, _gradient_names(double), ROUNDINGS)
    if found is not None:
        raise Fault(f"{found}, twice that of one call: `.grad` does not accumulate", "accumulation")
    return "twice the gradient of one call"


def inputs_kept(subject: Subject) -> str:
    """Neither forward nor backward writes to an input or to the upstream gradient."""
    copies = subject.fresh(())
    inputs = list(subject.fresh(()))
    for i in subject.wrt:
        inputs[i] = inputs[i].requires_grad_() * 1  # not a leaf: a write to it would be allowed
    given = [(i, x) for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    versions = {i: x._version for i, x in given}
    outputs = [y for y in subject.outputs(*inputs) if y.requires_grad]
    _unchanged(subject, "forward", given, copies, versions)
    if outputs:
        results = [y.detach().clone() for y in outputs]
        vs = subject.cotangents(outputs)
        kept = [v.clone() for v in vs]
        torch.autograd.backward(outputs, vs)
        _unchanged(subject, "backward", given, copies, versions)
        for v, before in zip(vs, kept, strict=True):
            if not _equal(v, before):
                raise Fault(
                    "backward writes to the upstream gradient v; it belongs to the caller",
                    "upstream changed",
                )
        for y, before in zip(outputs, results, strict=True):
            if not _equal(y, before):
                raise Fault(
                    "backward writes to the result, which the caller still has", "result changed"
                )
    return "inputs, result and upstream gradient unchanged"


def _unchanged(
    subject: Subject,
    when: str,
    given: list[tuple[int, Tensor]],
    copies: list[Tensor],
    versions: dict[int, int],
) -> None:
    for i, x in given:
        if not _equal(x, copies[i]):
            silent = x._version == versions[i]
            how = (
                "without a version bump, so autograd cannot notice"
                if silent
                else ("in place; mark_dirty is missing")
            )
            raise Fault(
                f"{when} writes to {subject.input_name(i)}, {how}: a later use reads other numbers",
                "input changed",
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    return (
        torch.equal(torch.nan_to_num(a.detach()), torch.nan_to_num(b))
        if floating(a)
        else (torch.equal(a, b))
    )


def changes_noticed(subject: Subject) -> str:
    """A tensor that is changed in place between forward and backward is noticed, or not needed."""
    count = 0
    want = run(subject)
    n = len(want) - len(subject.wrt)
    names = owed(subject)[n:]
    for position in range(len(subject.inputs)):
        if not isinstance(subject.inputs[position], Tensor) or not subject.inputs[position].numel():
            continue
        inputs = subject.fresh()
        if position in subject.wrt:
            inputs[position] = (leaf := inputs[position]) * 1
        outputs, vs = subject.differentiable(subject.outputs(*inputs))
        if not outputs:
            continue
        leaves = [leaf if i == position else inputs[i] for i in subject.wrt]
        with torch.no_grad():
            _change(inputs[position])
        count += _noticed(outputs, leaves, vs, want[n:], names, subject.input_name(position))
    inputs = subject.fresh()
    outputs, vs = subject.differentiable(subject.outputs(*inputs))
    leaves = [inputs[i] for i in subject.wrt]
    for o, y in enumerate(outputs):
        if y.is_leaf or y._is_view():
            continue
        with torch.no_grad():
            _change(y)
        count += _noticed(outputs, leaves, vs, want[n:], names, f"result {o}")
    return f"{count} changes noticed, the others not needed"


def _change(x: Tensor) -> None:
    if x.is_floating_point() or x.is_complex():
        x.mul_(3).add_(1)
    elif x.dtype == torch.bool:
        x.logical_not_()
    else:
        x.copy_(x.flip(0) if x.dim() else x)


def _noticed(
    outputs: list[Tensor],
    leaves: list[Tensor],
    vs: list[Tensor],
    want: list[Tensor | None],
    names: list[str],
    what: str,
) -> bool:
    try:
        got = torch.autograd.grad(outputs, leaves, vs, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if re.search("in-?place", str(error)):
            return True
        raise
    found = differing(got, want, names, ROUNDINGS)
    if found is not None:
        raise Fault(
            f"{found}: {what} was changed in place after forward, and backward used the changed "
            "numbers; keep tensors by save_for_backward, which notices that",
            "change not noticed",
        )
    return False


CHECKS = (
    Check("reuse", "inputs unchanged", inputs_kept),
    Check("reuse", "retained graph", retained_graph),
    Check("reuse", "two losses", two_losses, after=("gradient", "inputs unchanged")),
    Check("reuse", "accumulation", accumulation, after=("gradient", "inputs unchanged")),
    Check("reuse", "changes noticed", changes_noticed),
)
