"""The comparison's report as one picture; its title is its message."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.comparison.quantities import duration, size
from training.run.folder import write_whole

# Okabe and Ito's palette: told apart with every kind of colour vision. Every series also has a
# place of its own, so that none lies under another.
_COLOURS = {
    "builtin": "#555555",
    "jacobian": "#E69F00",
    "custom": "#0072B2",
    "custom-fused": "#009E73",
    "exact": "#CC79A7",
}


def save(report: dict[str, Any], path: Path) -> None:
    """Draw the report into a PNG."""
    figure = Figure(figsize=(10.4, 10))  # inches; a README shows it 830 pixels wide
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.06)
    panels: Any = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    top, bottom = panels
    _draw_curves(top, report)
    answers, same, time, memory = bottom.subplots(2, 2).flat
    _draw_answers(answers, report)
    _draw_roundings(same, report)
    _draw_times(time, report)
    _draw_memory(memory, report)
    settings, seeds = report["settings"], len(report["seeds"])
    below = (
        f"{settings['model']} on {settings['data']}, {seeds} seed{'s' * (seeds > 1)}, "
        f"{report['steps']} steps of {settings['batch_size']}, precision "
        f"{settings['precision']}, {report['environment']['device']}; every head from the same "
        "weights on the same batches"
    )
    title = "\n".join(textwrap.wrap(report["title"], 84))
    figure.suptitle(title, fontsize=15, fontweight="bold")
    figure.supxlabel("\n".join(textwrap.wrap(below, 110)), fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, dpi=120, format="png"))


def _draw_curves(panel: Any, report: dict[str, Any]) -> None:
    """A panel for each path, all with the same axes: the loss, over the seeds."""
    paths = list(report["not_finite"])
    panels = panel.subplots(1, len(paths), sharex=True, sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, paths, strict=True):
        curves = [_smooth(seed["series"]["loss"][name]) for seed in report["seeds"]]
        steps = range(len(curves[0]))
        lowest, middle, highest = zip(*map(_middle, zip(*curves, strict=True)), strict=True)
        axes.fill_between(steps, lowest, highest, color=_COLOURS[name], alpha=0.3, linewidth=0)
        axes.plot(steps, middle, color=_COLOURS[name], linewidth=1.3)
        yardstick = " (yardstick)" if name == report["yardstick"] else ""
        axes.set_title(name + yardstick, color=_COLOURS[name], fontweight="bold")
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        lost = report["not_finite"][name]["loss"]
        note = f"not finite at {lost}\nof {report['not_finite'][name]['steps']} steps" * bool(lost)
        axes.text(0.95, 0.92, note, transform=axes.transAxes, ha="right", va="top", color="red")
    panels[0].set_ylabel("training loss (nats), running mean")
    seeds = len(report["seeds"])
    of_seeds = f"; mean of {seeds} seeds, and from the lowest to the highest" * (seeds > 1)
    panel.supxlabel("step" + of_seeds, fontsize=10)


def _draw_answers(axes: Axes, report: dict[str, Any]) -> None:
    """The right answers of each seed: a group of marks side by side, one for each path."""
    right, seeds = report["answers"]["right"], [seed["seed"] for seed in report["seeds"]]
    offsets = _offsets(len(right))
    for offset, (name, counts) in zip(offsets, right.items(), strict=True):
        places = [i + offset for i in range(len(seeds))]
        axes.plot(places, counts, "o", color=_COLOURS[name], markersize=6, label=name)
    for i in range(len(seeds) - 1):
        axes.axvline(i + 0.5, color="#DDDDDD", linewidth=0.8)
    axes.set_xticks(range(len(seeds)), [str(seed) for seed in seeds])
    axes.set_xlim(-0.5, len(seeds) - 0.5)
    axes.margins(y=0.25)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    asked = f"{report['answers']['asked']} test {report['settings']['unit']}"
    axes.set_title(f"Right, of {asked}", fontsize=11)
    axes.set_xlabel("seed; the heads as above")


def _draw_roundings(axes: Axes, report: dict[str, Any]) -> None:
    """At every probe the largest difference of a gradient, in roundings: a row for each path."""
    names = list(report["differences"])
    for row, name in enumerate(names):
        found = _in_roundings(report, name)
        finite = [x for x in found if x is not None]
        heights = [row + offset for offset in _offsets(len(finite))]
        axes.plot(finite, heights, ".", color=_COLOURS[name], markersize=4)
        if len(finite) < len(found):
            note = f"not finite, {len(found) - len(finite)} of {len(found)}"
            axes.text(
                0.98, row, note, transform=axes.get_yaxis_transform(), ha="right", color="red"
            )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    furthest = axes.get_xlim()[1]
    axes.set_xlim(-0.03 * furthest, 1.05 * furthest)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title("Gradients at the same weights", fontsize=11)
    axes.set_xlabel(f"from builtin's, in roundings ({report['rounding']['dtype']})")


def _draw_times(axes: Axes, report: dict[str, Any]) -> None:
    marks = {}
    heads = report["heads"]
    unit, scale = ("ms", 1e-3) if max(h["head_us"] for h in heads.values()) > 1e3 else ("µs", 1)
    for row, (name, head) in enumerate(heads.items()):
        low, high = (scale * quartile for quartile in head["head_us_quartiles"])
        middle = scale * head["head_us"]
        axes.errorbar(
            [middle],
            [row],
            xerr=[[max(0.0, middle - low)], [max(0.0, high - middle)]],
            fmt="o",
            color=_COLOURS[name],
            capsize=4,
        )
        share = 1e-3 * head["head_us"] / head["step_ms"]
        marks[name] = (middle, f"{duration(1e-6 * head['head_us'])} ({share:.1%})")
    unit += "; median, quartiles (share of a step)"
    _finish_costs(axes, marks, unit, "Last layer and loss: time")


def _draw_memory(axes: Axes, report: dict[str, Any]) -> None:
    marks = {}
    peaks = {name: head["head_peak_bytes"] for name, head in report["heads"].items()}
    unit, scale = ("MiB", 2**20) if max(peaks.values()) >= 2**20 else ("KiB", 2**10)
    for row, (name, peak) in enumerate(peaks.items()):
        axes.plot([peak / scale], [row], "o", color=_COLOURS[name])
        marks[name] = (peak / scale, size(peak))
    _finish_costs(axes, marks, f"{unit}, at the peak", "Last layer and loss: memory")


def _finish_costs(axes: Axes, marks: dict[str, tuple[float, str]], unit: str, title: str) -> None:
    """Write beside each mark what it is, on the side that has room."""
    furthest = axes.get_xlim()[1]
    for row, (x, text) in enumerate(marks.values()):
        side = "left" if x < furthest / 2 else "right"
        shift = (-4 if side == "left" else 4, 9)
        axes.annotate(text, (x, row), xytext=shift, textcoords="offset points", ha=side, fontsize=9)
    axes.set_yticks(range(len(marks)), list(marks))
    axes.set_ylim(len(marks) - 0.5, -0.8)
    axes.set_xlim(0, 1.1 * axes.get_xlim()[1])
    axes.grid(axis="x", alpha=0.25)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(unit)


def _in_roundings(report: dict[str, Any], name: str) -> list[float | None]:
    """The largest over the parameters at each probe of each seed; None where one is not finite."""
    units = [report["rounding"]["eps"] * (size or 0.0) for size in report["gradient_size"]]
    found: list[float | None] = []
    for seed in report["seeds"]:
        for differences in zip(*seed["series"]["same_weights"][name]["gradients"], strict=True):
            pairs = zip(differences, units, strict=True)
            lost = None in differences
            found.append(None if lost else max((d / unit for d, unit in pairs if unit), default=0))
    return found


def _offsets(count: int) -> list[float]:
    """So many places, evenly from -0.3 to 0.3."""
    return [0.6 * (i + 0.5) / count - 0.3 for i in range(count)]


def _middle(values: tuple[float, ...]) -> tuple[float, float, float]:
    """The least, the mean and the largest, of those that are finite."""
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), fmean(finite), max(finite)) if finite else (math.nan,) * 3


def _smooth(values: list[float | None]) -> list[float]:
    """A running mean over a fiftieth of the run, with a gap where a value is not finite."""
    window = max(1, len(values) // 50)
    means = []
    for i, value in enumerate(values):
        near = [x for x in values[max(0, i - window + 1) : i + 1] if x is not None]
        means.append(math.nan if value is None else sum(near) / len(near))
    return means
