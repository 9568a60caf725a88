"""What is measured on a GPU: the op, the direction, the shape, and the goals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.cases import Case, Op
from benchmarks.contestants import IN_PLACE, OURS
from benchmarks.goals import Goal
from benchmarks.last_layer import LastLayer

Direction = Literal["forward", "backward", "forward + backward"]


@dataclass(frozen=True)
class DeviceCase:
    """A case, and which half of it is timed."""

    case: Case
    direction: Direction

    @property
    def name(self) -> str:
        """Everything that tells this case from the others."""
        return f"{self.case.name} {self.direction}"

    @property
    def moved(self) -> int:
        """The bytes that must be read or written, whoever computes it.

        softmax reads z and writes p, its backward reads p and v and writes dz. Cross-entropy reads
        z, and reads it again to write dz, which the backward cannot before it is called; each time
        with a label a row, and with M and L, that the one leaves to the other.
        """
        passes = 2 if self.direction == "forward" else 3
        logits = passes * self.case.elements * self.case.dtype.itemsize
        if self.case.op != "cross_entropy":
            return logits
        return logits + 2 * self.case.shape[0] * (8 + 2 * 4)


def _softmax(
    op: Op, shape: tuple[int, int], dtype: torch.dtype, direction: Direction, share: float
) -> DeviceCase:
    return DeviceCase(Case(op, shape, dtype, goals=(Goal(OURS, "share", share),)), direction)


def _cross_entropy(rows: int, classes: int, *goals: Goal) -> DeviceCase:
    case = Case("cross_entropy", (rows, classes), torch.bfloat16, goals=goals)
    return DeviceCase(case, "forward + backward")


_OPS: tuple[Op, ...] = ("softmax", "log_softmax")
_SHARES: tuple[tuple[Direction, float], ...] = (("forward", 0.95), ("backward", 0.92))
CASES: tuple[DeviceCase, ...] = (
    *(
        _softmax(op, (16_384, 8192), dtype, direction, share)
        for op in _OPS
        for dtype in (torch.float32, torch.bfloat16)
        for direction, share in _SHARES
    ),
    *(
        _softmax("softmax", shape, dtype, direction, share)
        for shape, share in (((8192, 32_768), 0.93), ((2048, 131_072), 0.8))
        for dtype in (torch.float32, torch.bfloat16)
        for direction, _ in _SHARES
    ),
    _cross_entropy(8192, 128_256, Goal(IN_PLACE, "share", 0.9)),
)

_FASTEST = (Goal(OURS, "over builtin", 1), Goal(OURS, "over compiled", 1))
#: From few classes to a million; in bfloat16, as torch's function would not fit in float32. Few
#: classes take the time of launches, and a copy is one launch: there no share of it is a goal.
CURVE: tuple[DeviceCase, ...] = (
    *(_cross_entropy(32_768, classes, *_FASTEST) for classes in (10, 100)),
    *(
        _cross_entropy(rows, classes, Goal(OURS, "share", share), *_FASTEST)
        for rows, classes, share in (
            (32_768, 1000, 0.75),
            (16_384, 10_000, 0.8),
            (8192, 32_000, 0.85),
            (8192, 50_257, 0.85),
            (8192, 128_256, 0.92),
            (4096, 1_000_000, 0.6),
        )
    ),
)


def _step(op: Op, rows: int, direction: Direction, bound: float) -> DeviceCase:
    goals = (Goal(OURS, "over builtin", bound),)
    return DeviceCase(Case(op, (rows, 10), calls=200, goals=goals), direction)


def _eager(*shape: int) -> DeviceCase:
    case = Case("cross_entropy", shape, torch.bfloat16, calls=20, goals=_FASTEST)
    return DeviceCase(case, "forward + backward")


_BOUNDS: tuple[tuple[Direction, float], ...] = (("forward", 0.9), ("forward + backward", 1.3))
#: By the clock on the wall: small batches, where all of it is launches and Python, and larger ones,
#: where it should be neither.
STEPS: tuple[DeviceCase, ...] = (
    *(
        _step(op, rows, direction, bound)
        for op in ("cross_entropy", *_OPS)
        for rows in (64, 128)
        for direction, bound in _BOUNDS
    ),
    *(_eager(32_768, classes) for classes in (10, 100, 1000)),
    *(_eager(*shape) for shape in ((4, 21, 256, 256), (8, 19, 512, 1024))),
)

#: The heads of large language models, within the memory that is named.
LAST_LAYERS = (
    LastLayer(
        8192,
        4096,
        128_256,
        torch.bfloat16,
        goals=(
            Goal(OURS, "floors", 1.12),
            Goal(OURS, "MiB", 1126),
            Goal("ours in 320 MiB", "floors", 1.5),
            Goal("ours in 320 MiB", "MiB", 320),
            Goal("ours unlimited", "floors", 1.06),
        ),
        within=("ours in 320 MiB", "ours unlimited"),
    ),
    LastLayer(
        16_384,
        2048,
        248_320,
        torch.bfloat16,
        goals=(
            Goal("ours in 2 GiB", "floors", 1.2),
            Goal("ours in 2 GiB", "MiB", 2048),
            Goal("ours in 614 MiB", "floors", 1.5),
            Goal("ours in 614 MiB", "MiB", 614),
        ),
        within=("ours in 614 MiB", "ours in 2 GiB", "ours unlimited"),
    ),
)
