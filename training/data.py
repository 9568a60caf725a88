"""The Lightning data module: MNIST or scikit-learn's digits, in memory."""

from __future__ import annotations

import sys
from pathlib import Path

from training import mnist
from training.batches import Batches
from training.images import Images, load_digits, load_mnist
from training.lightning import LightningDataModule, rank_zero_only

#: `auto` is MNIST where it can be had, else the digits.
NAMES = ("auto", "mnist", "digits")


class DigitData(LightningDataModule):
    """Handwritten digits for training and test: batches (images (N, 1, H, W), labels (N,)).

    Args:
        name: one of `NAMES`.
        data_dir: the folder that holds, or shall hold, `MNIST/raw/`.
        batch_size: examples a batch.
        seed: of the order of the training examples.
    """

    def __init__(
        self,
        name: str = "auto",
        data_dir: Path | str = "data",
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if name not in NAMES:
            raise ValueError(f"data must be one of {', '.join(NAMES)}, got {name!r}")
        self.name = name
        self.data_dir = Path(data_dir)
        self.batch_size = batch_size
        self.seed = seed
        self._images: Images | None = None

    @property
    def images(self) -> Images:
        """The tensors; found, downloaded and verified at the first use.

        Raise `mnist.Unavailable` if MNIST was asked for by name and cannot be had, and
        `mnist.CorruptFile` if it is there and damaged.
        """
        if self._images is None:
            self._images = self._load()
        return self._images

    def _load(self) -> Images:
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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(1, H, W)."""
        channels, height, width = self.images.train_images.shape[1:]
        return channels, height, width

    @property
    def world_size(self) -> int:
        """Processes that share an epoch; 1 outside a Trainer."""
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def rank(self) -> int:
        """This process among them."""
        return self.trainer.global_rank if self.trainer is not None else 0

    def setup(self, stage: str) -> None:
        """Load, so that the first step does not."""
        _ = self.images

    def train_dataloader(self) -> Batches:
        """Return the training batches, shuffled anew each epoch."""
        return Batches(
            self.images.train_images,
            self.images.train_labels,
            self.batch_size,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )

    def test_dataloader(self) -> Batches:
        """Return the test set in its own order; whole in every process, so that none counts twice.

        Batches are of 1,000: no gradient is kept, and their size must not change what is reported.
        """
        return Batches(self.images.test_images, self.images.test_labels, 1000)


@rank_zero_only
def _note(line: str) -> None:
    print(line, file=sys.stderr)
