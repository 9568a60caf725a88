"""The Lightning data module of the images: MNIST or scikit-learn's digits, in memory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.data import mnist
from training.data.examples import ExampleData, Examples
from training.data.images import keep_apart, load_digits, load_mnist
from training.lightning import rank_zero_only
from training.refusal import Refused

#: `auto` is MNIST where it can be had, else the digits.
NAMES = ("auto", "mnist", "digits")

DEFAULT_EPOCHS = {"mnist": 1, "digits": 30}
DEFAULT_VALIDATION = {"mnist": 5000, "digits": 144}


class DigitData(ExampleData):
    """Handwritten digits for training and test: batches (images (N, 1, H, W), labels (N,)).

    Args:
        name: one of `NAMES`.
        data_dir: the folder that holds, or shall hold, `MNIST/raw/`.
        batch_size: examples a batch.
        seed: of the order of the training examples.
        validation: how many of the training images are kept apart for validation. Which ones
            belongs to the data: every digit in proportion, whatever the seed.

    Raises:
        ValueError: of an unknown name; of a validation set that is not from 10 images to all but 10
            of the training images (once these are loaded).
    """

    unit = "images"

    def __init__(
        self,
        name: str = "auto",
        data_dir: Path | str = "data",
        batch_size: int = 128,
        seed: int = 0,
        validation: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, test_batch_size=1000)
        if name not in NAMES:
            raise ValueError(f"data must be one of {', '.join(NAMES)}, got {name!r}")
        self.name = name
        self.data_dir = Path(data_dir)
        self.validation = validation

    def load(self) -> Examples:
        """Return the images, found or downloaded, verified and split.

        Raise `mnist.Unavailable` if MNIST was asked for by name and cannot be had, and
        `mnist.CorruptFile` if it is there and damaged.
        """
        images = self._load()
        return keep_apart(images, self.validation) if self.validation else images

    def _load(self) -> Examples:
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
        if arguments.validation is None:
            arguments.validation = DEFAULT_VALIDATION[arguments.data]
        count, all = arguments.validation, len(data.examples.train_targets)
        if count and not 10 <= count <= all - 10:
            raise Refused(f"--validation {count}: expected 0, or from 10 to {all - 10}")
        if arguments.keep_best and not count:
            raise Refused("--keep-best needs a validation set: --validation 0 leaves none")
        if count:
            data.validation = count
            data._examples = keep_apart(data.examples, data.validation)
        return data

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(1, H, W)."""
        channels, height, width = self.examples.train_inputs.shape[1:]
        return channels, height, width


@rank_zero_only
def _note(line: str) -> None:
    print(line, file=sys.stderr)
