"""The values beside those of a reference, and what was forgotten where they differ."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from custom_ops.testing.compare import differing, owed, run
from custom_ops.testing.double import widest
from custom_ops.testing.entry import Check
from custom_ops.testing.factors import factors
from custom_ops.testing.options import alternatives
from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import Fault, NotApplicable
from custom_ops.testing.wording import written

__all__ = ["CHECKS"]


def _results(subject: Subject) -> list[Tensor]:
    with torch.no_grad():
        return subject.outputs(*subject.fresh(()))


def reference_values(subject: Subject) -> str:
    """The results are the reference's."""
    double = widest(subject)
    beside = double.of_reference()
    got, want = _results(double), _results(beside)
    if _close(got, want):
        _depends_alike(double, beside)
        return "the reference's values"
    for mistake, sentence in _mistakes(double, beside, got, want):
        raise Fault(sentence, mistake, _shown(double, got, want))
    found = differing(got, want, owed(double), 1e6) or "the number of results is another"
    raise Fault(f"{found}, the reference's", "", _shown(double, got, want))


def _close(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(
        a.shape == b.shape
        and torch.allclose(a, b.to(a.dtype), rtol=1e-7, atol=1e-9, equal_nan=True)
        for a, b in zip(got, want, strict=True)
    )


def _shown(subject: Subject, got: list[Tensor], want: list[Tensor]) -> tuple[str, ...]:
    lines = [f"{n} = {written(x)}" for n, x in zip(subject.names, subject.inputs, strict=True)]
    return (*lines, f"expected {written(want[0])}", f"observed {written(got[0])}")


def _mistakes(
    subject: Subject, beside: Subject, got: list[Tensor], want: list[Tensor]
) -> Iterator[tuple[str, str]]:
    """Yield each mistake in the forward that explains the values, with its sentence."""
    if _close(got, [-y for y in want]):
        yield "sign", "the result has the wrong sign"
    for option in alternatives(beside):
        for value, changed in option.changed():
            try:
                other = _results(changed)
            except Exception:
                continue
            if _close(got, other) and not _close(want, other):
                yield (
                    "argument forgotten",
                    (
                        f"the result is that of {option.name} = {value}: the function forgets "
                        f"`{option.name}`"
                    ),
                )
    for name, value in _alike_without(subject, beside):
        yield (
            "argument's use",
            (
                f"the mistake is in how `{name}` enters: with {name} = {value} the function is the "
                "reference"
            ),
        )
    for a, name in factors(subject):
        for power, what in ((1, "is applied once too often"), (-1, "is missing")):
            scaled = [_scaled(y, a, power) for y in want]
            if all(y is not None for y in scaled) and _close(got, scaled):  # type: ignore[arg-type]
                yield "factor tensor", f"the factor `{name}` {what} in the result"
    ratio = _ratio(got, want)
    if ratio is not None:
        sizes = [
            (n, f"size {n} of `{subject.names[i]}`")
            for i, x in enumerate(subject.inputs)
            if isinstance(x, Tensor)
            for n in (*x.shape, x.numel())
            if n > 1
        ]
        why = next(
            (
                f": the mean's factor 1/{n} is missing ({w})"
                for n, w in sizes
                if abs(ratio - n) < 1e-6 * n
            ),
            "",
        )
        why = why or next(
            (
                f": divided by {n} once too often ({w})"
                for n, w in sizes
                if abs(ratio * n - 1) < 1e-6
            ),
            "",
        )
        if not why and sum(y.numel() for y in got) == 1 and abs(ratio) not in (0.5, 2.0):
            return  # one number is always some multiple of another
        yield "factor", f"the result is {ratio:.6g} times the reference's{why}"


def _alike_without(subject: Subject, beside: Subject) -> Iterator[tuple[str, str]]:
    """Yield the options without which function and reference agree."""
    ours = {(o.name, v): s for o in alternatives(subject) for v, s in o.changed()}
    theirs = {(o.name, v): s for o in alternatives(beside) for v, s in o.changed()}
    for key in ours.keys() & theirs.keys():
        try:
            if _close(_results(ours[key]), _results(theirs[key])):
                yield key
        except Exception:
            continue


def _scaled(y: Tensor, a: Tensor, power: int) -> Tensor | None:
    try:
        b = a.expand(y.shape)
    except RuntimeError:
        return None
    return y * b if power > 0 else y / b


def _ratio(got: list[Tensor], want: list[Tensor]) -> float | None:
    a, b = (torch.cat([y.reshape(-1) for y in ys]) for ys in (got, want))
    if a.shape != b.shape or not (b * b).sum() > 0:
        return None
    c = float((a * b).sum() / (b * b).sum())
    return c if torch.allclose(a, c * b, rtol=1e-7, atol=1e-9) and abs(c) > 1e-6 else None


def _depends_alike(subject: Subject, beside: Subject) -> None:
    """Raise where the reference depends on an input and the function gives it no gradient."""
    n = len(_results(subject))
    try:
        owed_gradients = run(beside)[n:]
    except RuntimeError:  # the reference may refuse to differentiate an input that we do not
        return
    for i, a, b in zip(subject.wrt, run(subject)[n:], owed_gradients, strict=True):
        if (a is None or not a.any()) and b is not None and b.any():
            raise Fault(
                f"the result does not depend on {subject.input_name(i)}, and that of the reference "
                "does: it is bypassed",
                "bypassed",
            )


def reference_at_edges(subject: Subject) -> str:
    """Where the reference gives numbers at infinite entries, the function gives them too."""
    double = widest(subject)
    beside = double.of_reference()
    i = double.wrt[0]
    x = double.inputs[i].detach()
    if x.dim() == 0:
        raise NotApplicable("the input is a number")
    n, count = x.shape[-1], 0
    for columns in [[0], list(range(n // 2)), list(range(n // 2, n)), list(range(n - 1))]:
        bad = x.clone()
        bad[..., columns] = -torch.inf
        try:
            want = run(beside.replaced(i, bad))
        except Exception:
            continue
        found = differing(run(double.replaced(i, bad)), want, owed(double), 1e6)
        if found is not None:
            raise Fault(
                f"{found}, the reference's, where {len(columns)} of {n} entries of each row of "
                f"{double.input_name(i)} are -inf",
                "infinity",
            )
        count += 1
    return f"{count} patterns of -inf"


CHECKS = (
    Check("reference", "reference values", reference_values),
    Check("reference", "reference at -inf", reference_at_edges, after=("reference values",)),
)
