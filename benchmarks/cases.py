"""What is measured: the op, the shape, the type of the numbers, and the goals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.goals import Goal, faster

Op = Literal["cross_entropy", "softmax", "log_softmax"]

TINY_CALLS = 200  # of a call of tens of microseconds, in one reading of the clock


@dataclass(frozen=True)
class Case:
    """Forward and backward of one op, the classes in dimension 1."""

    op: Op
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    regularised: bool = False  #: label_smoothing=0.1, a weight for each class
    calls: int = 1  #: in one reading of the clock
    goals: tuple[Goal, ...] = ()

    @property
    def size(self) -> str:
        """The shape and what is special: `2048x32000 bfloat16`."""
        shape = "x".join(map(str, self.shape))
        options = " smoothed, weighted" if self.regularised else ""
        return f"{shape} {str(self.dtype).removeprefix('torch.')}{options}"

    @property
    def name(self) -> str:
        """Everything that tells this case from the others."""
        return f"{self.op} {self.size}"

    @property
    def elements(self) -> int:
        """How many logits there are."""
        return math.prod(self.shape)


def _tiny(op: Op, rows: int) -> Case:
    return Case(op, (rows, 10), calls=TINY_CALLS, goals=faster(1, 2))


_OPS: tuple[Op, ...] = ("cross_entropy", "softmax", "log_softmax")
_WIDE, _WIDER, _NARROW = (2048, 32_000), (1024, 128_256), (4096, 1000)
_HALF = torch.bfloat16

CASES: tuple[Case, ...] = (
    Case(
        "cross_entropy",
        _WIDE,
        goals=(
            *faster(7, 3.5),
            Goal("ours", "copies", 2.3),
            Goal("in place", "over builtin", 9),
            Goal("in place", "copies", 1.7),
        ),
    ),
    Case("cross_entropy", _WIDE, _HALF, goals=faster(5, 2.5)),
    Case("cross_entropy", _WIDE, regularised=True, goals=faster(7, 3)),
    Case("cross_entropy", _WIDER, goals=(*faster(7, 3.5), Goal("in place", "over builtin", 10))),
    Case("cross_entropy", _WIDER, _HALF, goals=faster(5, 2.5)),
    Case("cross_entropy", _NARROW, goals=faster(2.5, 2)),
    Case("cross_entropy", _NARROW, _HALF, goals=faster(5, 2.5)),
    Case("cross_entropy", (4, 21, 256, 256), goals=faster(3, 1.5)),
    Case("softmax", _WIDE, goals=faster(3, 1.5)),
    Case("softmax", _WIDE, _HALF, goals=faster(3, 1.5)),
    Case("softmax", _NARROW, goals=faster(1.3, 1.3)),
    Case("log_softmax", _WIDE, goals=faster(3, 1.5)),
    Case("log_softmax", _WIDE, _HALF, goals=faster(3, 1.5)),
    Case("log_softmax", _NARROW, goals=faster(1.3, 1.3)),
    *(_tiny(op, rows) for op in _OPS for rows in (1024, 128, 64)),
)

#: The peak of memory is taken of this one.
MEMORY = Case(
    "cross_entropy",
    _WIDE,
    goals=(Goal("ours", "logits", 1.02), Goal("in place", "MiB", 1)),
)

#: One thread against several.
SCALING: tuple[Case, ...] = (
    Case("cross_entropy", _WIDE),
    Case("cross_entropy", _NARROW),
    Case("softmax", _WIDE),
)

#: Along the curve.
CURVE_CLASSES = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000)


def curve(elements: int) -> tuple[Case, ...]:
    """Return cross-entropies of about so many logits, from few classes to a million."""
    return tuple(Case("cross_entropy", (elements // C, C)) for C in CURVE_CLASSES)
