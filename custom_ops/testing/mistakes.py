"""What people get wrong in a backward, each as a hypothesis that is tried.

For y = f(x) with J_ks = ∂y_k/∂x_s and the upstream gradient v, backward owes Σ_k v_k J_ks. A
hypothesis compares what backward gave, as a matrix B with a row for each e_k, with what a mistake
would give. MISTAKES is in order: the first that fits is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from custom_ops.testing.by_hand import cotangents_of, hand_backward
from custom_ops.testing.couplings import coupled, tied
from custom_ops.testing.factors import factors
from custom_ops.testing.jacobians import Pair, numerical
from custom_ops.testing.options import alternatives
from custom_ops.testing.subject import Subject, floating

__all__ = ["MISTAKES", "Mistake", "recognise"]


@dataclass
class Wrong:
    """A wrong pair, among all pairs of the subject."""

    subject: Subject
    pair: Pair
    pairs: list[Pair]

    @property
    def x(self) -> str:
        return self.subject.input_name(self.pair.input)


@dataclass(frozen=True)
class Mistake:
    """A mistake's short name, and how it is recognised: a sentence, or None."""

    name: str
    recognise: Callable[[Wrong], str | None]


def recognise(subject: Subject, pair: Pair, pairs: list[Pair]) -> tuple[str, str]:
    """Return the mistake's name and the sentence; ("", a plain sentence) for an unknown one."""
    wrong = Wrong(subject, pair, pairs)
    for mistake in MISTAKES:
        sentence = mistake.recognise(wrong)
        if sentence is not None:
            return mistake.name, sentence
    return "", f"the gradient of {wrong.x} is wrong, and not in a way that has a name here"


def _missing(w: Wrong) -> str | None:
    if not w.pair.missing:
        return None
    return f"backward gives no gradient (None) for {w.x}, on which the result depends"


def _zero(w: Wrong) -> str | None:
    if not w.pair.is_(torch.zeros_like(w.pair.expected)):
        return None
    others = [p for p in w.pairs if p.input == w.pair.input and p is not w.pair]
    if any(p.expected.abs().max() > 0 and not p.wrong().any() for p in others):
        return f"the gradient of {w.x} through result {w.pair.output} is dropped"
    return f"the gradient of {w.x} is 0, though the result depends on it"


def _upstream_for_ones(w: Wrong) -> str | None:
    if not w.pair.whole:
        return None
    ones = w.pair.expected.sum(0).expand_as(w.pair.raw)
    error = w.pair.tolerance().sum(0)
    if not torch.isfinite(error).all() or ((w.pair.raw - ones).abs() > error).any():
        return None
    return (
        f"the gradient of {w.x} does not depend on the upstream gradient v: backward takes it for "
        "ones; expected vᵀJ"
    )


def _upstream_summed(w: Wrong) -> str | None:
    """One number in v's place: its mean, or its sum, times 1ᵀJ."""
    J, M = w.pair.expected, w.pair.expected.shape[0]
    for factor, name in ((1 / M, "mean"), (1.0, "sum")):
        if M > 1 and w.pair.whole and w.pair.is_((J.sum(0) * factor).expand_as(J)):
            return (
                f"the gradient of {w.x} depends on v through its {name} alone; each v_k belongs to "
                "its own row of J"
            )
    return None


def _sign(w: Wrong) -> str | None:
    if not w.pair.is_(-w.pair.expected):
        return None
    return f"the gradient of {w.x} has the wrong sign"


def _factor(w: Wrong) -> str | None:
    J, B = w.pair.expected, w.pair.observed
    judged = torch.isfinite(w.pair.error)
    denominator = (J * J * judged).sum()
    if not denominator > 0:
        return None
    c = ((B * J * judged).sum() / denominator).item()
    if not w.pair.is_(c * J):
        return None
    known = _number(w, c)
    return f"the gradient of {w.x} is {c:.6g} times the right one" + (f": {known}" if known else "")


def _number(w: Wrong, c: float) -> str:
    """Say where a factor of `c` may come from."""
    near = lambda a: abs(a - c) <= 1e-6 * abs(c)  # noqa: E731
    for number, name in _option_numbers(w.subject):
        if number not in (0, 1, 2) and near(number):
            return f"the factor `{name}` = {number:g} is applied once too often"
        if number not in (0, 1, 2) and near(1 / number):
            return f"the factor `{name}` = {number:g} is missing"
    for n, what in _sizes(w):
        if n > 1 and near(n):
            return f"the mean's factor 1/{n} is missing ({what})"
        if n > 1 and near(1 / n):
            return f"divided by {n}, as a mean would be ({what})"
    if near(2.0) or near(0.5):
        return "a factor of two"
    return ""


