"""The report as one picture: every time over that of a copy, and the cost of an element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.contestants import BUILTIN, COMPILED, COPY, IN_PLACE, OURS

# Okabe and Ito's palette: told apart with every kind of colour vision. The markers repeat what the
# colours say.
_LOOKS = {
    BUILTIN: ("#000000", "o"),
    COMPILED: ("#E69F00", "s"),
    OURS: ("#0072B2", "D"),
    IN_PLACE: ("#009E73", "<"),
}
_FLOOR = "0.5"


def save(report: dict[str, Any], path: Path) -> None:
    """Draw the report's times into a PNG."""
    rows, curve = report["rows"], report["curve"]
    panels = [
        (draw, entries) for draw, entries in ((_draw_rows, rows), (_draw_curve, curve)) if entries
    ]
    figure = Figure(
        figsize=(7 * len(panels), 2.6 + 0.26 * max(len(rows), 10)), layout="constrained"
    )
    for place, (draw, entries) in enumerate(panels, 1):
        draw(figure.add_subplot(1, len(panels), place), entries)
    labels: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(
        labels.values(), labels, loc="outside lower center", ncols=len(labels), frameon=False
    )
    e = report["environment"]
    figure.suptitle(
        f"Forward + backward: {e['machine']}, {e['threads']} threads, {e['vectors']}, "
        f"torch {e['torch']}, {e['date'][:10]}",
        fontsize=11,
    )
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=130, format="png")
    part.replace(path)


def _draw_rows(axes: Axes, rows: list[dict[str, Any]]) -> None:
    places = range(len(rows))
    for place, row in zip(places, rows, strict=True):
        ratios = [row["ratios"][name]["copies"] for name in _LOOKS if name in row["ratios"]]
        axes.plot([min(ratios), max(ratios)], [place, place], color="0.85", zorder=1)
    sizes = (64, 50, 36, 24)  # the later ones smaller: equal times leave the earlier visible
    for (name, (colour, marker)), size in zip(_LOOKS.items(), sizes, strict=True):
        there = [place for place in places if name in rows[place]["ratios"]]
        times = [rows[place]["ratios"][name]["copies"] for place in there]
        axes.scatter(times, there, color=colour, marker=marker, s=size, label=name, zorder=2)
    axes.axvline(1, color=_FLOOR, linestyle=":", label=COPY)
    axes.set_xscale("log")
    axes.set_yticks(places, [row["name"] for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(_PLAIN)
    axes.grid(axis="x", alpha=0.3)
    axes.set(title="Time over the floor", xlabel="time, in copies of the logits")


def _draw_curve(axes: Axes, points: list[dict[str, Any]]) -> None:
    classes = [point["classes"] for point in points]
    for name, (colour, marker) in {COPY: (_FLOOR, "."), **_LOOKS}.items():
        if all(name in point["nanoseconds"] for point in points):
            times = [point["nanoseconds"][name] for point in points]
            style = ":" if name == COPY else "-"
            axes.plot(classes, times, color=colour, marker=marker, linestyle=style, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_PLAIN)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(_PLAIN)
    axes.grid(alpha=0.3)
    axes.set(
        title=f"cross_entropy, float32, about {points[0]['elements']:,} logits",
        xlabel="classes",
        ylabel="nanoseconds a logit",
    )


_PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")
