"""The comparison's report as tables in a terminal, 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from training.report import duration, size

WIDTH = 80

#: Parameters whose gradients are told apart here; of more the report has all.
FEW = 12


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report."""
    (console or Console(width=WIDTH, highlight=False)).print(Group(*_parts(report)))


def _parts(report: dict[str, Any]) -> Iterator[Table | Text]:
    yield _summary(report)
    if len(report["parameters"]) <= FEW:
        yield Text()
        yield _gradients(report)
    yield _reading(report)


def _summary(report: dict[str, Any]) -> Table:
    settings, heads, differences = report["settings"], report["heads"], report["differences"]
    table = Table(
        title=f"{settings['model']} on {settings['data']}: {report['steps']} steps of "
        f"{settings['batch_size']}, seed {settings['seed']}, precision {settings['precision']}, "
        f"{report['environment']['device']}",
        box=box.SIMPLE_HEAD,
        title_style="bold",
        width=WIDTH,
        padding=(0, 1),
    )
    table.add_column("", no_wrap=True)
    for name in heads:
        table.add_column(name, justify="right")

    def row(label: str, key: str, show: Any) -> None:
        table.add_row(label, *(show(head[key]) for head in heads.values()))

    def difference(label: str, where: str, largest: Any) -> None:
        others = (differences[name][where] for name in list(heads)[1:])
        table.add_row(label, "", *(_tiny(largest(other)) for other in others))

    row("test accuracy", "test_accuracy", lambda x: f"{100 * x:.2f} %")
    row("test loss", "test_loss", _plain)
    row("loss of the last step", "final_loss", _plain)
    row(f"{settings['unit']} a second", "per_second", lambda x: f"{x:.0f}")
    row("time a step, median", "step_ms", lambda x: duration(1e-3 * x))
    row("  layer and loss alone", "head_us", lambda x: duration(1e-6 * x))
    row("peak memory of a step", "peak_bytes", size)
    row("  layer and loss alone", "head_peak_bytes", size)
    table.add_section()
    table.add_row(Text("difference from builtin", style="italic"))
    difference("same weights: loss", "same_weights", lambda d: d["loss"])
    difference("same weights: gradients", "same_weights", lambda d: _largest(d["gradients"]))
    difference("own path: loss", "own_path", lambda d: d["loss"])
    difference("own path: gradients", "own_path", lambda d: _largest(d["gradients"]))
    return table


def _gradients(report: dict[str, Any]) -> Table:
    differences = report["differences"]
    table = Table(
        title="largest difference of each gradient from builtin's",
        box=box.SIMPLE_HEAD,
        title_style="bold",
        width=WIDTH,
        padding=(0, 1),
    )
    table.add_column("parameter")
    table.add_column("largest entry", justify="right")
    for name in differences:
        table.add_column(name, justify="right")
    for title, where in (("same weights", "same_weights"), ("own path", "own_path")):
        table.add_section()
        table.add_row(Text(title, style="italic"))
        for i, parameter in enumerate(report["parameters"]):
            cells = (_tiny(other[where]["gradients"][i]) for other in differences.values())
            table.add_row(f"  {parameter}", _tiny(report["gradient_size"][i]), *cells)
    return table


def _reading(report: dict[str, Any]) -> Text:
    probes = report["series"]["same_weights"]["steps"]
    return Text(
        f"same weights: at {len(probes)} of the steps every head got builtin's features and last "
        "layer, and sent its gradient through builtin's network: what the head itself changes. "
        "own path: each head trains its own copy; training amplifies the rounding of its last bit. "
        "layer and loss alone: the last layer and the loss, forward and backward.",
        style="dim",
    )


def _largest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _plain(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6f}"


def _tiny(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}" if value else "0"
