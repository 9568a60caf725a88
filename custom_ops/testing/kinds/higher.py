"""The derivative of the backward: second and third order, by reverse mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.testing.detached import missing_terms
from custom_ops.testing.entry import Check
from custom_ops.testing.jacobians import wide
from custom_ops.testing.refusals import refusals
from custom_ops.testing.scalars import (
    Scalar,
    by_autograd,
    by_differences,
    columns,
    gradient_of,
    wrong,
)
from custom_ops.testing.smallest import smallest
from custom_ops.testing.source import function_calls, location
from custom_ops.testing.subject import Subject, make_subject
from custom_ops.testing.verdict import Fault, NotApplicable
from custom_ops.testing.wording import written

__all__ = ["CHECKS", "projected_gradient"]


def projected_gradient(subject: Subject, us: list[Tensor]) -> Scalar:
    """Return ⟨u, vᵀJ⟩ as a function of the inputs, itself differentiable."""

    def q(inputs: list[Any]) -> Tensor:
        outputs = [y for y in subject.outputs(*inputs) if y.requires_grad]
        leaves = [inputs[i] for i in subject.wrt]
        if not outputs:
            return torch.zeros((), dtype=torch.float64)
        vs = subject.cotangents(outputs)
        gradients = torch.autograd.grad(outputs, leaves, vs, create_graph=True, allow_unused=True)
        kept = [(u * d).sum() for u, d in zip(us, gradients, strict=True) if d is not None]
        return torch.stack(kept).sum() if kept else torch.zeros((), dtype=torch.float64)

    return q


def second_derivative(subject: Subject) -> str:
    """The derivative of the function's own gradient, beside its differences."""
    double = wide(subject)
    with refusals():
        found = _lacking(double)
    if found is None:
        return "agrees with differences of the gradient"
    inner = _inner(double)
    if inner is not None:
        double = inner
    raise _fault(double)


def _lacking(subject: Subject) -> tuple[int, list[Tensor], Tensor, Tensor, Tensor] | None:
    """Input, u, observed, expected and error of the first second derivative that is wrong."""
    us = subject.tangents()
    q = projected_gradient(subject, us)
    observed = by_autograd(subject, q)
    for d, i in zip(observed, subject.wrt, strict=True):
        if not d.numel():
            continue
        expected = by_differences(subject, q, i)
        seen = d.reshape(-1)[columns(subject, i)]
        if wrong(seen, expected).any():
            return i, us, seen, expected.value, expected.error
    return None


def _inner(subject: Subject) -> Subject | None:
    if subject.written_function() is not None:
        return None
    with function_calls() as calls:
        subject.outputs(*subject.fresh())
    for function, inputs in calls:
        inner = make_subject(
            function,
            [
                x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
                for x in inputs
            ],
            seed=subject.seed,
        )
        try:
            if inner.wrt and _lacking(inner) is not None:
                return inner
        except Exception:
            continue
    return None


def _fault(subject: Subject) -> Fault:
    names = _named(subject)
    small = smallest(subject, lambda s: _lacking(s) is not None and _named(s) == names)
    found = _lacking(small)
    assert found is not None
    i, _, seen, expected, _ = found
    x = subject.input_name(i)
    shown = [f"{n} = {written(a)}" for n, a in zip(small.names, small.inputs, strict=True)]
    shown += [
        f"expected ∂⟨u, vᵀJ⟩/∂{small.names[i]}: {written(expected)}",
        f"observed: {written(seen)}",
    ]
    where = location(subject.function)
    if names:
        listed = " and ".join(f"`{name}`" for name in names)
        sentence = (
            f"the second derivative lacks the term through {listed}: a tensor that forward "
            "computes and saves, or that is detached, is a constant to autograd; compute it in "
            "backward, from saved inputs and results"
        )
        return Fault(sentence, "detached", tuple(shown), where)
    if not seen.any():
        return Fault(
            f"the second derivative by {x} is silently 0: backward cuts its graph; compute it with "
            "differentiable operations, or mark it once_differentiable",
            "detached",
            tuple(shown),
            where,
        )
    return Fault(f"the second derivative by {x} is wrong", "", tuple(shown), where)


def _named(subject: Subject) -> list[str]:
    found = _lacking(subject)
    if found is None:
        return []
    i, us, seen, expected, error = found
    return missing_terms(subject, i, us, expected - seen, error)


def third_derivative(subject: Subject) -> str:
    """The derivative of the function's own second derivative, beside its differences."""
    double = wide(subject)
    us = double.tangents()
    q = projected_gradient(double, us)

    def q2(inputs: list[Any]) -> Tensor:
        leaves = [inputs[i] for i in double.wrt]
        found = gradient_of(q(inputs), leaves, keep=True)
        return torch.stack([(u * d).sum() for u, d in zip(us, found, strict=True)]).sum()

    with refusals():
        observed = by_autograd(double, q2)
        for d, i in zip(observed, double.wrt, strict=True):
            if (
                d.numel()
                and wrong(d.reshape(-1)[columns(double, i)], by_differences(double, q2, i)).any()
            ):
                raise Fault(
                    f"the third derivative by {double.input_name(i)} is not that of the second: "
                    "a derivative of the backward is cut off its graph",
                    "detached",
                )
    return "agrees with differences of the second"


def derivative_by_the_upstream(subject: Subject) -> str:
    """The derivative of vᵀJ by v, which is J u: backward may not detach v."""
    double = wide(subject)
    inputs = double.fresh()
    with refusals():
        outputs = [y for y in double.outputs(*inputs) if y.requires_grad]
        if not outputs:
            raise NotApplicable("no result has a graph")
        vs = [v.requires_grad_() for v in double.cotangents(outputs)]
        leaves = [inputs[i] for i in double.wrt]
        gradients = torch.autograd.grad(outputs, leaves, vs, create_graph=True, allow_unused=True)
        us = double.tangents()
        kept = [(u, d) for u, d in zip(us, gradients, strict=True) if d is not None]
        q = torch.stack([(u * d).sum() for u, d in kept]).sum()
        observed = gradient_of(q, vs)
    # vᵀJ u is linear in v, so v · ∂q/∂v = q
    product = torch.stack([(v * d).sum() for v, d in zip(vs, observed, strict=True)]).sum()
    size = sum(float((u * d).abs().sum()) for u, d in kept)
    if abs(float(product - q)) > 1e-9 * size + 1e-12:
        what = "0" if not any(d.any() for d in observed) else "wrong"
        raise Fault(
            f"the derivative of the gradient by the upstream gradient v is {what}: backward "
            "detaches v",
            "detached",
        )
    return "∂(vᵀJ u)/∂v times v is vᵀJ u"


CHECKS = (
    Check(
        "derivatives",
        "second derivative",
        second_derivative,
        after=("gradient", "inputs unchanged"),
    ),
    Check(
        "derivatives",
        "third derivative",
        third_derivative,
        after=("gradient", "inputs unchanged", "second derivative"),
    ),
    Check(
        "derivatives",
        "by the upstream gradient",
        derivative_by_the_upstream,
        after=("gradient", "inputs unchanged"),
    ),
)
