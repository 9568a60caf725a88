"""The comparison's report as one picture: same losses, how nearly the same, and the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every kind of colour vision. The line styles repeat what
# the colours say.
_COLOURS = ("#000000", "#E69F00", "#0072B2")
_STYLES = ("-", "--", ":")


def save(report: dict[str, Any], path: Path) -> None:
    """Draw the report into a PNG."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    losses, differences, times = figure.subplots(1, 3, width_ratios=(1, 1.15, 0.8))
    _draw_losses(losses, report)
    _draw_differences(differences, report)
    _draw_times(times, report)
    settings = report["settings"]
    figure.suptitle(
        f"{settings['model']} on {settings['data']}, batches of {settings['batch_size']}, "
        f"precision {settings['precision']}, {report['environment']['device']}: "
        "the same weights, the same batches, three losses",
        fontsize=11,
    )
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=150, format="png")
    part.replace(path)


def _draw_losses(axes: Axes, report: dict[str, Any]) -> None:
    # Widest line first, so that those on top of it leave it visible.
    widths = (4.0, 2.2, 1.6)
    for (name, loss), colour, style, width in zip(
        report["series"]["loss"].items(), ("#BBBBBB", *_COLOURS[1:]), _STYLES, widths, strict=False
    ):
        accuracy = report["heads"][name]["test_accuracy"]
        label = f"{name}: {100 * accuracy:.2f} % right"
        axes.plot(_smooth(loss), color=colour, linestyle=style, linewidth=width, label=label)
    axes.set(title="Loss", xlabel="step", ylabel="cross-entropy (nats), running mean")
    axes.set_yscale("log")
    axes.legend(title="head: test images", fontsize=9, title_fontsize=9)


def _draw_differences(axes: Axes, report: dict[str, Any]) -> None:
    series = report["series"]
    probes = series["same_weights"]["steps"]
    floor = 1e-12
    for name, colour in zip(series["own_path"], _COLOURS[1:], strict=False):
        own = _largest_each(series["own_path"][name]["gradients"])
        same = _largest_each(series["same_weights"][name]["gradients"])
        axes.plot(
            [max(x, floor) for x in own], color=colour, linewidth=0.8, label=f"{name}, own path"
        )
        axes.plot(
            probes,
            [max(x, floor) for x in same],
            color=colour,
            linestyle="none",
            marker="o" if colour == _COLOURS[1] else "x",
            markersize=3.5,
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
    axes.legend(fontsize=8, ncols=2, loc="upper center")
    axes.grid(axis="y", alpha=0.3)


def _draw_times(axes: Axes, report: dict[str, Any]) -> None:
    heads = report["heads"]
    times = [head["step_ms"] for head in heads.values()]
    bars = axes.bar(list(heads), times, color=("#BBBBBB", *_COLOURS[1:]), width=0.6)
    labels = [f"{h['step_ms']:.2f} ms\nloss {h['loss_us']:.0f} µs" for h in heads.values()]
    axes.bar_label(bars, labels, padding=3, fontsize=9)
    axes.set_ylim(0, 1.25 * max(times))
    axes.set(title="Time a step, and its loss alone", ylabel="milliseconds (median)")


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
