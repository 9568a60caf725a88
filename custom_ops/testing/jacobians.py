"""The Jacobian of each output and input: from differences, and from the backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from custom_ops.testing.differences import Difference, jacobian
from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import NotApplicable

__all__ = ["Pair", "concatenated", "numerical", "pairs", "wide"]

MOST = 48  # entries of an input or an output that are looked at one by one


@dataclass
class Pair:
    """∂(output)/∂(input): expected from differences, observed from one-hot upstream gradients.

    `raw[k]` is the backward's answer to scale[k] · e_k, so `observed` = raw / scale.
    """

    output: int
    input: int
    output_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    rows: list[int]
    columns: list[int]
    expected: Tensor
    error: Tensor
    raw: Tensor
    scale: Tensor
    missing: bool  # the backward gave None

    @property
    def observed(self) -> Tensor:
        """The backward's answer to each e_k."""
        return self.raw / self.scale[:, None]

    @property
    def whole(self) -> bool:
        """Whether every entry was looked at."""
        return self.expected.shape == (_count(self.output_shape), _count(self.input_shape))

    def tolerance(self) -> Tensor:
        """What the difference may be off by: its bound, and the rounding of a backward."""
        finite = self.expected[torch.isfinite(self.error)]
        size = finite.abs().max().item() if finite.numel() else 0.0
        return 10 * self.error + 1e-9 * size + 1e-10

    def wrong(self) -> Tensor:
        """Where observed is not expected, M × N."""
        return self.differs(self.expected)

    def differs(self, candidate: Tensor) -> Tensor:
        """Where observed is not `candidate`; NaN only beside a derivative that exists."""
        tolerance = self.tolerance() * max(1.0, _ratio(candidate, self.expected))
        judged = torch.isfinite(tolerance)
        return judged & ~((self.observed - candidate).abs() <= tolerance)

    def is_(self, candidate: Tensor) -> bool:
        """Whether observed is `candidate` wherever there is a derivative."""
        return candidate.shape == self.observed.shape and not self.differs(candidate).any()


def _ratio(a: Tensor, b: Tensor) -> float:
    """How much larger a is than b, for tolerances that grow with a candidate."""
    if not b.numel() or not torch.isfinite(a).all():
        return 1.0
    return a.abs().max().item() / max(b.abs().max().item(), 1e-300)


def _count(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _chosen(n: int, seed: int) -> list[int]:
    """All positions, or MOST of them at random."""
    if n <= MOST:
        return list(range(n))
    g = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(n, generator=g)[:MOST].tolist())


def wide(subject: Subject) -> Subject:
    """Return the subject in float64, or say that it refuses float64."""
    double = subject.to(torch.float64)
    try:
        with torch.no_grad():
            outputs = double.outputs(*double.fresh(()))
    except Exception as error:
        raise NotApplicable(f"float64 is refused: {_first_line(error)}") from error
    if not outputs:
        raise NotApplicable("no result is a floating-point tensor")
    return double


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120]


def concatenated(subject: Subject, position: int, x: Tensor) -> Tensor:
    """Return all outputs as one float64 vector, with `x` at `position`."""
    inputs = subject.fresh(())
    inputs[position] = x.clone()
    with torch.no_grad():
        outputs = subject.outputs(*inputs)
    return torch.cat([y.reshape(-1).double() for y in outputs])


def numerical(subject: Subject, position: int, entries: Sequence[int]) -> Difference:
    """Return the Jacobian of all outputs, M × len(entries), from differences."""
    x = subject.inputs[position].detach()
    return jacobian(lambda x: concatenated(subject, position, x), x, entries)


def pairs(subject: Subject) -> list[Pair]:
    """Return every pair of an output and a differentiated input, `subject` being in float64."""
    found = []
    shapes = [tuple(y.shape) for y in _forward(subject)]
    starts = [sum(_count(s) for s in shapes[:o]) for o in range(len(shapes))]
    columns = {
        i: _chosen(subject.inputs[i].numel(), subject.seed)
        for i in subject.wrt
        if subject.inputs[i].numel()
    }
    expected = {i: numerical(subject, i, columns[i]) for i in columns}
    for o, shape in enumerate(shapes):
        rows = _chosen(_count(shape), subject.seed + 1)
        if not rows:
            continue
        raws, scale = _raw(subject, o, rows)
        for j, i in enumerate(subject.wrt):
            if i not in columns:
                continue
            at = [starts[o] + k for k in rows]
            answers = [r[j] for r in raws]
            raw = torch.stack(
                [
                    torch.zeros(len(columns[i]), dtype=torch.float64)
                    if a is None
                    else a.detach().reshape(-1)[columns[i]].double()
                    for a in answers
                ]
            )
            found.append(
                Pair(
                    o,
                    i,
                    shape,
                    tuple(subject.inputs[i].shape),
                    rows,
                    columns[i],
                    expected[i].value[at],
                    expected[i].error[at],
                    raw,
                    scale,
                    all(a is None for a in answers),
                )
            )
    return found


def _forward(subject: Subject) -> list[Tensor]:
    with torch.no_grad():
        return subject.outputs(*subject.fresh(()))


def _raw(
    subject: Subject, output: int, rows: list[int]
) -> tuple[list[list[Tensor | None]], Tensor]:
    """Return the backward's answers to scaled one-hot upstream gradients of one output."""
    g = subject.generator()
    scale = torch.rand(len(rows), generator=g, dtype=torch.float64) + 1.25
    answers: list[list[Tensor | None]] = []
    for n, k in enumerate(rows):
        inputs = subject.fresh()  # a new graph each time: reuse is another check's subject
        y = subject.outputs(*inputs)[output]
        if not y.requires_grad:
            answers.append([None] * len(subject.wrt))
            continue
        v = torch.zeros(y.shape, dtype=y.dtype)
        v.view(-1)[k] = scale[n]
        leaves = [inputs[i] for i in subject.wrt]
        answers.append(list(torch.autograd.grad(y, leaves, v, allow_unused=True)))
    return answers, scale
