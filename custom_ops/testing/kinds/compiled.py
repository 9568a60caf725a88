"""torch.compile and torch.export: the same numbers, any batch, few recompilations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from custom_ops.testing.compare import differing, owed, run
from custom_ops.testing.entry import Check
from custom_ops.testing.rows import batch, sums_over_rows
from custom_ops.testing.source import applies_functions
from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import Fault, NotApplicable

__all__ = ["CHECKS"]


def _call(subject: Subject) -> Callable[..., Any]:
    """The function without the battery's seeding, which Dynamo need not see."""

    def f(*xs: Any) -> Any:
        return subject.call(*xs)

    return f


def _run(subject: Subject, compiled: Callable[..., Any]) -> list[Tensor | None]:
    return run(replace(subject, call=compiled))


def _refused(error: Exception) -> NotApplicable:
    return NotApplicable(f"torch.compile refuses: {' '.join(str(error).split())[:100]}")


def fullgraph(subject: Subject) -> str:
    """One graph without a break gives the plain call's numbers, forward and backward."""
    torch.compiler.reset()
    compiled = torch.compile(_call(subject), fullgraph=True, backend="aot_eager")
    want = run(subject)
    try:
        got = _run(subject, compiled)
    except Exception as error:
        raise _refused(error) from error
    finally:
        torch.compiler.reset()
    found = differing(got, want, owed(subject), 256)
    if found is not None:
        raise Fault(f"{found}, the plain call's, under torch.compile", "compiled")
    return "one graph, the same numbers"


def dynamic(subject: Subject) -> str:
    """Batches of other sizes are compiled once more at most, and give the plain numbers."""
    positions = batch(subject) or sums_over_rows(subject)
    if positions is None:
        raise NotApplicable("the rows of dimension 0 are not independent of each other")
    torch.compiler.reset()
    graphs = []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(_call(subject), backend=counting, dynamic=None)
    per_call = 0
    try:
        for size in (0, 3, 5, 6, 7):
            other = subject if size == 0 else _of_rows(subject, positions, size)
            want = run(other)
            try:
                got = _run(other, compiled)
            except Exception as error:
                if size == 0:
                    raise _refused(error) from error
                raise Fault(
                    f"a compiled function raises {type(error).__name__} for {size} rows: "
                    f"{str(error)[:120]}",
                    "fixed batch",
                ) from error
            found = differing(got, want, owed(other), 256)
            if found is not None:
                raise Fault(f"{found}, compiled, for {size} rows", "compiled")
            per_call = per_call or len(graphs)
    finally:
        torch.compiler.reset()
    if per_call and len(graphs) > 3 * per_call:
        raise Fault(
            f"five batch sizes compiled {len(graphs) // per_call} times; expected 2: "
            "a size is kept as a Python number",
            "recompiles",
        )
    return f"five batch sizes, {len(graphs)} graphs"


def _of_rows(subject: Subject, positions: tuple[int, ...], size: int) -> Subject:
    n = subject.inputs[positions[0]].shape[0]
    rows = torch.arange(size) % n
    return subject.with_inputs(
        [x.detach()[rows].clone() if i in positions else x for i, x in enumerate(subject.inputs)]
    )


class _Program(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *xs: Any) -> Any:
        return self.call(*xs)


def exported(subject: Subject) -> str:
    """An exported program takes any batch, in backward too."""
    positions = batch(subject) or sums_over_rows(subject)
    others = [x for x in subject.inputs if not isinstance(x, Tensor)]
    if positions is None:
        raise NotApplicable("the rows of dimension 0 are not independent of each other")
    if any(not isinstance(x, (int, float, bool, str, type(None))) for x in others):
        raise NotApplicable("an input is no tensor and no number")
    n = torch.export.Dim("n")
    shapes = tuple({0: n} if i in positions else None for i in range(len(subject.inputs)))
    example = tuple(x.detach() if isinstance(x, Tensor) else x for x in subject.inputs)
    try:
        program = torch.export.export(
            _Program(_call(subject)), example, dynamic_shapes=(shapes,)
        ).module()
    except Exception as error:
        if "pecializ" in str(error) and applies_functions(subject):
            raise Fault(
                "an exported program has a fixed batch: torch.export finds that the rows "
                "are read as a Python number (len(x), int(x.shape[0]))",
                "fixed batch",
            ) from error
        raise NotApplicable(
            f"torch.export refuses: {' '.join(str(error).split())[:100]}"
        ) from error
    for size in (2, 5):
        other = _of_rows(subject, positions, size)
        want = run(other)
        try:
            got = _run(other, program)
        except Exception as error:
            raise Fault(
                f"an exported program, dynamic in its rows, raises {type(error).__name__} for "
                f"{size} rows: {str(error)[:120]}",
                "fixed batch",
            ) from error
        found = differing(got, want, owed(other), 256)
        if found is not None:
            raise Fault(
                f"{found}, in an exported program run with {size} rows: a size was kept "
                "as a number",
                "fixed batch",
            )
    return "2 and 5 rows"


CHECKS = (
    Check("compile", "fullgraph", fullgraph),
    Check("compile", "dynamic", dynamic, after=("gradient", "inputs unchanged")),
    Check("compile", "export", exported, after=("gradient", "inputs unchanged")),
)