def _option_numbers(subject: Subject) -> Iterator[tuple[float, str]]:
    for option in alternatives(subject):
        if isinstance(option.value, (int, float)) and not isinstance(option.value, bool):
            yield float(option.value), option.name
    for i, x in enumerate(subject.inputs):
        if floating(x) and x.numel() == 1:
            yield x.item(), subject.names[i]


def _sizes(w: Wrong) -> Iterator[tuple[int, str]]:
    """The sizes that a mean may have divided by, where the result is smaller than an input."""
    result = torch.Size(w.pair.output_shape).numel()
    if all(x.numel() <= result for x in w.subject.inputs if isinstance(x, Tensor)):
        return
    for i, x in enumerate(w.subject.inputs):
        if isinstance(x, Tensor):
            name = w.subject.names[i]
            yield x.numel(), f"the number of entries of `{name}`"
            for d, n in enumerate(x.shape):
                yield n, f"the size of `{name}` in dimension {d}"


def _another_argument(w: Wrong) -> str | None:
    for other in w.pairs:
        if other.input == w.pair.input or other.output != w.pair.output:
            continue
        if w.pair.is_(other.expected):
            return f"{w.x} is given the gradient of {w.subject.input_name(other.input)}"
    return None


def _transposed(w: Wrong) -> str | None:
    J = w.pair.expected
    if J.shape[0] != J.shape[1] or not w.pair.whole or not w.pair.is_(J.T):
        return None
    return f"the gradient of {w.x} is J v; expected vᵀJ, the transpose of J times v"


def _diagonal(w: Wrong) -> str | None:
    J = w.pair.expected
    if J.shape[0] != J.shape[1] or not w.pair.whole or not w.pair.is_(torch.diag(J.diagonal())):
        return None
    return (
        f"the gradient of {w.x} is the element-wise product of v with the diagonal of J; expected "
        "vᵀJ, a vector times a matrix"
    )


def _couplings(w: Wrong) -> str | None:
    p = w.pair
    if p.output_shape != p.input_shape or not p.whole:
        return None
    owed, given = coupled(p, p.expected), coupled(p, p.observed)
    if not given and owed:
        return (
            f"the gradient of {w.x} is an element-wise product with v; expected a sum over "
            f"dimension {_listed(owed)}, whose entries depend on each other"
        )
    if owed and given and not owed & given:
        return (
            f"the gradient of {w.x} sums over dimension {_listed(given)}; the function couples "
            f"the entries along dimension {_listed(owed)}"
        )
    if given - owed:
        return (
            f"rows depend on each other: the gradient of {w.x} mixes entries along dimension "
            f"{_listed(given - owed)}, the function does not"
        )
    return None


def _listed(dims: set[int]) -> str:
    return " and ".join(str(d) for d in sorted(dims))


def _destination(w: Wrong) -> str | None:
    p = w.pair
    if not p.whole:
        return None
    owed, given = tied(p, p.expected), tied(p, p.observed)
    lost, found = owed - given, given - owed
    if lost and found:
        (a, b), (c, _) = min(lost), min(found)
        return (
            f"the sum for {w.x} is over the wrong dimension: its dimension {b} goes with the "
            f"result's dimension {a}, and backward puts dimension {c} there"
        )
    if p.input_shape and p.output_shape != p.input_shape and lost and not given:
        return (
            f"the gradient of {w.x} is summed over dimension {min(lost)[0]} of v; the function "
            "keeps that dimension"
        )
    return None


def _one_slice(w: Wrong) -> str | None:
    p = w.pair
    if not p.whole or len(p.output_shape) == 0:
        return None
    index = torch.stack(torch.unravel_index(torch.arange(p.expected.shape[0]), p.output_shape))
    for d, n in enumerate(p.output_shape):
        for r in {0, n - 1} if n > 1 else ():
            kept = (index[d] == r).unsqueeze(1)
            if p.is_(p.expected * kept):
                return (
                    f"a broadcast is not summed back: {w.x} gets the part of the gradient at index "
                    f"{r} of the result's dimension {d}; expected the sum over that dimension"
                )
    return None


def _factor_tensor(w: Wrong) -> str | None:
    J, p = w.pair.expected, w.pair
    for a, name in factors(w.subject):
        for factor in _broadcast(a, p):
            if p.is_(J * factor):
                return f"the gradient of {w.x} has the factor `{name}` once too often"
            if (factor != 0).all() and p.is_(J / factor):
                return f"the gradient of {w.x} lacks the factor `{name}`"
    return None


def _broadcast(a: Tensor, p: Pair) -> Iterator[Tensor]:
    """`a` over the rows of J, and over its columns, wherever the shapes allow."""
    for shape, positions, over in (
        (p.output_shape, p.rows, lambda t: t[:, None]),
        (p.input_shape, p.columns, lambda t: t[None, :]),
    ):
        for b in (a, a.unsqueeze(-1)) if a.dim() == 1 else (a,):
            try:
                full = b.expand(shape)
            except RuntimeError:
                continue
            yield over(full.reshape(-1)[positions].double())


