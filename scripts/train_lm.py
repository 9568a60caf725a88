"""Train a small GPT with torch's head and with ours in one piece, and report what each takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from training.run.arguments import Parser, whole
from training.run.command import command

HEAD_WIDTH = 32  # of training.networks.gpt, which imports torch


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = _Parser(
        "Train a small GPT on the text that comes with Python, with torch's last layer and "
        "cross-entropy and with custom_ops.linear_cross_entropy, from the same weights on the same "
        "batches; report how they differ, and the memory and the time that each takes.",
        "lm",
    )
    parser.set_defaults(batch_size=8, lr=0.002, max_steps=150)
    with command(parser) as signals:
        arguments = parser.parse_for_comparison(argv)
        arguments.model = f"GPT of width {arguments.width} with {arguments.vocabulary} classes"

        # After the arguments: Lightning takes seconds to import.
        from training.comparison import session
        from training.comparison.lockstep import Comparison
        from training.data.text import TextData
        from training.networks.gpt import build_gpt
        from training.networks.optimizer import make_adam
        from training.run import start

        start.check(arguments)
        data = TextData.of(arguments)
        session.hold(
            arguments,
            data,
            lambda: Comparison(
                build_gpt(data.vocabulary, data.context, arguments.width),
                partial(make_adam, lr=arguments.lr),
                ("builtin", "custom-fused"),
            ),
            (*parser.sizes, *session.SETTINGS),
            signals,
        )


class _Parser(Parser):
    epochs = "1"
    sizes = ("vocabulary", "context", "width")

    def add_data_and_model(self, group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "--vocabulary",
            type=whole(256, 131072),
            default=32768,
            metavar="N",
            help="classes, 256 to 131072: the bytes and the most frequent pieces of the text "
            "(default: %(default)s)",
        )
        group.add_argument(
            "--context",
            type=whole(1),
            default=128,
            metavar="N",
            help="tokens of a sequence (default: %(default)s)",
        )
        group.add_argument(
            "--width",
            type=_width,
            default=128,
            metavar="N",
            help=f"features of a token, a multiple of {HEAD_WIDTH} (default: %(default)s)",
        )


def _width(text: str) -> int:
    width = whole(HEAD_WIDTH)(text)
    if width % HEAD_WIDTH:
        raise argparse.ArgumentTypeError(f"expected a multiple of {HEAD_WIDTH}, got {text}")
    return width


if __name__ == "__main__":
    main()
