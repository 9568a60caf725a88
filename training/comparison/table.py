"""The comparison's report as tables in a terminal, 80 columns wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from training.comparison.quantities import duration, largest, plain, share, size

WIDTH = 80

#: Parameters whose gradients are told apart here; of more the report has all.
FEW = 12


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report."""
    (console or Console(width=WIDTH, highlight=False)).print(Group(*_parts(report)))


def _parts(report: dict[str, Any]) -> Iterator[Table | Text]:
    yield _answers(report)
    if report["answers"]["by_class"]:
        yield _classes(report)
    yield _costs(report)
    yield _differences(report)
    if len(report["parameters"]) <= FEW:
        yield _gradients(report)
    yield _reading(report)
    yield Text()
    yield Text(report["sentence"], style="bold")


def _answers(report: dict[str, Any]) -> Table:
    answers, settings = report["answers"], report["settings"]
    paths = _paths(report)
    table = _table(
        f"{settings['model']} on {settings['data']}: {report['steps']} steps of "
        f"{settings['batch_size']}, precision {settings['precision']}, "
        f"{report['environment']['device']}",
        f"right, of {answers['asked']} {settings['unit']}",
        paths,
    )
    for i, seed in enumerate(report["seeds"]):
        table.add_row(f"  seed {seed['seed']}", *(str(answers["right"][name][i]) for name in paths))
    seeds = len(report["seeds"])
    if seeds > 1:
        spreads = (answers["spread"][name] for name in paths)
        table.add_row("  spread between seeds", *(f"{spread:.1f}" for spread in spreads))
        means = (sum(answers["right"][name]) / seeds / answers["asked"] for name in paths)
        table.add_row("test accuracy, mean", *map(share, means))
    else:
        rights = (answers["right"][name][0] / answers["asked"] for name in paths)
        table.add_row("test accuracy", *map(share, rights))
    heads = report["heads"]
    row = _rower(table, [heads.get(name) for name in paths])
    row("test loss", lambda head: plain(head["test_loss"]))
    row("loss of the last step", lambda head: plain(head["final_loss"]))

    table.add_section()
    pairs = [answers["beside_first"].get(name) for name in paths]
    row = _rower(table, pairs)
    over = f", of {answers['asked'] * seeds}"
    table.add_row(Text(f"beside {paths[0]}{over}", style="italic"))
    row("  other answer", lambda pair: str(sum(pair["differ"])))
    row("  right where it is wrong", lambda pair: str(sum(pair["gained"])))
    row("  wrong where it is right", lambda pair: str(sum(pair["lost"])))
    row("  difference, points", lambda pair: _points(pair["difference"]))
    if all(pair is None or pair["p"] is not None for pair in pairs):
        table.add_row(Text("these networks: McNemar's test", style="italic"))
        row("  p, exact", lambda pair: f"{pair['p']:.2g}")
        row("  at least 95 %, from", lambda pair: _points(pair["interval"][0]))
        row("  to", lambda pair: _points(pair["interval"][1]))
    if seeds > 1:
        table.add_row(Text("other seeds: Student's test", style="italic"))
        row("  spread between seeds", lambda pair: f"{100 * pair['spread']:.2f}")
        row("  p", lambda pair: f"{pair['over_seeds']['p']:.2g}")
        row("  95 %, from", lambda pair: _points(pair["over_seeds"]["interval"][0]))
        row("  to", lambda pair: _points(pair["over_seeds"]["interval"][1]))
    return table


def _classes(report: dict[str, Any]) -> Table:
    by_class = report["answers"]["by_class"]
    paths = _paths(report)
    table = _table("accuracy by class", "class, and its test set", paths)
    for c, of_class in by_class[paths[0]].items():
        shares = (share(by_class[name][c]["accuracy"]) for name in paths)
        table.add_row(f"  {c}, {of_class['targets']} {report['settings']['unit']}", *shares)
    return table


