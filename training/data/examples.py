"""Examples in memory, to train and to test on, and the Lightning data module that serves them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from training.data.batches import Batches, make_batches
from training.lightning import LightningDataModule


class Examples(NamedTuple):
    """A training set, a test set, and maybe a validation set; inputs and targets (N, ...) each."""

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    val_inputs: Tensor | None = None
    val_targets: Tensor | None = None


class ExampleData(LightningDataModule):
    """Batches (inputs, targets) of what `load` returns; a subclass says what that is.

    Args:
        batch_size: examples a batch.
        seed: of the order of the training examples.
        test_batch_size: of validation, test and prediction, where no gradient is kept and which a
            run's own batch size must not change.
    """

    #: What a target belongs to, in the plural.
    unit = "examples"

    #: Whether one target's answer says nothing about another's, as a test of significance assumes.
    independent = True

    def __init__(self, batch_size: int, seed: int, test_batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.test_batch_size = test_batch_size
        self._examples: Examples | None = None

    def load(self) -> Examples:
        """Return the examples."""
        raise NotImplementedError

    @property
    def examples(self) -> Examples:
        """The tensors; loaded at the first use."""
        if self._examples is None:
            self._examples = self.load()
        return self._examples

    @property
    def world_size(self) -> int:
        """Processes that share an epoch; 1 outside a Trainer."""
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def rank(self) -> int:
        """This process among them."""
        return self.trainer.global_rank if self.trainer is not None else 0

    def batches(self, world_size: int) -> int:
        """Return how many batches of each process make an epoch."""
        inputs, targets = self.examples.train_inputs, self.examples.train_targets
        return len(make_batches(inputs, targets, self.batch_size, world_size=world_size))

    def setup(self, stage: str) -> None:
        """Load, so that the first step does not."""
        _ = self.examples

    def train_dataloader(self) -> Batches:
        """Return the training batches, shuffled anew each epoch."""
        return make_batches(
            self.examples.train_inputs,
            self.examples.train_targets,
            self.batch_size,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )

    def val_dataloader(self) -> Batches | list[Batches]:
        """Return the validation set in its own order; no loader if there is no such set."""
        inputs, targets = self.examples.val_inputs, self.examples.val_targets
        if inputs is None or targets is None:
            return []
        return make_batches(inputs, targets, self.test_batch_size)

    def test_dataloader(self) -> Batches:
        """Return the test set in its own order; whole in every process: none counts twice."""
        examples = self.examples
        return make_batches(examples.test_inputs, examples.test_targets, self.test_batch_size)

    def predict_dataloader(self) -> Batches:
        """Return the same as `test_dataloader`."""
        return self.test_dataloader()
