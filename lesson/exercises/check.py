"""Grade an exercise: `python -m lesson.exercises.check 1`; without a number, how far you are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from custom_ops.testing import Report, check

CHECKS = ("gradient", "inputs unchanged")
N, K, D = 3, 4, 5  # all different, so that no product of the wrong shapes passes
EMPTY = "NotImplementedError"

#: What to read again, by the short name of the mistake.
HINTS = {
    "diagonal of J": "step 5 of the lesson is this mistake, step 3 what is right.",
    "coupling": "the sum runs over the classes, which are dimension 1: step 3 of the lesson.",
    "upstream taken for ones": "the upstream gradient is the vector on the left: step 3.",
    "upstream summed": "each row has an upstream gradient of its own: step 13.",
    "J v for vᵀJ": "is the matrix symmetric? If not, its rows are not its columns: step 4.",
    "factor": "the 1/N comes in once, at ∂C/∂C_n: step 13.",
    "broadcast not summed back": "b was added to every row, so db is a sum over the rows: step 14.",
    "gradient's shape": "a gradient has the shape of what it belongs to: step 14.",
    "zero gradient": "every column of J adds up to 0: did the upstream gradient come in (step 4)?",
    "backward raises": "write the shapes beside each product: step 14.",
}


Inputs = Callable[[torch.Generator], tuple[Any, ...]]


class Exercise(NamedTuple):
    """A file to fill in, and the inputs that it is tried on."""

    module: str
    function: str
    inputs: Inputs
    easier: Inputs | None = None  #: inputs where a likely wrong answer is right …
    easier_hint: str = ""  #: … and what that says

    @property
    def path(self) -> Path:
        """The student's file."""
        return Path(__file__).parent / f"{self.module}.py"

    def written(self) -> type[Function]:
        """Return the student's Function."""
        return getattr(import_module(f"lesson.exercises.{self.module}"), self.function)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    """Return random numbers that are differentiated."""
    return torch.randn(shape, generator=g, dtype=torch.double).requires_grad_()


def any_targets(g: torch.Generator) -> Tensor:
    """Return random targets, (N, K), whose rows add up to this and that."""
    return torch.rand(N, K, generator=g, dtype=torch.double) + 0.1


def targets(g: torch.Generator) -> Tensor:
    """Return random targets, (N, K), each row adding up to 1."""
    Y = any_targets(g)
    return Y / Y.sum(1, keepdim=True)


EXERCISES = {
    1: Exercise("ex1_softmax", "Softmax", lambda g: (normal(g, N, K),)),
    2: Exercise("ex2_log_softmax", "LogSoftmax", lambda g: (normal(g, N, K),)),
    3: Exercise(
        "ex3_cross_entropy",
        "CrossEntropy",
        lambda g: (normal(g, N, K), any_targets(g)),
        easier=lambda g: (normal(g, N, K), targets(g)),
        easier_hint="it is right where each row of Y adds up to 1, and nowhere else: step 17.",
    ),
    4: Exercise("ex4_batch", "MeanCrossEntropy", lambda g: (normal(g, N, K), targets(g))),
    5: Exercise(
        "ex5_last_layer",
        "LastLayer",
        lambda g: (normal(g, N, D), normal(g, K, D), normal(g, K), targets(g)),
    ),
}


def grade(number: int, function: type[Function]) -> Report:
    """Return what the battery says of a Function in an exercise's place."""
    return check(function, EXERCISES[number].inputs, only=CHECKS)


def left_over(number: int, function: type[Function]) -> str:
    """Say which gradient has a dimension that autograd adds up without a word, or nothing."""
    inputs = EXERCISES[number].inputs(torch.Generator().manual_seed(0))
    result = function.apply(*inputs)
    gradients = function.backward(result.grad_fn, torch.ones_like(result))
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    for x, d in zip(inputs, gradients, strict=True):
        if d is not None and d.shape != x.shape:
            return (
                f"a gradient has the shape {tuple(d.shape)} and belongs to {tuple(x.shape)}. "
                "Autograd adds up what is left over; do it yourself"
            )
    return ""


def hints(number: int, function: type[Function], report: Report) -> list[str]:
    """Return what to read again."""
    exercise = EXERCISES[number]
    found = [HINTS[name] for name in report.mistakes if name in HINTS]
    if not found and exercise.easier and check(function, exercise.easier, only=CHECKS).passed:
        found.append(exercise.easier_hint)
    return found


def verdict(number: int, function: type[Function]) -> tuple[bool, str]:
    """Return whether it is right, and what to tell the student."""
    report = grade(number, function)
    if report.failures and EMPTY in report.failures[0].sentence:
        return False, f"Exercise {number} is not written yet: open {EXERCISES[number].path}"
    if report.failures:
        told = [f"Hint: {hint}" for hint in hints(number, function, report)]
        return False, "\n\n".join([str(report), *told])
    words = left_over(number, function)
    if words:
        return False, f"Exercise {number} is right but for a shape: {words}: step 14."
    following = f"On to exercise {number + 1}." if number + 1 in EXERCISES else "That was the last."
    return True, f"Exercise {number} is right, {report.rows[0].sentence}. {following}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Grade one exercise, or all; return 0 if what was asked for is right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int, nargs="?", choices=EXERCISES, help="default: all five")
    number = parser.parse_args(arguments).number
    verdicts = [verdict(n, EXERCISES[n].written()) for n in EXERCISES if number in (n, None)]
    print("\n".join(words for _, words in verdicts))
    return 0 if all(right for right, _ in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
