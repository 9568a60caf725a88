"""What is measured, in which order, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from benchmarks import cases, last_layer, memory, speed
from benchmarks.timing import Effort

#: The rows whose memory a heap may keep or give back.
KEPT_HEAP = "rows, heap kept"
#: Of a report.
SECTIONS = (
    "rows",
    KEPT_HEAP,
    "memory",
    "curve",
    "scaling",
    "last layer",
    "last layer memory",
    "last layer hessian",
    "last layer curve",
)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    effort: Effort
    curve_elements: int
    last_layer: Effort  #: whose calls take tenths of a second
    whole_last_layer: bool  #: all of its cases, torch's chunks, memory, Hessian and curve

    @property
    def settings(self) -> dict[str, Any]:
        """The plan as the report names it."""
        return asdict(self)


THOROUGH = Plan(
    Effort(warm_up=2, least=15, most=100, seconds=8),
    curve_elements=2**24,
    last_layer=Effort(warm_up=1, least=7, most=20, seconds=8),
    whole_last_layer=True,
)
QUICK = Plan(
    Effort(warm_up=1, least=3, most=25, seconds=0.3),
    curve_elements=2**22,
    last_layer=Effort(warm_up=0, least=2, most=3, seconds=0.3),
    whole_last_layer=False,
)


class Step(NamedTuple):
    """One measurement, and the section that it belongs to."""

    section: str
    name: str
    measure: Callable[[], dict[str, Any]]


def steps(plan: Plan, threads: int) -> list[Step]:
    """Return all that is to be measured."""
    effort, memory_of = plan.effort, cases.MEMORY
    return [
        *(Step("rows", case.name, partial(speed.row, case, effort)) for case in cases.CASES),
        *(
            Step(
                KEPT_HEAP,
                f"heap kept: {case.name}",
                partial(speed.row_on_kept_heap, case, effort, threads),
            )
            for case in cases.CASES
            if case.calls == 1
        ),
        Step("memory", f"memory: {memory_of.name}", partial(memory.peaks, memory_of, threads)),
        *(
            Step("curve", f"curve: {case.name}", partial(speed.point, case, effort))
            for case in cases.curve(plan.curve_elements)
        ),
        *(
            Step("scaling", f"scaling: {case.name}", partial(speed.scaling, case, effort, threads))
            for case in cases.SCALING
            if threads > 1
        ),
        *_last_layer_steps(plan, threads),
    ]


def _last_layer_steps(plan: Plan, threads: int) -> list[Step]:
    effort, case, whole = plan.last_layer, last_layer.MEMORY, plan.whole_last_layer
    rows = [
        Step("last layer", c.name, partial(last_layer.row, c, effort, whole))
        for c in (last_layer.CASES if whole else last_layer.QUICK)
    ]
    if not whole:
        return rows
    return [
        *rows,
        Step(
            "last layer memory",
            f"memory: {case.name}",
            partial(memory.last_layer_peaks, case, threads),
        ),
        Step("last layer hessian", f"hvp: {case.name}", partial(last_layer.hessian, case, effort)),
        *(
            Step("last layer curve", f"curve: {c.name}", partial(last_layer.point, c, effort))
            for c in last_layer.curve(plan.curve_elements)
        ),
    ]