def _costs(report: dict[str, Any]) -> Table:
    heads, unit = report["heads"], report["settings"]["unit"]
    table = _table("time and memory", "median, and quartiles", list(heads))
    row = _rower(table, list(heads.values()))
    row(f"{unit} a second", lambda head: f"{head['per_second']:.0f}")
    row("time of a step", lambda head: duration(1e-3 * head["step_ms"]))
    row("  a quarter is below", lambda head: duration(1e-3 * head["step_ms_quartiles"][0]))
    row("  a quarter is above", lambda head: duration(1e-3 * head["step_ms_quartiles"][1]))
    row("last layer and loss alone", lambda head: duration(1e-6 * head["head_us"]))
    row("  a quarter is below", lambda head: duration(1e-6 * head["head_us_quartiles"][0]))
    row("  a quarter is above", lambda head: duration(1e-6 * head["head_us_quartiles"][1]))
    row("peak memory of a step", lambda head: size(head["peak_bytes"]))
    row("  last layer and loss alone", lambda head: size(head["head_peak_bytes"]))
    return table


def _differences(report: dict[str, Any]) -> Table:
    paths, differences = _paths(report), report["differences"]
    table = _table(f"largest difference from {paths[0]}", "in all seeds and steps", paths)
    for title, where in (("same weights", "same_weights"), ("own path", "own_path")):
        table.add_row(Text(title, style="italic"))
        row = _rower(table, [None, *(differences[name][where] for name in paths[1:])])
        row("  loss", lambda d: largest(d["loss"], d["loss_not_finite"], d["places"]))
        row(
            "  any gradient",
            lambda d: largest(_worst(d["gradients"]), d["gradients_not_finite"], d["places"]),
        )
        row("  the same in roundings", _roundings)
    table.add_row(Text("of its own not finite", style="italic"))
    row = _rower(table, [report["not_finite"][name] for name in paths])
    row("  probes", lambda n: _counted(n["probe_loss"], n["probe_gradients"], n["probes"]))
    row("  steps", lambda n: _counted(n["loss"], n["gradients"], n["steps"]))
    return table


def _gradients(report: dict[str, Any]) -> Table:
    differences = report["differences"]
    table = _table(
        f"largest difference of each gradient from {_paths(report)[0]}'s",
        "parameter",
        ["largest entry", *differences],
    )
    for title, where in (("same weights", "same_weights"), ("own path", "own_path")):
        table.add_row(Text(title, style="italic"))
        for i, parameter in enumerate(report["parameters"]):
            found = (other[where]["gradients"][i] for other in differences.values())
            cells = [report["gradient_size"][i], *found]
            table.add_row(f"  {parameter}", *map(_tiny, cells))
    return table


def _reading(report: dict[str, Any]) -> Text:
    probes = sum(len(seed["series"]["same_weights"]["steps"]) for seed in report["seeds"])
    first, dtype = _paths(report)[0], report["rounding"]["dtype"]
    exact = (
        f"{report['yardstick']}: {first}'s answer in float64, rounded once; the yardstick. "
        if report["yardstick"]
        else ""
    )
    return Text(
        f"same weights: at {probes} steps every head got {first}'s features and last layer, and "
        f"sent its gradient through {first}'s network: what the head itself changes. own path: "
        "each head trains its own copy; training amplifies the rounding of its last bit. in "
        f"roundings: over {dtype}'s epsilon times the largest entry of that parameter's gradient "
        "in the run. "
        f"{exact}last layer and loss alone: forward and backward. spread: standard deviation. "
        "points: of a hundred.",
        style="dim",
    )


def _table(title: str, corner: str, columns: list[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", width=WIDTH, padding=0)
    table.add_column(corner, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _rower(table: Table, cells: list[Any]) -> Callable[[str, Callable[[Any], str]], None]:
    """Return a function that adds a row: a cell for each, empty where there is None."""

    def row(label: str, show: Callable[[Any], str]) -> None:
        table.add_row(label, *("" if cell is None else show(cell) for cell in cells))

    return row


def _paths(report: dict[str, Any]) -> list[str]:
    return list(report["not_finite"])


def _counted(losses: int, gradients: int, places: int) -> str:
    return f"{max(losses, gradients)} of {places}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f}"


def _roundings(found: dict[str, Any]) -> str:
    if found["gradients_not_finite"] or found["roundings"] is None:
        return "not finite"
    return f"{found['roundings']:.1f}" if found["roundings"] < 1e4 else f"{found['roundings']:.0e}"


def _worst(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _tiny(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}" if value else "0"
