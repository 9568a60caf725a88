"""The report of a GPU as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from benchmarks.contestants import BUILTIN, COMPILED, COPY, IN_PLACE, OURS
from benchmarks.goals import Measure
from benchmarks.last_layer import FLOOR
from benchmarks.table import WIDTH, compared, goals_met, new_table, three

Entry = dict[str, Any]

_TITLES = {
    "rows": "device time, caches cold; share of a copy's bandwidth on the bytes that must move",
    "curve": "cross_entropy, forward + backward, from 10 classes to a million",
    "step": "a step by the clock on the wall, launches and Python included",
    "last layer": "linear_cross_entropy beside three bare products; memory beyond the gradients",
}
_ORDER = (COPY, FLOOR, BUILTIN, COMPILED, OURS, IN_PLACE)


def show(report: Entry, console: Console | None = None) -> None:
    """Print the sections that the report has."""
    (console or Console(width=WIDTH, highlight=False)).print(Group(*_parts(report)))


def _parts(report: Entry) -> Iterator[RenderableType]:
    yield _heading(report["environment"])
    for section, title in _TITLES.items():
        if report[section]:
            yield Text(title, style="italic")
            yield Text()
        for entry in report[section]:
            yield _table(entry)
            yield Text()
    yield from goals_met(report)


def _heading(e: Entry) -> Text:
    others = ", ".join(f"{name} {version}" for name, version in e["rivals"].items())
    return Text(
        f"{e['device']}, driver {e['driver'] or 'unknown'}, CUDA {e['cuda']}, {e['date']}\n"
        f"torch {e['torch']}, Python {e['python']}; {others}\n"
        f"custom_ops: {e['backend']}\n"
    )


def _table(entry: Entry) -> RenderableType:
    measures = [m for m in _HEADS if any(m in found for found in entry["ratios"].values())]
    speeds = entry.get("bytes_a_second", {})
    table = new_table(entry["name"], "")
    heads = ("ms", *(["GB/s"] if speeds else []), *(_HEADS[m] for m in measures), "first\ncall, s")
    for head in heads:
        table.add_column(head, justify="right")
    for name in sorted(entry["seconds"], key=_place):
        table.add_row(
            name,
            three(1e3 * entry["seconds"][name]["median"]),
            *([f"{speeds[name] / 1e9:.0f}"] if speeds else []),
            *(_ratio(entry, name, m) for m in measures),
            f"{entry['first_call_seconds'][name]:.2f}",
        )
    failed = "\n".join(f"{name}: {why}" for name, why in entry["failed"].items())
    return Group(table, Text(failed)) if failed else table


_HEADS: dict[Measure, str] = {
    "share": "of a\ncopy",
    "over builtin": "over\nbuiltin",
    "over compiled": "over\ncompiled",
    "floors": "in three\nproducts",
    "MiB": "peak\nMiB",
}


def _place(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _ratio(entry: Entry, name: str, measure: Measure) -> Text:
    if measure not in entry["ratios"][name]:
        return Text()
    return compared(entry, name, measure)
