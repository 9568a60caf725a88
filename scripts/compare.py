"""Train the three heads in lock-step, and report how they differ: a table, JSON and a picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from training.arguments import Parser

if TYPE_CHECKING:
    from training.comparison import Comparison
    from training.run import Finished

RESULT = "report.json"
PICTURE = "report.png"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(
        "Train the three heads (torch's cross-entropy, custom_ops.jacobian's and "
        "custom_ops.cross_entropy) from the same weights on the same batches, and report how they "
        "differ.",
        out="runs/compare",
    )
    arguments = parser.parse(argv)
    if arguments.devices > 1:
        parser.error(
            f"--devices {arguments.devices}: the comparison runs on one device, so that a step's "
            "time and differences are one process's"
        )

    # After the arguments: Lightning takes seconds to import.
    from training import figure, mnist, run, table
    from training.comparison import Comparison

    try:
        finished = run.start(
            arguments,
            lambda shape: Comparison(arguments.model, shape, lr=arguments.lr),
            RESULT,
        )
    except (run.Refused, mnist.Unavailable, mnist.CorruptFile) as error:
        parser.error(str(error))
    path = arguments.out / RESULT
    if finished is None:
        print(f"{arguments.out} has finished: there is nothing to resume. Its report:")
    else:
        run.write_json(path, _report(finished, arguments), indent=None)
    report = json.loads(path.read_text())
    figure.save(report, arguments.out / PICTURE)
    table.show(report)
    print(f"{path}, {arguments.out / PICTURE}")


def _report(finished: Finished[Comparison], arguments: argparse.Namespace) -> dict[str, Any]:
    from training import report
    from training.measurement import median_seconds, peak_bytes

    module, trainer = finished.module, finished.trainer
    device = trainer.strategy.root_device
    images, labels = next(iter(finished.data.train_dataloader()))
    images = trainer.precision_plugin.convert_input(images).to(device)
    labels = labels.to(device)
    steps = {name: module.step_on_a_copy(name, images, labels) for name in module.names}
    losses = {name: module.loss_alone(name, images, labels) for name in module.names}
    seconds = median_seconds(losses, device)
    costs: dict[str, dict[str, float]] = {
        name: {
            "loss_us": 1e6 * seconds[name],
            "loss_peak_bytes": peak_bytes(losses[name], device),
            "peak_bytes": peak_bytes(steps[name], device),
        }
        for name in module.names
    }
    names = ("data", "model", "epochs", "max_steps", "batch_size", "lr", "seed", "precision")
    settings = {name: getattr(arguments, name) for name in names}
    return report.build(
        module.record, finished.metrics, costs, module.parameter_names, settings, device
    )


if __name__ == "__main__":
    main()
