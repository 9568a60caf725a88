"""The report as tables in a terminal, 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.contestants import BUILTIN, COMPILED, COPY, IN_PLACE, OURS
from benchmarks.goals import SPEEDUPS, Measure
from benchmarks.last_layer import CHUNKED, FLOOR, FORWARD, HVP
from benchmarks.plan import KEPT_HEAP

WIDTH = 80
_LABEL = 20  # `1024x128256 bfloat16`

Entry = dict[str, Any]


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the sections that the report has."""
    (console or Console(width=WIDTH, highlight=False)).print(Group(*_parts(report)))


def _parts(report: dict[str, Any]) -> Iterator[RenderableType]:
    yield _heading(report["environment"])
    tables = (
        ("rows", _times),
        ("rows", _ratios),
        (KEPT_HEAP, _on_kept_heap),
        ("memory", _memory),
        ("curve", _curve),
        ("scaling", _scaling),
        ("last layer", _last_layer),
        ("last layer memory", _memory),
        ("last layer hessian", _hessian),
        ("last layer curve", _last_layer_curve),
    )
    for section, table in tables:
        if report[section]:
            yield table(report[section])
            yield Text()
    yield from goals_met(report)


def goals_met(report: Entry) -> Iterator[Text]:
    """Say how many of the goals were met, if there are any."""
    claims = [
        c
        for section in report.values()
        if isinstance(section, list)
        for e in section
        for c in e.get("claims", ())
    ]
    if claims:
        met = sum(claim["met"] for claim in claims)
        missed = "; those missed are marked < or >" if met < len(claims) else ""
        yield Text(f"{met} of {len(claims)} goals met{missed}")


def _heading(e: Entry) -> Text:
    huge = f", huge pages: {e['huge_pages']}" if e["huge_pages"] else ""
    return Text(
        f"{e['machine']}, {e['cores']} cores, load before {e['load']:.1f}, {e['date']}\n"
        f"torch {e['torch']}, {e['threads']} threads, {e['vectors']}, Python {e['python']}{huge}\n"
        f"custom_ops: {e['backend']}\n"
    )


def _times(rows: list[Entry]) -> Table:
    names = (COPY, BUILTIN, COMPILED, OURS, IN_PLACE)
    table = new_table("forward + backward: median time, ± half of the quartiles' distance", "")
    table.columns[0].min_width = _LABEL
    for name in names:
        table.add_column(name, justify="right")
    for (op, calls), group in groupby(rows, lambda row: (row["op"], row["calls"])):
        unit, scale = ("ms", 1e3) if calls == 1 else ("µs", 1e6)
        _section(table, f"{op}, {unit}")
        for row in group:
            cells = (_time(row["seconds"].get(name), scale) for name in names)
            table.add_row(row["size"], *cells)
    return table


def _on_kept_heap(rows: list[Entry]) -> Table:
    return _ratios(rows, "the same on a heap that keeps its memory")


def _ratios(rows: list[Entry], title: str = "the same as ratios, each beside its goal") -> Table:
    measures: tuple[Measure, ...] = ("over builtin", "over compiled", "copies")
    heads = ("speed-up over\nbuiltin", "speed-up over\ncompiled", "time, in\ncopies")
    table = new_table(title, "", "")
    table.columns[0].min_width = _LABEL
    for head in heads:
        table.add_column(head, justify="right")
    for (op, _), group in groupby(rows, lambda row: (row["op"], row["calls"])):
        _section(table, op)
        for row in group:
            for name in (OURS, IN_PLACE):
                if name in row["ratios"]:
                    label = row["size"] if name == OURS else ""
                    table.add_row(label, name, *(compared(row, name, m) for m in measures))
    return table


def _memory(entries: list[Entry]) -> Table:
    (entry,) = entries
    beyond = "gradients" if OURS in entry["bytes"] and HVP in entry["bytes"] else "logits"
    table = new_table(f"peak memory beyond the {beyond}: {entry['name']}", "")
    for head in (
        "resident\nMiB",
        "torch's\nallocator, MiB",
        "the larger\nMiB",
        "the larger\nin logits",
    ):
        table.add_column(head, justify="right")
    for name, found in entry["bytes"].items():
        counted = (_mebibytes(found[by]) for by in ("resident", "allocated"))
        table.add_row(name, *counted, compared(entry, name, "MiB"), compared(entry, name, "logits"))
    return table


