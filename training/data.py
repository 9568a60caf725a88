"""The Lightning data module of the images: MNIST or scikit-learn's digits, in memory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training import mnist
from training.examples import ExampleData, Examples
from training.images import load_digits, load_mnist
from training.lightning import rank_zero_only

#: `auto` is MNIST where it can be had, else the digits.
NAMES = ("auto", "mnist", "digits")

DEFAULT_EPOCHS = {"mnist": 1, "digits": 30}


class DigitData(ExampleData):
    """Handwritten digits for training and test: batches (images (N, 1, H, W), labels (N,)).

    Args:
        name: one of `NAMES`.
        data_dir: the folder that holds, or shall hold, `MNIST/raw/`.
        batch_size: examples a batch.
        seed: of the order of the training examples.
    """

    unit = "images"

    def __init__(
        self,
        name: str = "auto",
        data_dir: Path | str = "data",
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, test_batch_size=1000)
        if name not in NAMES:
            raise ValueError(f"data must be one of {', '.join(NAMES)}, got {name!r}")
        self.name = name
        self.data_dir = Path(data_dir)

    def load(self) -> Examples:
        """Return the images, found or downloaded, and verified.

        Raise `mnist.Unavailable` if MNIST was asked for by name and cannot be had, and
        `mnist.CorruptFile` if it is there and damaged.
        """
        if self.name == "digits":
            return load_digits()
        try:
            return load_mnist(self.data_dir)
        except mnist.Unavailable as error:
            missing = f"MNIST is not under {self.data_dir} and cannot be downloaded ({error})"
            if self.name == "mnist":
                raise mnist.Unavailable(
                    f"{missing}; --data-dir names a folder that holds MNIST/raw"
                ) from error
            _note(f"{missing}: using scikit-learn's digits; --data-dir names a folder that has it")
            return load_digits()

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> DigitData:
        """Return the data that a command line asks for; write in what `auto` and no epochs mean."""
        data = cls(arguments.data, arguments.data_dir, arguments.batch_size, arguments.seed)
        arguments.data = data.examples.name
        arguments.epochs = arguments.epochs or DEFAULT_EPOCHS[arguments.data]
        return data

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(1, H, W)."""
        channels, height, width = self.examples.train_inputs.shape[1:]
        return channels, height, width


@rank_zero_only
def _note(line: str) -> None:
    print(line, file=sys.stderr)
