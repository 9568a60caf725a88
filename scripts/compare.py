"""Train the four heads in lock-step, and report how they differ: a table, JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from training.arguments import Parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(
        "Train the four heads (torch's cross-entropy, custom_ops.jacobian's, "
        "custom_ops.cross_entropy, and custom_ops.linear_cross_entropy, which is last layer and "
        "loss in one piece) from the same weights on the same batches, and report how they differ.",
        out="runs/compare",
    )
    arguments = parser.parse_for_comparison(argv)

    # After the arguments: Lightning takes seconds to import.
    from training import mnist, run, session
    from training.comparison import Comparison
    from training.data import DigitData
    from training.models import build
    from training.optimizer import make_optimizer

    try:
        session.hold(
            arguments,
            DigitData.of,
            lambda data: Comparison(
                build(arguments.model, data.image_shape), partial(make_optimizer, lr=arguments.lr)
            ),
            session.SETTINGS,
        )
    except (run.Refused, mnist.Unavailable, mnist.CorruptFile) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
