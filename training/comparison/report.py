"""The comparison's report: every number that the table, the picture and the JSON file show."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, median, quantiles
from typing import Any

import torch

from training.comparison import answers, sentence
from training.comparison.outcome import Outcome
from training.comparison.record import Record
from training.driver import driver_version

#: Steps of each process that no timing counts: caches, thread pools and clocks settle.
WARM_UP = 10

#: Of more classes the report gives no accuracy one by one.
MANY_CLASSES = 20

#: By `--precision`: what the step computes in.
DTYPES = {
    "32": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "64": torch.float64,
}


@dataclass(frozen=True)
class Questions:
    """What was compared, and on what.

    Attributes:
        heads: the names; the others are compared with the first.
        parameters: the names, in the order of the records' gradients.
        settings: what the run was asked for.
        unit: what a target belongs to, in the plural.
        independent: whether one target's answer says nothing about another's.
        targets: of a whole batch.
        device: where it ran.
    """

    heads: list[str]
    parameters: list[str]
    settings: dict[str, Any]
    unit: str
    independent: bool
    targets: int
    device: torch.device


def build(outcomes: Sequence[Outcome], questions: Questions) -> dict[str, Any]:
    """Return the report, plain numbers and strings, as it is written to `report.json`."""
    dtype = DTYPES[questions.settings["precision"]]
    eps = torch.finfo(dtype).eps
    paths = list(outcomes[0].predictions)
    records = [outcome.record for outcome in outcomes]
    sizes = [
        _largest(step[paths[0]][i] for record in records for step in record.gradients)
        for i in range(len(questions.parameters))
    ]
    units = [eps * size if math.isfinite(size) else 0.0 for size in sizes]
    content: dict[str, Any] = {
        "steps": records[0].steps,
        "settings": questions.settings | {"unit": questions.unit},
        "environment": _environment(questions.device),
        "parameters": questions.parameters,
        "rounding": {"dtype": str(dtype).removeprefix("torch."), "eps": eps},
        "heads": {name: _head(outcomes, name, questions) for name in questions.heads},
        "yardstick": next((name for name in paths if name not in questions.heads), None),
        "answers": _answers(outcomes, questions, paths),
        "differences": {name: _differences(records, paths[0], name, units) for name in paths[1:]},
        "gradient_size": _numbers(sizes),
        "not_finite": {name: _not_finite(records, name) for name in paths},
        "seeds": [_seed(outcome, paths) for outcome in outcomes],
    }
    return content | {"title": sentence.title(content), "sentence": sentence.sentence(content)}


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


def _head(outcomes: Sequence[Outcome], name: str, questions: Questions) -> dict[str, Any]:
    steps = [s for outcome in outcomes for s in timed_steps(outcome.record, name)]
    alone = [s for outcome in outcomes for s in outcome.costs[name].seconds]
    right = [answers.right(o.predictions[name], o.targets) for o in outcomes]
    return {
        "test_accuracy": mean(right) / len(outcomes[0].targets),
        "test_loss": _number(mean(outcome.losses[name] for outcome in outcomes)),
        "final_loss": _number(mean(outcome.record.loss[name][-1] for outcome in outcomes)),
        "step_ms": 1e3 * median(steps),
        "step_ms_quartiles": [1e3 * s for s in _quartiles(steps)],
        "per_second": questions.targets / median(steps),
        "head_us": 1e6 * median(alone),
        "head_us_quartiles": [1e6 * s for s in _quartiles(alone)],
        "head_peak_bytes": max(outcome.costs[name].head_peak_bytes for outcome in outcomes),
        "peak_bytes": max(outcome.costs[name].peak_bytes for outcome in outcomes),
    }


def _answers(outcomes: Sequence[Outcome], questions: Questions, paths: list[str]) -> dict[str, Any]:
    """Right answers a seed, the pairs' disagreements with a test, and accuracy by class."""
    targets = outcomes[0].targets
    given = {name: [outcome.predictions[name] for outcome in outcomes] for name in paths}
    right = {name: [answers.right(a, targets) for a in given[name]] for name in paths}
    few = len(set(targets)) <= MANY_CLASSES
    return {
        "asked": len(targets),
        "right": right,
        "spread": {name: answers.spread(right[name]) for name in paths},
        "beside_first": {
            name: _pair(answers.pair(given[name], given[paths[0]], targets), questions.independent)
            for name in paths[1:]
        },
        "disagree": {
            f"{one} | {other}": answers.pair(given[one], given[other], targets).differ
            for one, other in combinations(paths, 2)
        },
        "by_class": {
            name: {
                str(c): {"accuracy": share, "targets": count}
                for c, (share, count) in answers.by_class(given[name], targets).items()
            }
            for name in paths
            if few
        },
    }


