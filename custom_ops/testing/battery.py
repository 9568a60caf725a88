"""A pytest test for each check of the battery."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from custom_ops.testing.entry import Check
from custom_ops.testing.report import FAILED, NOT_APPLICABLE, TORCH, Report
from custom_ops.testing.run import check, chosen

__all__ = ["battery"]


def battery(
    *inputs: Any,
    reference: Callable[..., Any] | None = None,
    only: Collection[str] = (),
    skip: Collection[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a test that returns a function: it becomes a test for each check.

    The arguments are those of `check`. The test may take fixtures. A check that is not applicable
    is skipped with its reason, a fault of torch's is an expected failure. The tests are called
    test_mine[gradient] …, so that -k and --lf choose among them; `--battery-seed` is their seed.

    Raises:
        ValueError: `only` or `skip` has a name that no check and no kind has.

    For example:

        @battery(torch.randn(3, 4))
        def test_softmax():
            return MySoftmax
    """
    import pytest

    checks = chosen(only, skip)

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        takes = inspect.signature(test).parameters

        @functools.wraps(test)
        def run(request: pytest.FixtureRequest, battery_check: Check, **fixtures: Any) -> None:
            if "request" in takes:
                fixtures["request"] = request
            seed = int(request.config.getoption("battery_seed", 0))  # 0 without the plugin
            names = {battery_check.name, *battery_check.after, *_first(battery_check)}
            report = check(test(**fixtures), *inputs, reference=reference, only=names, seed=seed)
            _conclude(report, battery_check.name)

        run.__signature__ = _signature(takes)  # type: ignore[attr-defined]
        del run.__wrapped__
        ids = [entry.name.replace(" ", "-") for entry in checks]
        return pytest.mark.parametrize("battery_check", checks, ids=ids)(run)

    return decorate


def _first(entry: Check) -> tuple[str, ...]:
    """The check that says whether backward can be called at all."""
    return ("forward",) if entry.kind in ("call", "reference") else ("forward", "gradient")


def _signature(takes: Mapping[str, inspect.Parameter]) -> inspect.Signature:
    """The fixtures that pytest passes: the test's own, and two of ours."""
    names = dict.fromkeys([*takes, "request", "battery_check"])
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature([inspect.Parameter(name, kind) for name in names])


def _conclude(report: Report, name: str) -> None:
    import pytest

    (row,) = (row for row in report.rows if row.check == name)
    if row.status == NOT_APPLICABLE:
        pytest.skip(row.sentence)
    if row.status == TORCH:
        pytest.xfail(row.sentence)
    if row.status == FAILED:
        text = str(Report(report.name, report.seed, [row]))
        pytest.fail(f"{text}\n  again with --battery-seed={report.seed}", pytrace=False)
