"""Train one network with one head on handwritten digits, and test it."""

from __future__ import annotations

from collections.abc import Sequence

from training.arguments import HEADS, Parser

RESULT = "result.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser("Train one network with one head on handwritten digits.", out="runs/train")
    parser.add_argument(
        "--head",
        choices=HEADS,
        default="custom",
        help="the last layer with its loss: custom_ops.cross_entropy, in one piece "
        "(custom_ops.linear_cross_entropy), custom_ops.jacobian's, or torch's "
        "(default: %(default)s)",
    )
    arguments = parser.parse(argv)

    # After the arguments: Lightning takes seconds to import.
    from training import mnist, run
    from training.classifier import Classifier
    from training.data import DigitData

    try:
        finished = run.start(
            arguments,
            DigitData.of,
            lambda data: Classifier(
                arguments.model, arguments.head, data.image_shape, arguments.lr
            ),
            RESULT,
        )
    except (run.Refused, mnist.Unavailable, mnist.CorruptFile) as error:
        parser.error(str(error))
    out = arguments.out
    if finished is None:
        print(f"{out} has finished: there is nothing to resume. More --epochs would continue it.")
        return
    metrics = finished.metrics
    run.write_json(
        out / RESULT,
        {
            "steps": finished.steps,
            "epochs": arguments.epochs,
            "data": arguments.data,
            "model": arguments.model,
            "head": arguments.head,
            "test_accuracy": metrics["test_accuracy"],
            "test_loss": metrics["test_loss"],
        },
    )
    if finished.trainer.is_global_zero:
        print(
            f"{arguments.head} on {arguments.data}: {metrics['test_accuracy']:.2%} of the test "
            f"images right, loss {metrics['test_loss']:.4f}, after {finished.steps} steps; {out}/"
        )


if __name__ == "__main__":
    main()
