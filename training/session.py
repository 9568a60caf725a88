"""A comparison from the command line: training, costs, report, picture and table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

from torch import Tensor

from training import figure, report, run, table
from training.comparison import Comparison
from training.measurement import median_seconds, peak_bytes
from training.run import Data

RESULT = "report.json"
PICTURE = "report.png"

#: The arguments that every report names.
SETTINGS = ("data", "model", "epochs", "max_steps", "batch_size", "lr", "seed", "precision")


def hold(
    arguments: argparse.Namespace,
    make_data: Callable[[argparse.Namespace], Data],
    make_module: Callable[[Data], Comparison],
    settings: Sequence[str],
) -> None:
    """Train the heads side by side as the arguments say; write and show the report.

    Args:
        arguments, make_data, make_module: as `training.run.start` takes them.
        settings: the arguments that the report names.
    """
    path, picture = arguments.out / RESULT, arguments.out / PICTURE
    finished = run.start(arguments, make_data, make_module, RESULT)
    if finished is None:
        print(f"{arguments.out} has finished: there is nothing to resume. Its report:")
    else:
        module, device = finished.module, finished.trainer.strategy.root_device
        content = report.build(
            module.record,
            finished.metrics,
            _costs(finished),
            module.parameter_names,
            {name: getattr(arguments, name) for name in settings} | {"unit": finished.data.unit},
            _a_batch(finished)[1].numel(),
            device,
        )
        run.write_json(path, content, indent=None)
    content = json.loads(path.read_text())
    figure.save(content, picture)
    table.show(content)
    print(f"{path}, {picture}")


def _costs(finished: run.Finished[Comparison]) -> dict[str, dict[str, float]]:
    """What cannot be measured while training, per head: entries of the report."""
    module, trainer = finished.module, finished.trainer
    device = trainer.strategy.root_device
    inputs, targets = _a_batch(finished)
    inputs = trainer.precision_plugin.convert_input(inputs).to(device)
    targets = targets.to(device)
    alone = {name: module.head_alone(name, inputs, targets) for name in module.names}
    seconds = median_seconds(alone, device)
    return {
        name: {
            "head_us": 1e6 * seconds[name],
            "head_peak_bytes": peak_bytes(alone[name], device),
            "peak_bytes": peak_bytes(module.step_on_a_copy(name, inputs, targets), device),
        }
        for name in module.names
    }


def _a_batch(finished: run.Finished[Comparison]) -> tuple[Tensor, Tensor]:
    return next(iter(finished.data.train_dataloader()))
