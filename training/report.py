"""The comparison's report: every number that the table, the picture and the JSON file show."""

from __future__ import annotations

import math
import platform
from statistics import median
from typing import Any

import torch

from training.driver import driver_version
from training.record import Record

#: Steps of each process that no timing counts: caches, thread pools and clocks settle.
WARM_UP = 10


def build(
    record: Record,
    metrics: dict[str, float],
    costs: dict[str, dict[str, float]],
    parameter_names: list[str],
    settings: dict[str, Any],
    targets: int,
    device: torch.device,
) -> dict[str, Any]:
    """Return the report, plain numbers and strings, as it is written to `report.json`.

    Args:
        record: the series of the run.
        metrics: `test_accuracy/<head>` and `test_loss/<head>`.
        costs: per head, what was measured apart from the training: entries of the report.
        parameter_names: in the order of the record's gradients.
        settings: what the run was asked for.
        targets: of a whole batch.
        device: where it ran.
    """
    heads = list(record.loss)
    return {
        "steps": record.steps,
        "settings": settings,
        "environment": _environment(device),
        "parameters": parameter_names,
        "gradient_size": _largest_each(record.gradient_size),
        "heads": {
            name: {
                "test_accuracy": metrics[f"test_accuracy/{name}"],
                "test_loss": _number(metrics[f"test_loss/{name}"]),
                "final_loss": _number(record.loss[name][-1]),
                "step_ms": 1e3 * median(timed_steps(record, name)),
                "per_second": targets / median(timed_steps(record, name)),
                **costs[name],
            }
            for name in heads
        },
        "differences": {name: _differences(record, name) for name in heads[1:]},
        "series": {
            "loss": {name: _numbers(record.loss[name]) for name in heads},
            "step_ms": {name: [1e3 * s for s in record.seconds[name]] for name in heads},
            "own_path": {
                name: {
                    "loss": _numbers(_loss_difference(record, name)),
                    "gradients": _per_parameter(record.gradient_difference[name]),
                }
                for name in heads[1:]
            },
            "same_weights": {
                "steps": record.probes,
                **{
                    name: {
                        "loss": _numbers(record.probe_loss_difference[name]),
                        "gradients": _per_parameter(record.probe_gradient_difference[name]),
                    }
                    for name in heads[1:]
                },
            },
            "starts": record.starts,
        },
    }


def duration(seconds: float) -> str:
    """Return a time in words.

    >>> duration(0.01234), duration(0.0001234)
    ('12.34 ms', '123 µs')
    """
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} µs"


def size(bytes: float) -> str:
    """Return an amount of memory in words.

    >>> size(3 << 20), size(1536)
    ('3.00 MiB', '1.5 KiB')
    """
    return f"{bytes / 2**20:.2f} MiB" if bytes >= 2**20 else f"{bytes / 2**10:.1f} KiB"


def timed_steps(record: Record, head: str) -> list[float]:
    """Return the seconds of the steps that count: none that follows a start too closely.

    >>> record = Record(["builtin"])
    >>> record.starts, record.seconds["builtin"] = [0], [9.0] * WARM_UP + [1.0, 2.0]
    >>> timed_steps(record, "builtin")
    [1.0, 2.0]
    """
    seconds = record.seconds[head]
    cold = {step for start in record.starts for step in range(start, start + WARM_UP)}
    warm = [s for step, s in enumerate(seconds) if step not in cold]
    return warm or seconds  # a run too short to settle: what there is


def _differences(record: Record, head: str) -> dict[str, Any]:
    """The largest over the steps, of the loss and of each parameter's gradient."""
    return {
        "own_path": {
            "loss": _largest(_loss_difference(record, head)),
            "gradients": _largest_each(record.gradient_difference[head]),
        },
        "same_weights": {
            "loss": _largest(record.probe_loss_difference[head]),
            "gradients": _largest_each(record.probe_gradient_difference[head]),
        },
    }


def _loss_difference(record: Record, head: str) -> list[float]:
    first = next(iter(record.loss.values()))
    return [abs(a - b) for a, b in zip(record.loss[head], first, strict=True)]


def _per_parameter(rows: list[list[float]]) -> list[list[float | None]]:
    """Steps of parameters to parameters of steps."""
    return [_numbers(list(series)) for series in zip(*rows, strict=True)]


def _largest_each(rows: list[list[float]]) -> list[float | None]:
    return [_largest(list(series)) for series in zip(*rows, strict=True)]


def _largest(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return max(finite) if finite else None


def _numbers(values: list[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    """JSON has no infinity and no NaN; float16's overflowing steps do."""
    return value if math.isfinite(value) else None


def _environment(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **({"cuda": torch.version.cuda, "driver": driver_version()} if cuda else {}),
        "memory": "torch.cuda.max_memory_allocated" if cuda else "torch.profiler, CPU allocator",
    }
