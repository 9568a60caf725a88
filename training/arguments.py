"""The arguments that the command lines share, and how a resumed run finds its own again.

Nothing heavy is imported here: `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

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
    *("batch_size", "lr", "seed", "precision", "devices"),
)

_SETTINGS = "settings.json"


class Parser(argparse.ArgumentParser):
    """The common arguments; a script adds its own and calls `parse`.

    Args:
        description: what the script does.
        out: the default run folder.
    """

    #: How many epochs are the default, in words.
    epochs = "1 for MNIST, 30 for the digits"

    def __init__(self, description: str, out: str) -> None:
        super().__init__(description=description, allow_abbrev=False)
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
            type=Path,
            default=Path(out),
            metavar="DIR",
            help="where results, logs and the checkpoint go; without --resume an earlier run in "
            "there is replaced (default: %(default)s)",
        )
        run.add_argument(
            "--resume",
            action="store_true",
            help="go on from the last checkpoint in --out, with the settings it was started with; "
            "--epochs and --max-steps may be raised",
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
            type=Path,
            default=Path("data"),
            metavar="DIR",
            help="folder that holds, or shall hold, MNIST/raw (default: %(default)s)",
        )
        group.add_argument("--model", choices=MODELS, default="cnn", help="(default: %(default)s)")

    def error(self, message: str) -> NoReturn:
        """End the process with one line; argparse would print the usage before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Return the arguments; with `--resume`, what is not given is as the run was started.

        End the process with one line where something does not fit.
        """
        arguments = self.parse_args(argv)
        if not arguments.resume:
            return arguments
        if not checkpoint_path(arguments.out).is_file():
            self.error(
                f"--resume: there is no checkpoint in {arguments.out}; start without --resume, or "
                "name the run's folder with --out"
            )
        saved = json.loads((arguments.out / _SETTINGS).read_text())
        self.set_defaults(**saved)
        resumed = self.parse_args(argv)
        if resumed.data == "auto":
            resumed.data = saved["data"]  # what it was found to be
        for name in _FIXED:
            if name in saved and getattr(resumed, name) != saved[name]:
                flag = f"--{name.replace('_', '-')}"
                self.error(
                    f"{flag} {getattr(resumed, name)}: the run in {arguments.out} was started with "
                    f"{flag} {saved[name]} and cannot change it"
                )
        return resumed

    def parse_for_comparison(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Do as `parse` does, for a run on one device."""
        arguments = self.parse(argv)
        if arguments.devices > 1:
            self.error(
                f"--devices {arguments.devices}: the comparison runs on one device, so that a "
                "step's time and differences are one process's"
            )
        return arguments


def save_settings(arguments: argparse.Namespace) -> None:
    """Write the run's settings into its folder, for `--resume`."""
    kept = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in ("out", "resume", "no_progress", "accelerator")
    }
    path = arguments.out / _SETTINGS
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(kept, indent=2) + "\n")
    part.replace(path)


def checkpoint_path(out: Path) -> Path:
    """Return where the run in `out` keeps its checkpoint."""
    return out / "last.ckpt"


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


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value
