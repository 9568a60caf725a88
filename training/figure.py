"""The comparison's report as one picture: same losses, how nearly the same, time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.report import duration, size

# Okabe and Ito's palette: told apart with every kind of colour vision. The line styles repeat what
# the colours say.
_COLOURS = {
    "builtin": "#BBBBBB",
    "jacobian": "#E69F00",
    "custom": "#0072B2",
    "custom-fused": "#009E73",
}
_STYLES = {"builtin": "-", "jacobian": "--", "custom": ":", "custom-fused": "-."}
_WIDTHS = {"builtin": 4.0, "jacobian": 2.2, "custom": 1.6, "custom-fused": 1.0}
_MARKERS = {"jacobian": "o", "custom": "x", "custom-fused": "+"}


def save(report: dict[str, Any], path: Path) -> None:
    """Draw the report into a PNG."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    (losses, differences), (times, memory) = figure.subplots(2, 2, height_ratios=(1.3, 1))
    _draw_losses(losses, report)
    _draw_differences(differences, report)
    _draw_times(times, report)
    _draw_memory(memory, report)
    settings = report["settings"]
    figure.suptitle(
        f"{settings['model']} on {settings['data']}, batches of {settings['batch_size']}, "
        f"precision {settings['precision']}, {report['environment']['device']}: "
        f"the same weights, the same batches, {len(report['heads'])} heads",
        fontsize=11,
    )
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=150, format="png")
    part.replace(path)


def _draw_losses(axes: Axes, report: dict[str, Any]) -> None:
    for name, loss in report["series"]["loss"].items():
        head = report["heads"][name]
        axes.plot(
            _smooth(loss),
            color=_COLOURS[name],
            linestyle=_STYLES[name],
            linewidth=_WIDTHS[name],  # the widest first: those on top of it leave it visible
            label=f"{name}: {100 * head['test_accuracy']:.2f} % right",
        )
    axes.set(title="Loss", xlabel="step", ylabel="cross-entropy (nats), running mean")
    axes.set_yscale("log")
    axes.legend(title="head: test set", fontsize=9, title_fontsize=9)


def _draw_differences(axes: Axes, report: dict[str, Any]) -> None:
    series = report["series"]
    probes = series["same_weights"]["steps"]
    floor = 1e-12
    for name in series["own_path"]:
        own = _largest_each(series["own_path"][name]["gradients"])
        same = _largest_each(series["same_weights"][name]["gradients"])
        axes.plot(
            [max(x, floor) for x in own],
            color=_COLOURS[name],
            linewidth=_WIDTHS[name] / 1.5,
            label=f"{name}, own path",
        )
        axes.plot(
            probes,
            [max(x, floor) for x in same],
            color=_COLOURS[name],
            linestyle="none",
            marker=_MARKERS[name],
            markersize=4,
            label=f"{name}, same weights",
        )
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 30)  # room for the legend
    axes.set(
        title="Largest difference of any gradient from builtin's",
        xlabel="step",
        ylabel="largest |difference| (gradient's unit)",
    )
    axes.legend(fontsize=7.5, ncols=len(series["own_path"]), loc="upper center")
    axes.grid(axis="y", alpha=0.3)


def _draw_times(axes: Axes, report: dict[str, Any]) -> None:
    heads = report["heads"]
    _draw_bars(
        axes,
        {name: head["step_ms"] for name, head in heads.items()},
        [
            f"{duration(1e-3 * h['step_ms'])}\n{duration(1e-6 * h['head_us'])}"
            for h in heads.values()
        ],
    )
    axes.set(title="Time of a step; last layer and loss alone", ylabel="milliseconds (median)")


def _draw_memory(axes: Axes, report: dict[str, Any]) -> None:
    heads = report["heads"]
    _draw_bars(
        axes,
        {name: head["peak_bytes"] / 2**20 for name, head in heads.items()},
        [f"{size(h['peak_bytes'])}\n{size(h['head_peak_bytes'])}" for h in heads.values()],
    )
    axes.set(title="Peak memory of a step; last layer and loss alone", ylabel="MiB")


def _draw_bars(axes: Axes, heights: dict[str, float], labels: list[str]) -> None:
    colours = [_COLOURS[name] for name in heights]
    bars = axes.bar(list(heights), list(heights.values()), color=colours, width=0.6)
    axes.bar_label(bars, labels, padding=3, fontsize=9)
    axes.set_ylim(0, 1.3 * max(heights.values()))


def _smooth(values: list[float | None]) -> list[float]:
    """A running mean over a fiftieth of the run: the noise of single batches hides nothing else."""
    window = max(1, len(values) // 50)
    finite = [value for value in values if value is not None]
    return [
        sum(finite[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(finite))
    ]


def _largest_each(parameters: list[list[float | None]]) -> list[float]:
    """Parameters of steps to the largest of each step; 0 where none is finite."""
    steps = zip(*parameters, strict=True)
    return [max((x for x in step if x is not None), default=0.0) for step in steps]
