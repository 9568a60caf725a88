"""The report as pictures of README width: large logits, small ones, and the cost of a logit.

Each says its message in its title. Every mark has a lane of its own, so that none hides another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.contestants import BUILTIN, COMPILED, COPY, IN_PLACE, OURS
from benchmarks.plan import KEPT_HEAP

# Okabe and Ito's palette: told apart with every kind of colour vision. The markers repeat what the
# colours say.
_LOOKS = {
    BUILTIN: ("#000000", "o"),
    COMPILED: ("#E69F00", "s"),
    OURS: ("#0072B2", "D"),
    IN_PLACE: ("#009E73", "<"),
}
_NAMES = {
    BUILTIN: "torch",
    COMPILED: "torch, compiled",
    OURS: "ours",
    IN_PLACE: "ours, inplace_backward=True",
}
_FLOOR = "0.5"
_WIDTH = 8.3  # inches: 830 pixels in a README
_DRAW = 0.03  # a ratio nearer to 1 is no difference


def save(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the report has into PNGs in a folder, and return them."""
    return [_write(figure, folder / f"benchmark-{name}.png") for name, figure in figures(report)]


def figures(report: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Yield the pictures that the report has numbers for, by name."""
    kept = {row["name"]: row for row in report.get(KEPT_HEAP, ())}
    for name, one_call in (("large", True), ("small", False)):
        rows = [row for row in report["rows"] if (row["calls"] == 1) == one_call]
        if rows:
            yield name, _speedups(name, rows, kept, report["environment"])
    if report["curve"]:
        yield "curve", _cost_of_a_logit(report["curve"], report["environment"])


def _write(figure: Figure, path: Path) -> Path:
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=130, format="png")
    return part.replace(path)


def _new(height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure, figure.add_subplot()


def _label(axes: Axes, label: str, environment: dict[str, Any]) -> None:
    """Write what the axis is, and below it where the numbers come from."""
    e = environment
    where = f"{e['machine']}, {e['threads']} threads, torch {e['torch']}, {e['date'][:10]}"
    axes.set_xlabel(f"{label}\n{where}", fontsize=8.5)


def _speedups(
    size: str, rows: list[dict[str, Any]], kept: dict[str, Any], environment: dict[str, Any]
) -> Figure:
    """How many times as fast as torch's function, a lane for each contestant."""
    found = [row["ratios"][OURS]["over builtin"] for row in rows]
    title = f"{size.capitalize()} logits on the CPU: {_range(found)}"
    names = [n for n in _LOOKS if n != BUILTIN and any(n in row["ratios"] for row in rows)]
    figure, axes = _new(1.5 + 0.44 * len(rows), title)
    hollow = False
    for lane, name in enumerate(names):
        colour, marker = _LOOKS[name]
        offset = 0.75 * (lane + 0.5) / len(names) - 0.375
        for place, row in enumerate(rows):
            if name not in row["ratios"]:
                continue
            at, ratio = place + offset, row["ratios"][name]["over builtin"]
            axes.plot([1, ratio], [at, at], color=colour, linewidth=1.2, zorder=1)
            axes.plot(ratio, at, marker, color=colour, markersize=5, zorder=3)
            if name != COMPILED:
                _beside(axes, ratio, at, colour)
            again = kept.get(row["name"], {}).get("ratios", {}).get(name)
            if again:
                hollow = True
                axes.plot(
                    again["over builtin"],
                    at,
                    marker,
                    color=colour,
                    mfc="white",
                    markersize=8,
                    zorder=2,
                )
        axes.plot([], [], marker, color=colour, label=_NAMES[name])
    if hollow:
        axes.plot([], [], "D", color="0.4", mfc="white", label="on a heap that keeps its memory")
    axes.axvline(1, color=_LOOKS[BUILTIN][0], linewidth=1)
    _finish_speedups(axes, rows)
    _label(axes, "forward + backward: times as fast as torch's own function", environment)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return figure


def _beside(axes: Axes, ratio: float, at: float, colour: str) -> None:
    """Write the ratio at the free end of its line."""
    side, shift = ("left", 7) if ratio >= 1 else ("right", -7)
    text = f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"
    axes.annotate(
        text,
        (ratio, at),
        xytext=(shift, 0),
        textcoords="offset points",
        ha=side,
        va="center",
        fontsize=8,
        color=colour,
    )


def _finish_speedups(axes: Axes, rows: list[dict[str, Any]]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_TIMES)
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.1, high * 1.25)
    axes.set_yticks(
        range(len(rows)), [f"{row['op']} {_readable(row['size'])}" for row in rows], fontsize=9
    )
    for place in range(1, len(rows)):
        axes.axhline(place - 0.5, color="0.93", linewidth=0.8, zorder=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def _cost_of_a_logit(points: list[dict[str, Any]], environment: dict[str, Any]) -> Figure:
    each = [point["nanoseconds"] for point in points]
    ours = [found[BUILTIN] / found[OURS] for found in each]
    classes = f"{points[0]['classes']:,} to {points[-1]['classes']:,} classes"
    title = f"Cross-entropy of {classes}: {_range(ours)}"
    figure, axes = _new(4.4, title)
    counts = [point["classes"] for point in points]
    names = {COPY: "a copy of the logits", **_NAMES}
    for name, (colour, marker) in {COPY: (_FLOOR, "."), **_LOOKS}.items():
        if all(name in found for found in each):
            style = ":" if name == COPY else "-"
            times = [found[name] for found in each]
            axes.plot(counts, times, style, color=colour, marker=marker, label=names[name])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_PLAIN)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(_PLAIN)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    _label(axes, f"classes, of about {points[0]['elements']:,} logits", environment)
    axes.set_ylabel("nanoseconds a logit, forward + backward", fontsize=9)
    return figure


def _range(ratios: list[float]) -> str:
    """Say how fast that is: "1.6 to 11 times as fast as torch's"."""
    low, high = (f"{r:.2g}" if r < 10 else f"{r:.0f}" for r in (min(ratios), max(ratios)))
    if abs(min(ratios) - 1) < _DRAW:
        return f"as fast as torch's, up to {high} times"
    return f"{low} to {high} times as fast as torch's"


def _readable(size: str) -> str:
    return size.replace("x", " × ").replace(" float32", "")


_PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")
_TIMES = FuncFormatter(lambda value, _: f"{value:g}×")