def _forgotten(w: Wrong) -> str | None:
    """An argument that the forward knows and the backward does not."""
    p = w.pair
    for option in alternatives(w.subject):
        for value, changed in option.changed():
            try:
                J = numerical(changed, p.input, p.columns).value[_rows(w)]
            except Exception:
                continue
            if p.is_(J):
                return (
                    f"the gradient of {w.x} is that of {option.name} = {value}: "
                    f"backward forgets `{option.name}`"
                )
    return None


def _rows(w: Wrong) -> list[int]:
    before = {q.output: q.output_shape for q in w.pairs if q.output < w.pair.output}
    start = sum(int(torch.Size(shape).numel()) for shape in before.values())
    return [start + k for k in w.pair.rows]


def _taken_for(w: Wrong) -> str | None:
    """Backward is right with another tensor in the place of one that it saved."""
    p = w.pair
    hand = hand_backward(w.subject) if p.whole else None
    if hand is None:
        return None
    v = w.subject.cotangents(hand.outputs)[p.output].detach()
    owed = (v.reshape(-1).double() @ p.expected).reshape(p.input_shape)
    error = 4 * (v.abs().reshape(-1).double() @ p.tolerance()).reshape(p.input_shape)
    vs = cotangents_of(hand.outputs, p.output, v)
    tensors = [t.detach() for t in hand.tensors]
    candidates = [
        (x, f"the input `{n}`")
        for x, n in zip(hand.inputs, w.subject.names, strict=True)
        if floating(x)
    ]
    candidates += [(y, f"the result {o}") for o, y in enumerate(hand.outputs)]
    for k, name in enumerate(hand.names):
        for other, what in candidates:
            if other.shape != tensors[k].shape or torch.equal(other, tensors[k]):
                continue
            tried = [other.detach() if j == k else t for j, t in enumerate(tensors)]
            try:
                answer: Any = hand(vs, tried)[p.input]
            except Exception:
                continue
            if not isinstance(answer, Tensor) or answer.shape != owed.shape:
                continue
            if ((answer.detach() - owed).abs() <= error).all():
                return (
                    f"backward uses `{name}` where {what} belongs: with that in its place the "
                    f"gradient of {w.x} is right"
                )
    return None


def _not_linear(w: Wrong) -> str | None:
    """B is a power of v: raw_k = scale_k² J_k, or |scale| …"""
    p = w.pair
    squared = p.expected * p.scale[:, None]
    if p.is_(squared):
        return f"the gradient of {w.x} has the upstream gradient squared; expected vᵀJ, linear in v"
    return None


def _transposed_entries(w: Wrong) -> str | None:
    """The right numbers in the order of the transpose."""
    p = w.pair
    if not p.whole or len(p.input_shape) != 2:
        return None
    n, m = p.input_shape
    swapped = p.expected.reshape(-1, n, m).transpose(1, 2).reshape(p.expected.shape)
    if not p.is_(swapped) and not (n == m and p.is_(_rows_transposed(p, p.expected))):
        return None
    return f"the gradient of {w.x} is transposed"


def _rows_transposed(p: Pair, J: Tensor) -> Tensor:
    if len(p.output_shape) != 2:
        return J
    n, m = p.output_shape
    return J.reshape(n, m, -1).transpose(0, 1).reshape(J.shape) if n == m else J


def _digits(w: Wrong) -> str | None:
    """Right but for the last digits: float32 on the way."""
    J, p = w.pair.expected, w.pair
    judged = torch.isfinite(p.error)
    size = J[judged].abs().max()
    worst = (p.observed - J)[judged].abs().max()
    if not 0 < worst < 1e-5 * size:
        return None
    return (
        f"the gradient of {w.x} is right to {worst / size:.0e} only, in float64: a number on the "
        "way, or a constant, is of float32"
    )


MISTAKES = (
    Mistake("no gradient", _missing),
    Mistake("zero gradient", _zero),
    Mistake("upstream taken for ones", _upstream_for_ones),
    Mistake("upstream summed", _upstream_summed),
    Mistake("precision", _digits),
    Mistake("sign", _sign),
    Mistake("factor", _factor),
    Mistake("another argument's gradient", _another_argument),
    Mistake("J v for vᵀJ", _transposed),
    Mistake("diagonal of J", _diagonal),
    Mistake("transposed", _transposed_entries),
    Mistake("broadcast not summed back", _one_slice),
    Mistake("factor tensor", _factor_tensor),
    Mistake("argument forgotten", _forgotten),
    Mistake("another tensor's place", _taken_for),
    Mistake("coupling", _couplings),
    Mistake("wrong dimension", _destination),
    Mistake("not linear in v", _not_linear),
)
