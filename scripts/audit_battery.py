"""Write the tables of docs/battery.md: every check, and every faulty twin with who finds it."""

from __future__ import annotations

import importlib
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import gradcheck, gradgradcheck

from custom_ops.testing import check
from custom_ops.testing.table import CHECKS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "battery.md"


def table_of_checks() -> list[str]:
    """Return a line for each check: its kind, its name, what it says."""
    lines = ["| kind | check | passes if |", "| --- | --- | --- |"]
    kind = ""
    for kind in dict.fromkeys(entry.kind for entry in CHECKS):
        for entry in CHECKS:
            if entry.kind == kind:
                text = " ".join((entry.run.__doc__ or "").split("\n\n")[0].split())
                asked = " (where asked)" if entry.asked else ""
                lines.append(f"| {kind} | {entry.name}{asked} | {text} |")
    return lines


def finds(tool: Callable[..., bool], twin: Any) -> str:
    """Return whether one of torch's tools, with its defaults, says that the twin is wrong."""
    torch.manual_seed(0)
    inputs = [
        x.double().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in twin.inputs()
    ]
    function: Any = twin.function
    function = getattr(function, "apply", function) if isinstance(function, type) else function
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tool(function, tuple(inputs))
    except Exception:
        return "yes"
    return "no"


def table_of_twins() -> tuple[list[str], str]:
    """Return a line for each twin, and the sum in a sentence."""
    sys.path.insert(0, str(ROOT / "tests" / "testing"))
    TWINS = importlib.import_module("twins").TWINS

    lines = [
        "| fault | found by | named | gradcheck | gradgradcheck | other findings |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    found = named = alone = both = 0
    slowest = 0.0
    for twin in TWINS:
        torch.manual_seed(0)
        start = time.process_time()
        report = check(twin.function, *twin.inputs(), reference=twin.reference)
        slowest = max(slowest, time.process_time() - start)
        rows = {row.check: row for row in report.failures}
        row = rows.pop(twin.check, None)
        right = row is not None and row.mistake == twin.mistake and twin.named in row.sentence
        verdicts = finds(gradcheck, twin), finds(gradgradcheck, twin)
        found += row is not None
        named += right
        alone += verdicts[0] == "yes"
        both += "yes" in verdicts
        mark = "" if twin.public else " *"
        name = twin.mistake if right else "**no**"
        others = ", ".join(rows) or "none"
        lines.append(
            f"| {twin.fault}{mark} | {twin.check if row else '**no**'} | {name} | "
            f"{' | '.join(verdicts)} | {others} |"
        )
    public = sum(twin.public for twin in TWINS)
    return lines, (
        f"{len(TWINS)} twins, {public} of them of faults that published libraries shipped "
        f"(the others, marked \\*, are what people get wrong first): {found} found, {named} named. "
        f"gradcheck alone finds {alone}, gradcheck and gradgradcheck together {both}. The slowest "
        f"whole battery took {slowest:.0f} s of one core."
    )


def written(page: str, name: str, lines: list[str]) -> str:
    """Return the page with the part between two comments replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return pattern.sub(lambda m: m[1] + "\n".join(lines) + "\n" + m[2], page)


def main() -> None:
    """Run every twin and write the page."""
    page = written(PAGE.read_text(), "checks", table_of_checks())
    lines, total = table_of_twins()
    page = written(page, "twins", [*lines, "", total])
    PAGE.write_text(page)
    print(total)


if __name__ == "__main__":
    main()