def _pair(pair: answers.Pair, independent: bool) -> dict[str, Any]:
    over_seeds = pair.over_seeds
    return {
        "differ": pair.differ,
        "gained": pair.gained,
        "lost": pair.lost,
        "difference": pair.difference,
        "spread": pair.spread,
        # Tokens of one sequence depend on each other: a test that denies it would claim too much.
        "p": pair.p if independent else None,
        "interval": list(pair.interval) if independent else None,
        "over_seeds": over_seeds and {"p": over_seeds[0], "interval": list(over_seeds[1])},
    }


def _differences(
    records: Sequence[Record], first: str, name: str, units: list[float]
) -> dict[str, dict[str, Any]]:
    """The largest from the first path, over the steps: of the loss, and of each gradient."""
    own = [
        (
            abs(record.loss[name][i] - record.loss[first][i]),
            record.gradient_differences[i][name],
        )
        for record in records
        for i in range(record.steps)
    ]
    same = [
        (abs(losses[name] - losses[first]), differences[name])
        for record in records
        for losses, differences in zip(record.probe_losses, record.probe_differences, strict=True)
    ]
    return {"own_path": _found(own, units), "same_weights": _found(same, units)}


def _found(seen: list[tuple[float, list[float]]], units: list[float]) -> dict[str, Any]:
    """Return the largest of the finite differences, beside the count of the others.

    Args:
        seen: at each place, the difference of the loss, and of each parameter's gradient.
        units: of each parameter, the rounding of its gradient's largest entry in the run.
    """
    losses = [loss for loss, _ in seen]
    gradients = [differences for _, differences in seen]
    largest = [_largest(series) for series in zip(*gradients, strict=True)]
    roundings = (size / unit for size, unit in zip(largest, units, strict=True) if unit)
    return {
        "places": len(seen),
        "loss": _number(_largest(losses)),
        "loss_not_finite": _count_not_finite(losses),
        "gradients": _numbers(largest),
        "gradients_not_finite": _count_not_finite(map(_worst, gradients)),
        "roundings": _number(_largest(roundings)),
    }


def _not_finite(records: Sequence[Record], name: str) -> dict[str, int]:
    """At how many steps and probes a path's own loss or gradients were not finite."""
    return {
        "steps": sum(record.steps for record in records),
        "loss": sum(_count_not_finite(record.loss[name]) for record in records),
        "gradients": sum(
            _count_not_finite(_worst(sizes[name]) for sizes in record.gradients)
            for record in records
        ),
        "probes": sum(len(record.probes) for record in records),
        "probe_loss": sum(
            _count_not_finite(losses[name] for losses in record.probe_losses) for record in records
        ),
        "probe_gradients": sum(
            _count_not_finite(_worst(sizes[name]) for sizes in record.probe_gradients)
            for record in records
        ),
    }


def _seed(outcome: Outcome, paths: list[str]) -> dict[str, Any]:
    record, others = outcome.record, paths[1:]
    return {
        "seed": outcome.seed,
        "test_loss": {name: _number(outcome.losses[name]) for name in paths},
        "series": {
            "starts": record.starts,
            "loss": {name: _numbers(record.loss[name]) for name in paths},
            "step_ms": {name: [1e3 * s for s in record.seconds[name]] for name in paths},
            "own_path": {
                name: {"gradients": _per_parameter([d[name] for d in record.gradient_differences])}
                for name in others
            },
            "same_weights": {
                "steps": record.probes,
                **{
                    name: {
                        "loss": _numbers(
                            abs(losses[name] - losses[paths[0]]) for losses in record.probe_losses
                        ),
                        "gradients": _per_parameter([d[name] for d in record.probe_differences]),
                    }
                    for name in others
                },
            },
        },
    }


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def _per_parameter(rows: list[list[float]]) -> list[list[float | None]]:
    """Steps of parameters to parameters of steps."""
    return [_numbers(series) for series in zip(*rows, strict=True)]


def _worst(values: Iterable[float]) -> float:
    """The largest, or NaN if one is not finite."""
    values = list(values)
    return max(values) if all(map(math.isfinite, values)) else math.nan


def _largest(values: Iterable[float]) -> float:
    """The largest of the finite ones; NaN if there is none."""
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def _count_not_finite(values: Iterable[float]) -> int:
    return sum(not math.isfinite(value) for value in values)


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
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
