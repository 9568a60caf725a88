"""What the upstream gradient and needs_input_grad may be."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.testing.compare import ROUNDINGS, differing
from custom_ops.testing.entry import Check
from custom_ops.testing.jacobians import wide
from custom_ops.testing.refusals import refusals
from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import Fault, NotApplicable

__all__ = ["CHECKS"]


def subsets_of_inputs(subject: Subject) -> str:
    """Each subset of the inputs requires grad, the others are frozen."""
    double = wide(subject)
    _, want = double.gradients()
    whole = dict(zip(double.wrt, want, strict=True))
    count = 0
    for subset in double.subsets():
        try:
            _, got = double.gradients(wrt=subset)
        except Exception as error:
            raise Fault(
                f"backward raises where only {_listed(double, subset)} requires grad: "
                f"{type(error).__name__}: {str(error)[:120]}",
                "frozen input",
            ) from error
        names = [f"the gradient of {double.input_name(i)}" for i in subset]
        found = differing(got, [whole[i] for i in subset], names, ROUNDINGS)
        if found is not None:
            raise Fault(
                f"{found}, where only {_listed(double, subset)} requires grad and the others are "
                "frozen",
                "frozen input",
            )
        count += 1
    inputs = double.fresh(())
    if any(y.requires_grad for y in double.outputs(*inputs)):
        raise Fault("the result requires grad where no input does", "frozen input")
    return f"{count} subsets, and none"


def _listed(subject: Subject, subset: tuple[int, ...]) -> str:
    return " and ".join(f"`{subject.names[i]}`" for i in subset)


def upstream_layouts(subject: Subject) -> str:
    """Non-contiguous and expanded upstream gradients give what contiguous ones give."""
    double = wide(subject)
    for what, make in (("non-contiguous", _strided), ("expanded", _expanded)):
        inputs = double.fresh()
        outputs = [y for y in double.outputs(*inputs) if y.requires_grad and y.dim()]
        if not outputs:
            raise NotApplicable("every result is a number")
        vs = [make(v) for v in double.cotangents(outputs)]
        leaves = [inputs[i] for i in double.wrt]
        want = torch.autograd.grad(
            outputs, leaves, [v.contiguous() for v in vs], retain_graph=True, allow_unused=True
        )
        other = double.fresh()
        outputs = [y for y in double.outputs(*other) if y.requires_grad and y.dim()]
        got = torch.autograd.grad(outputs, [other[i] for i in double.wrt], vs, allow_unused=True)
        names = [f"the gradient of {double.input_name(i)}" for i in double.wrt]
        found = differing(got, want, names, ROUNDINGS)
        if found is not None:
            raise Fault(f"{found}, where the upstream gradient is {what}", "upstream's layout")
    return "non-contiguous and expanded"


def _strided(v: Tensor) -> Tensor:
    room = torch.zeros(*v.shape[:-1], 2 * v.shape[-1], dtype=v.dtype)[..., ::2]
    return room.copy_(v)


def _expanded(v: Tensor) -> Tensor:
    return v.reshape(-1)[:1].expand(v.shape) if v.numel() else v


def upstream_missing(subject: Subject) -> str:
    """Only one of several results is used: the others' upstream gradients are None or 0."""
    double = wide(subject)
    inputs = double.fresh()
    outputs = double.outputs(*inputs)
    used = [o for o, y in enumerate(outputs) if y.requires_grad]
    if len(used) < 2:
        raise NotApplicable("there is one differentiable result")
    leaves = [inputs[i] for i in double.wrt]
    total: list[Tensor] = [torch.zeros_like(x) for x in leaves]
    vs = double.cotangents(outputs)
    for o in used:
        alone = torch.autograd.grad(outputs[o], leaves, vs[o], retain_graph=True, allow_unused=True)
        total = [t if d is None else t + d for t, d in zip(total, alone, strict=True)]
    _, got = double.gradients()
    names = [f"the gradient of {double.input_name(i)}" for i in double.wrt]
    found = differing(
        total,
        [torch.zeros_like(t) if d is None else d for t, d in zip(total, got, strict=True)],
        names,
        ROUNDINGS,
    )
    if found is not None:
        raise Fault(
            f"{found}, where each result is used alone and the gradients are added",
            "upstream missing",
        )
    return f"{len(used)} results, each alone"


def batched_gradient(subject: Subject) -> str:
    """Several upstream gradients at once (is_grads_batched) give what each gives alone."""
    double = wide(subject)
    inputs = double.fresh()
    outputs = [y for y in double.outputs(*inputs) if y.requires_grad]
    if not outputs:
        raise NotApplicable("no result has a graph")
    leaves = [inputs[i] for i in double.wrt]
    vs = [torch.stack([v, -2 * v]) for v in double.cotangents(outputs)]
    with refusals():
        got = torch.autograd.grad(
            outputs, leaves, vs, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
    for b in range(2):
        other = double.fresh()
        outputs = [y for y in double.outputs(*other) if y.requires_grad]
        want = torch.autograd.grad(
            outputs, [other[i] for i in double.wrt], [v[b] for v in vs], allow_unused=True
        )
        found = differing(
            [None if d is None else d[b] for d in got],
            want,
            [f"the gradient of {double.input_name(i)}" for i in double.wrt],
            ROUNDINGS,
        )
        if found is not None:
            raise Fault(f"{found}, where the upstream gradients are batched", "batched gradient")
    return "two at once"


CHECKS = (
    Check("derivatives", "subsets of inputs", subsets_of_inputs),
    Check("derivatives", "upstream layouts", upstream_layouts),
    Check("derivatives", "upstream missing", upstream_missing),
    Check("derivatives", "batched gradient", batched_gradient),
)
