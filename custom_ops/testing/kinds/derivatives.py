"""The gradient beside central differences."""

from __future__ import annotations

import re

import torch
from torch.autograd import Function

from custom_ops.testing.entry import Check
from custom_ops.testing.jacobians import Pair, pairs, wide
from custom_ops.testing.mistakes import recognise
from custom_ops.testing.smallest import smallest
from custom_ops.testing.source import function_calls, location
from custom_ops.testing.subject import Subject, make_subject
from custom_ops.testing.verdict import Fault, NotApplicable
from custom_ops.testing.wording import position, written

__all__ = ["CHECKS"]

SHAPE = re.compile(
    r"invalid gradient at index (\d+) - got (\[.*?\]) but expected shape "
    r"compatible with (\[.*?\])"
)


def gradient(subject: Subject) -> str:
    """vᵀJ for each v = e_k and each input, beside central differences."""
    double = wide(subject)
    try:
        found = pairs(double)
    except NotApplicable:
        raise
    except Exception as error:
        _raise_wrong_shape(double, error)
        raise Fault(
            f"backward raises {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            "backward raises",
            final=True,
        ) from error
    wrong = _first_wrong(found)
    if wrong is None:
        return _agreement(found)
    inner = _inner_function(double)
    if inner is not None:
        double = inner
        found = pairs(double)
        wrong = _first_wrong(found) or wrong
    raise fault_of(double, wrong, found)


def _raise_wrong_shape(subject: Subject, error: Exception) -> None:
    match = SHAPE.search(str(error))
    if match is None:
        return
    i, got, owed = int(match[1]), match[2], match[3]
    name = subject.input_name(i) if i < len(subject.names) else f"input {i}"
    shapes = [list(y.shape) for y in subject.outputs(*subject.fresh(()))]
    if str(shapes[0]) == got:
        raise Fault(
            f"a broadcast is not summed back: backward gives {name} a gradient of shape {got}, "
            f"that of the result; expected {owed}",
            "broadcast not summed back",
            final=True,
        ) from error
    raise Fault(
        f"backward gives {name} a gradient of shape {got}; expected {owed}",
        "gradient's shape",
        final=True,
    ) from error


def _first_wrong(found: list[Pair]) -> Pair | None:
    wrong = [p for p in found if p.wrong().any()]
    return next((p for p in wrong if p.whole), wrong[0] if wrong else None)


def _agreement(found: list[Pair]) -> str:
    judged = sum(int(torch.isfinite(p.error).sum()) for p in found)
    total = sum(p.error.numel() for p in found)
    if not judged:
        raise NotApplicable("differences have no limit at any entry of this input")
    worst = max(
        float((p.observed - p.expected)[torch.isfinite(p.error)].abs().max())
        for p in found
        if torch.isfinite(p.error).any()
    )
    left_out = f"; {total - judged} of {total} entries at a kink left out" if judged < total else ""
    return f"within {worst:.0e} of differences{left_out}"


def _inner_function(subject: Subject) -> Subject | None:
    """The first Function among those that the subject applies whose own gradient is wrong."""
    if subject.written_function() is not None:
        return None
    with function_calls() as calls:
        subject.outputs(*subject.fresh())
    for function, inputs in calls:
        inner = make_subject(function, _detached(inputs), seed=subject.seed)
        try:
            if inner.wrt and _first_wrong(pairs(inner)) is not None:
                return inner
        except Exception:
            continue
    return None


def _detached(inputs: tuple[object, ...]) -> list[object]:
    return [
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in inputs
    ]


def fault_of(subject: Subject, wrong: Pair, found: list[Pair]) -> Fault:
    """Return the fault of a wrong pair, at the smallest input that has the same mistake."""
    mistake, sentence = recognise(subject, wrong, found)

    def shows(smaller: Subject) -> bool:
        there = pairs(smaller)
        pair = _first_wrong(there)
        return pair is not None and recognise(smaller, pair, there) == (mistake, sentence)

    small = smallest(subject, shows)
    if small is not subject:
        found = pairs(small)
        wrong = _first_wrong(found) or wrong
        mistake, sentence = recognise(small, wrong, found)
    name = ""
    if isinstance(subject.function, type) and issubclass(subject.function, Function):
        name = location(subject.function)
    return Fault(sentence, mistake, _shown(small, wrong), name or location(subject.function))


def _shown(subject: Subject, pair: Pair) -> tuple[str, ...]:
    k = int(pair.wrong().any(1).nonzero()[0])
    scale = pair.scale[k].item()
    lines = [
        f"{name} = {written(x)}" for name, x in zip(subject.names, subject.inputs, strict=True)
    ]
    v = f"v = {scale:.4g}" + (
        f" at {position(pair.rows[k], pair.output_shape)}, 0 elsewhere" if pair.output_shape else ""
    )
    expected, observed = pair.expected[k] * scale, pair.raw[k]
    if pair.whole:
        expected, observed = (t.reshape(pair.input_shape) for t in (expected, observed))
    what = f"gradient of {subject.names[pair.input]}"
    return (
        *lines,
        v,
        f"expected {what}: {written(expected)}",
        f"observed {what}: {'None' if pair.missing else written(observed)}",
    )


CHECKS = (Check("derivatives", "gradient", gradient),)
