"""check(): the battery on one function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from custom_ops.testing.entry import Check
from custom_ops.testing.report import FAILED, NOT_APPLICABLE, Report, Row
from custom_ops.testing.samples import sample_inputs
from custom_ops.testing.subject import Subject, make_subject
from custom_ops.testing.table import CHECKS

__all__ = ["check", "chosen"]


def check(
    function: Any,
    *inputs: Any,
    reference: Callable[..., Any] | None = None,
    only: Collection[str] = (),
    skip: Collection[str] = (),
    seed: int = 0,
    shards: Mapping[int, int] | None = None,
) -> Report:
    """Run the checks on `function`, and return what they found.

    Args:
        function: a torch.autograd.Function subclass, a Module or any callable over tensors.
            A functools.partial lets the report name a keyword that a backward forgets.
        inputs: what the function takes: tensors of any shape and dtype, nested in tuples, lists and
            dicts, and other objects. Those that require grad are differentiated; if none does,
            every floating-point one. Or one strategy: a callable that takes a torch.Generator and
            returns the tuple of inputs, or a hypothesis strategy of such tuples.
        reference: the same function by somebody else, for the values; for a Module one that takes
            the inputs and then the parameters, or another Module.
        only: names of checks or of kinds; all that are cheap if empty.
        skip: names of checks or of kinds to leave out.
        seed: seeds every random number; the same seed gives the same report.
        shards: asks for the check with two processes, for a function that a process group calls
            with parts: {position of an input: the dimension in which it is cut}. The reference
            takes the whole inputs. The function must be one that pickle can send.

    Raises:
        ValueError: `only` or `skip` has a name that no check and no kind has.
        TypeError: no input is a floating-point tensor.

    >>> import torch
    >>> class Square(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         ctx.save_for_backward(x)
    ...         return x * x
    ...
    ...     @staticmethod
    ...     def backward(ctx, v):
    ...         return v * ctx.saved_tensors[0]
    >>> report = check(Square, torch.tensor([1.0, 2.0]), only=["gradient"])
    >>> report.failures[0].sentence
    'the gradient of input 0 (`x`) is 0.5 times the right one: a factor of two'
    """
    checks = chosen(only, skip, asked=("distributed",) if shards else ())
    worst: dict[str, Row] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: the others would only wait for each other
    try:
        for sample in sample_inputs(inputs, seed):
            subject = make_subject(function, sample, reference, seed, shards)
            if not subject.wrt:
                raise TypeError("inputs must hold a floating-point tensor, got none")
            for entry in checks:
                _keep(worst, entry, subject)
    finally:
        torch.set_num_threads(threads)
    return Report(subject.name, seed, [worst[entry.name] for entry in checks])


def chosen(
    only: Collection[str], skip: Collection[str], asked: Collection[str] = ()
) -> list[Check]:
    """Return the checks of the table that `only` and `skip` leave, and the kinds `asked` for."""
    known = {entry.name for entry in CHECKS} | {entry.kind for entry in CHECKS}
    for name in (*only, *skip):
        if name not in known:
            raise ValueError(f"no check is called {name!r}; expected one of {sorted(known)}")
    return [
        entry
        for entry in CHECKS
        if (
            entry.name in only
            or entry.kind in only
            or (not only and (not entry.asked or entry.kind in asked))
        )
        and entry.name not in skip
        and entry.kind not in skip
    ]


def _keep(worst: dict[str, Row], entry: Check, subject: Subject) -> None:
    """Of several samples keep the first failure, or else the last row that applied."""
    before = worst.get(entry.name)
    if before is not None and before.status == FAILED:
        return
    row = _row(worst, entry, subject)
    if before is not None:
        row = replace(row, seconds=row.seconds + before.seconds)
        if row.status != FAILED and before.status == "passed":
            row = replace(before, seconds=row.seconds)
    worst[entry.name] = row


def _row(worst: dict[str, Row], entry: Check, subject: Subject) -> Row:
    final = next((row for row in worst.values() if row.final), None)
    if final is not None:
        return Row(entry.kind, entry.name, NOT_APPLICABLE, f"left out: see `{final.check}`")
    for name in entry.after:
        if name in worst and worst[name].status == FAILED:
            return Row(entry.kind, entry.name, NOT_APPLICABLE, f"left out, as `{name}` failed")
    return entry.row(subject)
