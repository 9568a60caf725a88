"""The narrower types beside float64, and what is not of a floating-point type.

For a result y = f(x) in a type with unit roundoff u, an algorithm that rounds its inputs, its
result and a few numbers between owes |ŷ_k − y_k| ≤ c u (|y_k| + Σ_s |J_ks| |x_s|): the roundings
of x, carried by J, and those of y. c = 32 stands for the numbers between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from custom_ops.testing.chance import not_random
from custom_ops.testing.compare import ROUNDINGS, differing, owed, run
from custom_ops.testing.differences import difference
from custom_ops.testing.entry import Check
from custom_ops.testing.jacobians import concatenated, wide
from custom_ops.testing.refusals import refusals
from custom_ops.testing.source import applies_functions
from custom_ops.testing.subject import Subject, floating
from custom_ops.testing.verdict import Fault, NotApplicable, TorchFault
from custom_ops.testing.wording import position

__all__ = ["CHECKS", "overflowing"]

ROOM = 32.0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _results(subject: Subject) -> list[Tensor]:
    with torch.no_grad():
        return subject.outputs(*subject.fresh(()))


def in_dtype(dtype: torch.dtype) -> Callable[[Subject], str]:
    """Return the check of one dtype."""

    def compare(subject: Subject) -> str:
        not_random(subject)
        narrow = subject.to(dtype)
        double = wide(narrow)
        try:
            with refusals():
                got, gradients = narrow.gradients()
        except NotApplicable:
            raise
        except Exception as error:
            raise NotApplicable(
                f"{_short(dtype)} is refused: {type(error).__name__}: {str(error)[:80]}"
            ) from error
        want, owed_gradients = double.gradients()
        bounds = _bounds(double)
        for o, (a, b) in enumerate(zip(got, want, strict=True)):
            overflowing(a, b, f"result {o}", _short(dtype))
            _within(a, b, bounds[o], f"result {o}", dtype)
        for i, d, e in zip(subject.wrt, gradients, owed_gradients, strict=True):
            if d is not None and e is not None:
                overflowing(d, e, f"the gradient of {subject.input_name(i)}", _short(dtype))
        return f"within {ROOM:.0f} roundings of float64"

    return compare


def overflowing(a: Tensor, b: Tensor, name: str, where: str) -> None:
    """Raise where a narrow number is inf or NaN and the float64 one is in the type's range."""
    bad = ~torch.isfinite(a) & torch.isfinite(b) & (b.abs() < torch.finfo(a.dtype).max / 4)
    if bad.any():
        k = int(bad.reshape(-1).nonzero()[0])
        raise Fault(
            f"{name} is {a.reshape(-1)[k].item()} at {position(k, tuple(a.shape))} in {where}; "
            f"expected {b.reshape(-1)[k].item():.6g}: a sum or a product on the way overflows; "
            "take it in float32",
            "overflow",
        )


def _bounds(double: Subject) -> list[Tensor]:
    """|y| + Σ_s |J_ks| |x_s|, with the sum from differences along x and random signs of it."""
    outputs = [y.detach() for y in _results(double)]
    total = torch.zeros(sum(y.numel() for y in outputs), dtype=torch.float64)
    g = double.generator()
    for i in double.wrt:
        x = double.inputs[i].detach()
        if not x.numel():
            continue
        part = torch.zeros_like(total)
        for _ in range(4):
            # the root of the sum of squares, on average; 8 of it is above Σ|·| for a few entries
            signs = torch.randint(0, 2, x.shape, generator=g) * 2 - 1
            f = lambda x, i=i: concatenated(double, i, x)  # noqa: E731
            d = difference(f, x, signs * x / max(1e-30, x.abs().max().item()))
            value = torch.where(torch.isfinite(d.error), d.value.abs(), torch.inf)
            part = torch.maximum(part, value * x.abs().max())
        total = total + 8 * part
    bounds, start = [], 0
    for y in outputs:
        size = y.abs().max() if y.numel() else torch.zeros((), dtype=torch.float64)
        bounds.append(total[start : start + y.numel()].reshape(y.shape) + y.abs() + 0.25 * size)
        start += y.numel()
    return bounds


