"""The arguments that the command lines share, and how a resumed run finds its own again.

Nothing heavy is imported here: `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from training.refusal import Refused
from training.run import folder

#: The names are spelled out because importing where they are defined imports torch.
DATA = ("auto", "mnist", "digits")
MODELS = ("cnn", "mlp", "linear")
HEADS = ("custom", "custom-fused", "jacobian", "builtin")

#: Flag to Lightning's name.
PRECISIONS = {
    "32": "32-true",
    "bf16-mixed": "bf16-mixed",
    "16-mixed": "16-mixed",
    "64": "64-true",
}

#: What makes a run the run it is: it cannot change when the run is resumed.
_FIXED = (
    *("head", "data", "model", "vocabulary", "context", "width"),
    *("batch_size", "lr", "seed", "precision", "devices", "validation", "keep_best"),
)

#: What may change, and does not belong to the run.
_PASSING = ("out", "run", "command", "resume", "no_progress", "accelerator")


class Parser(argparse.ArgumentParser):
    """The common arguments; a script adds its own and calls `parse`.

    Args:
        description: what the script does.
        command: its name. A run is resumed by the same command; it is in runs/<command> by default.
    """

    #: How many epochs are the default, in words.
    epochs = "1 for MNIST, 30 for the digits"

    def __init__(self, description: str, command: str) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self.set_defaults(command=command, run=None, seeds=1, validation=0, keep_best=False)
        self.add_data_and_model(self.add_argument_group("data and model"))

        training = self.add_argument_group("training")
        training.add_argument(
            "--epochs",
            type=whole(1),
            metavar="N",
            help=f"passes over the data (default: {self.epochs})",
        )
        training.add_argument(
            "--max-steps",
            type=whole(1),
            metavar="N",
            help="stop after N batches, if sooner (default: %(default)s)",
        )
        training.add_argument(
            "--batch-size",
            type=whole(1),
            default=128,
            metavar="N",
            help="examples a step and device (default: %(default)s)",
        )
        training.add_argument(
            "--lr",
            type=_positive,
            default=0.05,
            metavar="X",
            help="learning rate of the first step; halved every 500 (default: %(default)s)",
        )
        training.add_argument(
            "--seed",
            type=whole(0),
            default=0,
            metavar="N",
            help="of the weights and the order of batches (default: %(default)s)",
        )
        training.add_argument(
            "--precision",
            choices=PRECISIONS,
            default="32",
            help="bits of the floating-point numbers (default: %(default)s)",
        )
        training.add_argument(
            "--accelerator",
            choices=("auto", "cpu", "cuda"),
            default="auto",
            help="(default: %(default)s: CUDA where there is any)",
        )
        training.add_argument(
            "--devices", type=whole(1), default=1, metavar="N", help="(default: %(default)s)"
        )

        run = self.add_argument_group("run folder")
        run.add_argument(
            "--out",
            type=_path,
            default=f"runs/{command}",
            metavar="DIR",
            help="where the run gets a folder of its own, version_0, version_1 and so on, for its "
            "results, logs and checkpoint (default: %(default)s)",
        )
        run.add_argument(
            "--resume",
            action="store_true",
            help="go on from the last checkpoint of the newest run in --out (or of the run whose "
            "folder --out is), with the settings it was started with; how far it goes (--epochs, "
            "--max-steps, --seeds) may be raised",
        )
        run.add_argument(
            "--checkpoint-every",
            type=whole(1),
            default=100,
            metavar="N",
            help="steps between two checkpoints (default: %(default)s)",
        )
        run.add_argument(
            "--logger",
            choices=("csv", "tensorboard", "none"),
            default="csv",
            help="(default: %(default)s)",
        )
        run.add_argument("--no-progress", action="store_true", help="no progress bar")

    def add_data_and_model(self, group: argparse._ArgumentGroup) -> None:
        """Add what is trained on what: here images and the networks for them."""
        group.add_argument(
            "--data",
            choices=DATA,
            default="auto",
            help="MNIST, scikit-learn's digits (no network), or auto: MNIST where it is found or "
            "can be downloaded, else the digits (default: %(default)s)",
        )
        group.add_argument(
            "--data-dir",
            type=_path,
            default="data",
            metavar="DIR",
            help="folder that holds, or shall hold, MNIST/raw (default: %(default)s)",
        )
        group.add_argument("--model", choices=MODELS, default="cnn", help="(default: %(default)s)")

    def error(self, message: str) -> NoReturn:
        """End the process with one line; argparse would print the usage before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Return the arguments; with `--resume`, what is not given is as the run was started.

        Raise `Refused` where something does not fit; a mistyped flag ends the process with a line.
        """
        arguments = self.parse_args(argv)
        if not arguments.resume:
            return arguments
        run = folder.find(arguments.out, arguments.command)
        saved = folder.load_settings(run)
        self.set_defaults(**saved)
        resumed = self.parse_args(argv)
        resumed.run = run
        if resumed.data == "auto":
            resumed.data = saved["data"]  # what it was found to be
        if resumed.seeds < saved.get("seeds", 1):
            raise Refused(
                f"--seeds {resumed.seeds}: the run in {run} was started with {saved['seeds']}; "
                "more would continue it"
            )
        for name in _FIXED:
            if name in saved and getattr(resumed, name) != saved[name]:
                flag = f"--{name.replace('_', '-')}"
                raise Refused(
                    f"{flag} {getattr(resumed, name)}: the run in {run} was started with "
                    f"{flag} {saved[name]} and cannot change it"
                )
        return resumed

    def parse_for_comparison(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Do as `parse` does, for runs on one device."""
        arguments = self.parse(argv)
        if arguments.devices > 1:
            raise Refused(
                f"--devices {arguments.devices}: the comparison runs on one device, so that a "
                "step's time and differences are one process's"
            )
        return arguments


def kept(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a run's settings are, as plain values."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in _PASSING
    }


def whole(least: int, most: int = 2**32 - 1) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            range = f"{least} to {most}" if most < 2**32 - 1 else f"{least}"
            raise argparse.ArgumentTypeError(f"expected a whole number from {range}, got {text}")
        return value

    return parse


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value
