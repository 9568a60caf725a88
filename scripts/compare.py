"""Train the four heads in lock-step, and report how they differ: a table, JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from training.run.arguments import Parser, whole
from training.run.command import command

#: By the name of the data: so many that the whole takes a few minutes on two cores.
SEEDS = {"mnist": 3, "digits": 5}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(
        "Train the four heads (torch's cross-entropy, custom_ops.jacobian's, "
        "custom_ops.cross_entropy, and custom_ops.linear_cross_entropy, which is last layer and "
        "loss in one piece) from the same weights on the same batches, seed after seed, and report "
        "how they differ.",
        "compare",
    )
    parser.add_argument(
        "--seeds",
        type=whole(1, 1000),
        default=None,
        metavar="N",
        help="how many seeds, from --seed on (default: 3 for MNIST, 5 for the digits)",
    )
    with command(parser) as signals:
        arguments = parser.parse_for_comparison(argv)

        # After the arguments: Lightning takes seconds to import.
        from training.comparison import session
        from training.comparison.lockstep import Comparison
        from training.data import DigitData
        from training.networks.models import build
        from training.networks.optimizer import make_optimizer
        from training.run import start

        start.check(arguments)
        data = DigitData.of(arguments)
        arguments.seeds = arguments.seeds or SEEDS[arguments.data]
        session.hold(
            arguments,
            data,
            lambda: Comparison(
                build(arguments.model, data.image_shape),
                partial(make_optimizer, lr=arguments.lr),
                yardstick=True,
            ),
            session.SETTINGS,
            signals,
        )


if __name__ == "__main__":
    main()
