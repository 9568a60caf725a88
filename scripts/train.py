"""Train one network with one head on handwritten digits, and test it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.run.arguments import HEADS, Parser, whole
from training.run.command import command
from training.run.folder import read_json, write_json

if TYPE_CHECKING:
    from training.classifier import Classifier
    from training.run.start import Finished

RESULT = "result.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser("Train one network with one head on handwritten digits.", "train")
    parser.add_argument(
        "--head",
        choices=HEADS,
        default="custom",
        help="the last layer with its loss: custom_ops.cross_entropy, in one piece "
        "(custom_ops.linear_cross_entropy), custom_ops.jacobian's, or torch's "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--validation",
        type=whole(0),
        default=None,
        metavar="N",
        help="training images kept apart, to validate on after each epoch (default: 5000 of "
        "MNIST's 60000, 144 of the digits' 1437)",
    )
    parser.add_argument(
        "--keep-best",
        action="store_true",
        help="keep the weights with the lowest validation loss as best.ckpt, and test these",
    )
    with command(parser) as signals:
        arguments = parser.parse(argv)

        # After the arguments: Lightning takes seconds to import.
        from training.classifier import Classifier
        from training.data import DigitData
        from training.run import start

        start.check(arguments)
        data = DigitData.of(arguments)
        with start.held(arguments, data) as run:
            limit = start.limit(arguments, data)
            if _steps(run / RESULT) == limit.steps:
                print(
                    f"{run} has finished: there is nothing to resume. It ended at {limit.flag}; "
                    "more would continue it."
                )
                return
            finished = start.train(
                arguments,
                data,
                lambda: Classifier(arguments.model, arguments.head, data.image_shape, arguments.lr),
                run,
                signals,
            )
            if finished.trainer.is_global_zero:
                _report(arguments, finished, len(data.examples.test_targets), run)


def _steps(result: Path) -> int | None:
    """After how many steps a result was written; None if there is none."""
    content = read_json(result) if result.is_file() else None
    return content.get("steps") if isinstance(content, dict) else None


def _report(
    arguments: argparse.Namespace, finished: Finished[Classifier], tested: int, run: Path
) -> None:
    accuracy, loss = (finished.metrics[f"test_{name}"] for name in ("accuracy", "loss"))
    write_json(
        run / RESULT,
        {
            "steps": finished.steps,
            "epochs": arguments.epochs,
            "data": arguments.data,
            "model": arguments.model,
            "head": arguments.head,
            "seed": arguments.seed,
            "tested": "best.ckpt" if arguments.keep_best else "last.ckpt",
            "test_images": tested,
            "test_right": round(accuracy * tested),
            "test_accuracy": accuracy,
            "test_loss": loss if math.isfinite(loss) else None,
        },
    )
    said = f"loss {loss:.4f}" if math.isfinite(loss) else "the loss is not finite"
    print(
        f"{arguments.head} on {arguments.data}: {accuracy:.2%} of the test images right "
        f"({round(accuracy * tested)} of {tested}), {said}, after {finished.steps} steps; {run}/"
    )
    if not math.isfinite(loss):
        sys.exit(1)


if __name__ == "__main__":
    main()
