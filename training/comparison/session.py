"""A comparison from the command line: seed after seed, then report, picture and table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from training.comparison import figure, outcome, report, table
from training.comparison.lockstep import Comparison
from training.comparison.outcome import Cost, Outcome
from training.data.examples import ExampleData
from training.measurement import peak_bytes, seconds_in_turns
from training.run import start
from training.run.folder import read_json, write_json
from training.run.signals import Signals

RESULT = "report.json"
PICTURE = "report.png"
OUTCOME = "outcome.pt"

#: The arguments that every report names.
SETTINGS = (
    *("data", "model", "epochs", "max_steps", "batch_size", "lr", "seed", "seeds"),
    "precision",
)


def hold(
    arguments: argparse.Namespace,
    data: ExampleData,
    make_module: Callable[[], Comparison],
    settings: Sequence[str],
    signals: Signals,
) -> None:
    """Train the heads side by side as the arguments say; write and show the report.

    Args:
        arguments, data, signals: as `training.run.start.train` takes them.
        make_module: likewise; called once for each seed.
        settings: the arguments that the report names.
    """
    with start.held(arguments, data) as run:
        path, picture = run / RESULT, run / PICTURE
        limit = start.limit(arguments, data)
        seeds = range(arguments.seed, arguments.seed + arguments.seeds)
        kept = [_finished(run, seed, limit.steps) for seed in seeds]
        if path.is_file() and all(kept):
            print(
                f"{run} has finished: there is nothing to resume. It ended at {limit.flag}; "
                "more would continue it. Its report:"
            )
        else:
            outcomes = [
                found or _train(arguments, data, make_module, run, seed, signals)
                for seed, found in zip(seeds, kept, strict=True)
            ]
            content = report.build(outcomes, _questions(arguments, data, make_module(), settings))
            write_json(path, content, indent=None)
        content = read_json(path)
        figure.save(content, picture)
        table.show(content)
        print(f"{path}, {picture}")
        if any(head["test_loss"] is None for head in content["heads"].values()):
            sys.exit(1)


def _finished(run: Path, seed: int, steps: int) -> Outcome | None:
    found = outcome.load(_folder(run, seed) / OUTCOME)
    return found if found is not None and found.record.steps == steps else None


def _train(
    arguments: argparse.Namespace,
    data: ExampleData,
    make_module: Callable[[], Comparison],
    run: Path,
    seed: int,
    signals: Signals,
) -> Outcome:
    """Train and test the heads from one seed, and keep what came of it."""
    data.seed = seed
    one = argparse.Namespace(**{**vars(arguments), "seed": seed})
    finished = start.train(one, data, make_module, _folder(run, seed), signals)
    module = finished.module
    found = Outcome(
        seed=seed,
        record=module.record,
        losses={name: finished.metrics[f"test_loss/{name}"] for name in module.paths},
        predictions=module.predictions,
        targets=module.targets,
        costs=_costs(finished, data),
    )
    outcome.save(found, _folder(run, seed) / OUTCOME)
    return found


def _folder(run: Path, seed: int) -> Path:
    return run / f"seed_{seed}"


def _questions(
    arguments: argparse.Namespace, data: ExampleData, module: Comparison, settings: Sequence[str]
) -> report.Questions:
    return report.Questions(
        heads=module.names,
        parameters=module.parameter_names,
        settings={name: getattr(arguments, name) for name in settings},
        unit=data.unit,
        independent=data.independent,
        targets=next(iter(data.train_dataloader()))[1].numel(),
        device=start.device(arguments),
    )


def _costs(finished: start.Finished[Comparison], data: ExampleData) -> dict[str, Cost]:
    """What cannot be measured while training, per head."""
    module, trainer = finished.module, finished.trainer
    device = trainer.strategy.root_device
    inputs, targets = next(iter(data.train_dataloader()))
    inputs = trainer.precision_plugin.convert_input(inputs).to(device)
    targets = targets.to(device)
    alone = {name: module.head_alone(name, inputs, targets) for name in module.names}
    seconds = seconds_in_turns(alone, device)
    return {
        name: Cost(
            seconds=seconds[name],
            head_peak_bytes=peak_bytes(alone[name], device),
            peak_bytes=peak_bytes(module.step_on_a_copy(name, inputs, targets), device),
        )
        for name in module.names
    }