def _curve(points: list[Entry]) -> Table:
    names = (COPY, BUILTIN, OURS)
    title = f"cross_entropy, about {points[0]['elements']:,} logits: ns a logit"
    table = new_table(title, "classes", *names, "over builtin", justify="right")
    for point in points:
        each = point["nanoseconds"]
        ratio = each[BUILTIN] / each[OURS]
        times = (three(each[name]) for name in names)
        table.add_row(f"{point['classes']:,}", *times, three(ratio))
    return table


def _scaling(entries: list[Entry]) -> Table:
    one, several = entries[0]["threads"]
    heads = (f"{one} thread", f"{several} threads", "speed-up")
    table = new_table("one thread and several: ms", "", "")
    table.columns[0].no_wrap = True
    for head in heads:
        table.add_column(head, justify="right")
    for entry in entries:
        for name, times in entry["seconds"].items():
            alone, together = (t["median"] for t in times)
            numbers = (three(x) for x in (1e3 * alone, 1e3 * together, alone / together))
            table.add_row(entry["name"] if name == BUILTIN else "", name, *numbers)
    return table


def _last_layer(rows: list[Entry]) -> Table:
    title = "linear_cross_entropy, N, D, classes: in three bare products; forward in one"
    table = new_table(title, "")
    heads = ("floor\nms", "builtin", CHUNKED, OURS, FORWARD)
    for head in heads:
        table.add_column(head, justify="right")
    table.columns[0].no_wrap = True
    for column, width in ((OURS, 12), (FORWARD, 12)):  # of a ratio beside its goal
        table.columns[heads.index(column) + 1].min_width = width
    for row in rows:
        chunked = row["ratios"].get(CHUNKED)
        table.add_row(
            row["size"],
            three(1e3 * row["seconds"][FLOOR]["median"]),
            compared(row, BUILTIN, "floors"),
            three(chunked["floors"]) if chunked else "",
            compared(row, OURS, "floors"),
            compared(row, FORWARD, "products"),
        )
    return table


def _hessian(entries: list[Entry]) -> Table:
    (entry,) = entries
    table = new_table(f"Hessian-vector product: {entry['name']}", "", justify="right")
    for head in ("ms", "in steps"):
        table.add_column(head, justify="right")
    for name, times in entry["seconds"].items():
        table.add_row(name, _time(times, 1e3), compared(entry, name, "steps"))
    return table


def _last_layer_curve(points: list[Entry]) -> Table:
    title = f"linear_cross_entropy, {points[0]['features']} features: ns a logit"
    table = new_table(title, "rows", "classes", FLOOR, OURS, "ratio", justify="right")
    for point in points:
        each = point["nanoseconds"]
        sizes = (f"{point[size]:,}" for size in ("rows", "classes"))
        numbers = (each[FLOOR], each[OURS], each[OURS] / each[FLOOR])
        table.add_row(*sizes, *map(three, numbers))
    return table


def new_table(title: str, *columns: str, justify: Any = "left") -> Table:
    """Return a table as all of them look."""
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_style="bold",
        title_justify="left",
        width=WIDTH,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        table.add_column(column, justify=justify)
    return table


def _section(table: Table, words: str) -> None:
    table.add_row(Text(words, style="italic"))


def _time(times: Entry | None, scale: float) -> str:
    if times is None:
        return ""
    low, high = times["quartiles"]
    return f"{three(scale * times['median'])} ±{50 * (high - low) / times['median']:.0f}%"


def compared(entry: Entry, name: str, measure: Measure) -> Text:
    """Return a ratio, beside its goal if it has one."""
    for claim in entry["claims"]:
        if (claim["contestant"], claim["measure"]) == (name, measure):
            return _comparison(claim)
    return Text(three(entry["ratios"][name][measure]))


def _comparison(claim: Entry) -> Text:
    """Measured against goal; the sign says whether it is met, the weight only repeats it."""
    signs = ("≥", "<") if claim["measure"] in SPEEDUPS else ("≤", ">")
    sign = signs[0] if claim["met"] else signs[1]
    words = f"{three(claim['measured'])} {sign} {claim['bound']:g}"
    return Text(words, style="" if claim["met"] else "bold red")


def _mebibytes(count: int | None) -> str:
    return "not here" if count is None else three(count / 2**20)


def three(value: float) -> str:
    """Return three significant digits, the whole ones always."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"
