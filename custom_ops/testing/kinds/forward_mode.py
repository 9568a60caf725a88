"""Forward mode, alone and with reverse mode around it or inside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from custom_ops.testing.differences import Difference, difference
from custom_ops.testing.entry import Check
from custom_ops.testing.jacobians import concatenated, wide
from custom_ops.testing.kinds.higher import projected_gradient
from custom_ops.testing.refusals import refusals
from custom_ops.testing.scalars import by_autograd, by_differences, columns, wrong
from custom_ops.testing.source import function_calls, location
from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import Fault, NotApplicable, TorchFault
from custom_ops.testing.wording import written

__all__ = ["CHECKS"]


def _tangent_of(
    subject: Subject, inputs: list[Any], wrt: tuple[int, ...], ts: list[Tensor]
) -> list[Tensor]:
    """Return J t for the inputs at `wrt`, 0 where the result has no tangent."""
    with forward_ad.dual_level():
        dual = list(inputs)
        for i, t in zip(wrt, ts, strict=True):
            dual[i] = forward_ad.make_dual(inputs[i], t)
        outputs = [forward_ad.unpack_dual(y) for y in subject.outputs(*dual)]
    return [torch.zeros_like(y) if t is None else t for y, t in outputs]


def forward_mode(subject: Subject) -> str:
    """J t beside differences, for each input alone and for all together."""
    double = wide(subject)
    ts = dict(zip(double.wrt, double.tangents(), strict=True))
    for wrt in [*((i,) for i in double.wrt), double.wrt]:
        with refusals():
            got = _tangent_of(double, double.fresh(()), wrt, [ts[i] for i in wrt])
        observed = torch.cat([t.reshape(-1) for t in got]).detach()
        expected = _directional(double, wrt, [ts[i] for i in wrt])
        off = wrong(observed, expected)
        if off.any():
            raise _tangent_fault(double, wrt, observed, expected)
    return "agrees with differences"


def _directional(subject: Subject, wrt: tuple[int, ...], ts: list[Tensor]) -> Difference:
    total: list[Difference] = []
    for i, t in zip(wrt, ts, strict=True):
        x = subject.inputs[i].detach()
        total.append(difference(partial(concatenated, subject, i), x, t))
    return Difference(
        torch.stack([d.value for d in total]).sum(0), torch.stack([d.error for d in total]).sum(0)
    )


def _tangent_fault(
    subject: Subject, wrt: tuple[int, ...], observed: Tensor, expected: Difference
) -> Fault:
    x = " and ".join(subject.input_name(i) for i in wrt)
    judged = torch.isfinite(expected.error)
    want, got = expected.value[judged], observed[judged]
    shown = (f"expected {written(want)}", f"observed {written(got)}")
    where = location(subject.function, "jvp")
    if not got.any():
        return Fault(
            f"the tangent through {x} is 0, though the result depends on it; does setup_context "
            "call save_for_forward?",
            "zero tangent",
            shown,
            where,
        )
    c = float((got * want).sum() / (want * want).sum())
    if (got - want).abs().max() < 1e-5 * want.abs().max():
        return Fault(
            f"the tangent through {x} is right to a few digits only, in float64: a number on the "
            "way, or a constant, is of float32",
            "precision",
            shown,
            where,
        )
    if torch.allclose(got, c * want, rtol=1e-7, atol=1e-9):
        if abs(c + 1) < 1e-6:
            return Fault(f"the tangent through {x} has the wrong sign", "sign", shown, where)
        return Fault(
            f"the tangent through {x} is {c:.6g} times the right one", "factor", shown, where
        )
    return Fault(f"the tangent through {x} is wrong", "tangent", shown, where)


def forward_over_reverse(subject: Subject) -> str:
    """The tangent of the gradient beside differences of the gradient."""
    double = wide(subject)
    us, ts = double.tangents(), [t.flip(0) if t.dim() else t for t in double.tangents()]

    def gradients(*xs: Tensor) -> Tensor:
        inputs = double.fresh(())
        for i, x in zip(double.wrt, xs, strict=True):
            inputs[i] = x
        return projected_gradient(double, us)(inputs)

    with refusals(), forward_ad.dual_level():
        leaves = [double.inputs[i].detach().clone().requires_grad_() for i in double.wrt]
        duals = [forward_ad.make_dual(x, t) for x, t in zip(leaves, ts, strict=True)]
        got = forward_ad.unpack_dual(gradients(*duals)).tangent
    expected = _total(double, projected_gradient(double, us), ts)
    observed = torch.zeros(1, dtype=torch.float64) if got is None else got.detach().reshape(1)
    if wrong(observed, expected).any():
        zero = "0, silently" if not observed.any() else f"{observed.item():.6g}"
        raise Fault(
            f"forward over reverse is {zero}; expected {expected.value.item():.6g}, the derivative "
            "of the gradient",
            "detached" if not observed.any() else "",
        )
    return "agrees with differences of the gradient"


def _total(subject: Subject, q: Any, ts: list[Tensor]) -> Difference:
    """The derivative of a scalar along all tangents at once."""
    value = torch.zeros(1, dtype=torch.float64)
    error = torch.zeros(1, dtype=torch.float64)
    for i, t in zip(subject.wrt, ts, strict=True):

        def f(x: Tensor, i: int = i) -> Tensor:
            inputs = subject.fresh()
            inputs[i] = x.clone().requires_grad_()
            return q(inputs).detach().reshape(1)

        d = difference(f, subject.inputs[i].detach(), t)
        value, error = value + d.value, error + d.error
    return Difference(value, error)


def reverse_over_forward(subject: Subject) -> str:
    """The gradient of the tangent beside differences of the tangent."""
    double = wide(subject)
    ts = double.tangents()

    def q(inputs: list[Any]) -> Tensor:
        found = _tangent_of(double, inputs, double.wrt, ts)
        vs = double.cotangents(found)
        return torch.stack([(v * t).sum() for v, t in zip(vs, found, strict=True)]).sum()

    with refusals():
        try:
            observed = by_autograd(double, q)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise TorchFault(
                "torch cannot differentiate the tangent of one of its own operators that is used "
                "here, softmax or logsumexp: its jvp writes to what it saved (pytorch issue 162350)"
            ) from error
    for d, i in zip(observed, double.wrt, strict=True):
        if (
            d.numel()
            and wrong(d.reshape(-1)[columns(double, i)], by_differences(double, q, i)).any()
        ):
            zero = "0, silently" if not d.any() else "wrong"
            raise Fault(
                f"reverse over forward is {zero} for {double.input_name(i)}",
                "detached" if not d.any() else "",
            )
    return "agrees with differences of the tangent"


def nested_forward(subject: Subject) -> str:
    """Forward over forward, by torch.func.jvp twice, beside differences of forward mode."""
    double = wide(subject)
    ts = double.tangents()

    def f(*xs: Tensor) -> tuple[Tensor, ...]:
        inputs = double.fresh(())
        for i, x in zip(double.wrt, xs, strict=True):
            inputs[i] = x
        return tuple(double.outputs(*inputs))

    def tangent(*xs: Tensor) -> Tensor:
        found = torch.func.jvp(f, xs, tuple(ts))[1]
        return torch.cat([t.reshape(-1) for t in found])

    xs = tuple(double.inputs[i].detach() for i in double.wrt)
    with refusals(), function_calls() as calls:
        observed = torch.func.jvp(tangent, xs, tuple(ts))[1]
    value = error = torch.zeros_like(observed)
    for k, t in enumerate(ts):

        def along(x: Tensor, k: int = k) -> Tensor:
            return tangent(*xs[:k], x, *xs[k + 1 :]).detach()

        d = difference(along, xs[k], t)
        value, error = value + d.value, error + d.error
    if wrong(observed, Difference(value, error)).any():
        if any(cls.jvp is not Function.jvp for cls, _ in calls):
            raise TorchFault(
                "torch answers forward mode inside forward mode wrongly, without a word, through "
                "every Function with a jvp (pytorch issue 197867); the function can refuse it"
            )
        raise Fault("forward mode nested in forward mode is wrong", "nested forward")
    if not observed.numel():
        raise NotApplicable("the result is empty")
    return "agrees with differences of forward mode"


CHECKS = (
    Check("derivatives", "forward mode", forward_mode),
    Check(
        "derivatives",
        "forward over reverse",
        forward_over_reverse,
        after=("gradient", "second derivative"),
    ),
    Check("derivatives", "reverse over forward", reverse_over_forward, after=("forward mode",)),
    Check("derivatives", "nested forward", nested_forward, after=("forward mode",)),
)
