"""What is claimed: a bound on a measured ratio, and whether it was met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

Measure = Literal[
    "over builtin",
    "over compiled",
    "share",  # of the speed of a copy, on the bytes that must move
    "copies",
    "logits",
    "MiB",
    "floors",
    "products",
    "steps",
]

#: The ratios that shall be large; of the others, small is good.
SPEEDUPS = ("over builtin", "over compiled", "share")


class Goal(NamedTuple):
    """A bound: the least of a speed-up or a share, the most of anything else."""

    contestant: str
    measure: Measure
    bound: float


def faster(builtin: float, compiled: float) -> tuple[Goal, Goal]:
    """Return the goals of ours: so many times as fast as the built-in, eager and compiled."""
    return Goal("ours", "over builtin", builtin), Goal("ours", "over compiled", compiled)


def judge(
    goals: Iterable[Goal], measured: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Hold the goals against what was measured, by contestant and measure."""
    return [_judge(goal, measured[goal.contestant][goal.measure]) for goal in goals]


def _judge(goal: Goal, measured: float) -> dict[str, Any]:
    least = goal.measure in SPEEDUPS
    met = measured >= goal.bound if least else measured <= goal.bound
    return {**goal._asdict(), "measured": measured, "met": met}