def _within(a: Tensor, b: Tensor, bound: Tensor, name: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    allowed = ROOM * info.eps / 2 * bound + ROOM * info.smallest_normal * info.eps
    judged = torch.isfinite(a) & torch.isfinite(b) & torch.isfinite(allowed)
    off = judged & ((a.double() - b).abs() > allowed)
    if off.any():
        k = int(off.reshape(-1).nonzero()[0])
        raise Fault(
            f"{name} is {a.reshape(-1)[k].item():.6g} at {position(k, tuple(a.shape))} in "
            f"{_short(dtype)}; expected {b.reshape(-1)[k].item():.6g} within "
            f"{allowed.reshape(-1)[k].item():.1g}",
            "precision",
        )


def long_sums(subject: Subject) -> str:
    """In float16 with entries of 16, and with 4,096 of them in a dimension, nothing overflows."""
    count = 0
    for what, other in _large(subject):
        narrow = other.to(torch.float16)
        try:
            want = _results(wide(narrow))
            with refusals():
                got = _results(narrow)
        except NotApplicable:
            continue
        except Exception as error:
            if count:
                continue
            raise NotApplicable(f"float16 is refused: {str(error)[:80]}") from error
        for o, (a, b) in enumerate(zip(got, want, strict=True)):
            if a.shape == b.shape:
                overflowing(a, b, f"result {o}", f"float16, {what}")
        count += 1
    if not count:
        raise NotApplicable("float16 is refused")
    return f"{count} inputs"


def _large(subject: Subject) -> list[tuple[str, Subject]]:
    largest = max(
        (x.detach().abs().max().item() for x in subject.inputs if floating(x) and x.numel()),
        default=0.0,
    )
    first = subject.inputs[subject.wrt[0]]
    found = []
    for sign in (16, -16):
        scaled = subject.with_inputs(
            [
                x.detach() * (sign / largest) if i == subject.wrt[0] and largest > 0 else x
                for i, x in enumerate(subject.inputs)
            ]
        )
        found.append(("where an entry is 16 or -16", scaled))
    if first.dim() and first.shape[-1] > 1 and first.numel() // first.shape[-1] <= 64:
        n = first.shape[-1]
        found.append(
            (
                "with 4,096 entries in a dimension",
                scaled.with_inputs([_tiled(x, n, 4096 // n + 1) for x in scaled.inputs]),
            )
        )
    return found


def _tiled(x: object, n: int, times: int) -> object:
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != n:
        return x
    return x.detach().repeat(*[1] * (x.dim() - 1), times)


def integer_inputs(subject: Subject) -> str:
    """An integer in a floating-point input's place is refused, or taken as the same number."""
    i = subject.wrt[0]
    whole = (subject.inputs[i].detach() * 4).round()
    integers = subject.replaced(i, whole.long())
    try:
        got = _results(integers)
    except Exception as error:
        return f"refused: {type(error).__name__}: {str(error)[:60]}"
    try:
        want = _results(subject.replaced(i, whole))
    except Exception as error:
        raise NotApplicable("the rounded input is refused too") from error
    if not got:
        raise NotApplicable("the result of an integer input is an integer")
    got, want = ([y.to(torch.float32) for y in ys] for ys in (got, want))
    found = differing(got, want, owed(subject), 4 * ROUNDINGS)
    if found is not None and len(got) == len(want):
        raise Fault(
            f"{found}, where {subject.input_name(i)} holds integers: they are neither "
            "refused nor taken as numbers",
            "integers",
        )
    return "taken as numbers"


def promotion(subject: Subject) -> str:
    """float32 beside float64 is refused, or promoted."""
    if len(subject.wrt) < 2:
        raise NotApplicable("there is one floating-point input")
    base = subject.to(torch.float32)
    i = subject.wrt[-1]
    mixed = base.replaced(i, base.inputs[i].detach().double())
    try:
        got = run(mixed)
    except Exception as error:
        return f"refused: {type(error).__name__}: {str(error)[:60]}"
    want = run(base)
    want = [None if t is None else t.to(torch.float32) for t in want]
    got = [None if t is None else t.to(torch.float32) for t in got]
    found = differing(got, want, owed(mixed), 64 * ROUNDINGS)
    if found is not None:
        raise Fault(
            f"{found}, where {subject.input_name(i)} is float64 beside float32", "promotion"
        )
    return "promoted"


def autocast(subject: Subject) -> str:
    """Under autocast the result is that of float32, or of bfloat16, and gradients keep dtypes."""
    base = subject.to(torch.float32)
    try:
        want = run(base)
    except Exception as error:
        raise NotApplicable("float32 is refused") from error
    inputs = base.fresh()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = base.outputs(*inputs)
    except Exception as error:
        raise NotApplicable(f"refused under autocast: {str(error)[:80]}") from error
    kept, vs = base.differentiable(outputs)
    leaves = [inputs[i] for i in base.wrt]
    gradients: list[Tensor | None] = [None] * len(leaves)
    try:
        if kept:
            gradients = list(torch.autograd.grad(kept, leaves, vs, allow_unused=True))
    except RuntimeError as error:
        if not applies_functions(base):
            raise TorchFault("torch's own backward raises after autocast") from error
        raise Fault(
            f"the backward of a call under autocast raises: {str(error)[:90]}; decorate forward "
            "and backward with torch.amp.custom_fwd and custom_bwd",
            "autocast",
        ) from error
    for i, d in zip(base.wrt, gradients, strict=True):
        if d is not None and d.dtype != torch.float32:
            raise Fault(
                f"under autocast the gradient of {base.input_name(i)} has {d.dtype}; "
                "expected float32, the input's",
                "autocast",
            )
    got = [y.detach().to(torch.bfloat16) for y in outputs] + [
        None if d is None else d.to(torch.bfloat16) for d in gradients
    ]
    coarse = [None if t is None else t.to(torch.bfloat16) for t in want]
    found = differing(got, coarse, owed(base), 16)
    if found is not None and not _ill_conditioned(base):
        raise Fault(f"{found}, the float32 number, under autocast to bfloat16", "autocast")
    return "within bfloat16's rounding of float32"


def _ill_conditioned(subject: Subject) -> bool:
    """Whether rounding the inputs to bfloat16 alone changes the result as much."""
    want = [t for t in run(subject) if t is not None]
    rounded = subject.to(torch.bfloat16).to(torch.float32)
    got = [t for t in run(rounded) if t is not None]
    return any(
        ((a - b).abs().max() > 0.125 * b.abs().max()).item()
        for a, b in zip(got, want, strict=True)
        if b.numel()
    )


CHECKS = (
    Check("dtypes", "float32", in_dtype(torch.float32)),
    Check("dtypes", "bfloat16", in_dtype(torch.bfloat16)),
    Check("dtypes", "float16", in_dtype(torch.float16)),
    Check("dtypes", "float16's range", long_sums),
    Check("dtypes", "integers", integer_inputs),
    Check("dtypes", "promotion", promotion),
    Check("dtypes", "autocast", autocast),
)
