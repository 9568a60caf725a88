"""Batches of tensors held in memory, in an order that a number determines."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Batches:
    """Batches (inputs, targets), epoch after epoch; batch number k is a function of the seed and k.

    Lightning keeps `state_dict()` in its checkpoints: k is all that it takes to go on in the middle
    of an epoch as if nothing had happened. With several processes each takes every `world_size`-th
    example of the same order; the few that do not divide evenly wait for another epoch's order.

    Args:
        inputs, targets: (N, ...) each.
        batch_size: examples a batch and process; an epoch's last batch may have fewer.
        seed: of the shuffling; None keeps the order of the data.
        rank, world_size: this process among all.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int,
        *,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.inputs = inputs
        self.targets = targets
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.served = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-(len(self.targets) // self.world_size) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rest of the epoch at hand: all of it, but after an interruption."""
        epoch, position = divmod(self.served, len(self))
        for index in self._order(epoch).split(self.batch_size)[position:]:
            self.served += 1
            yield self.inputs[index], self.targets[index]

    def _order(self, epoch: int) -> Tensor:
        examples = len(self.targets)
        if self.seed is None:
            order = torch.arange(examples)
        else:
            # Apart from torch's global generator: what a model draws cannot change the order.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(examples, generator=generator)
        return order[: examples - examples % self.world_size][self.rank :: self.world_size]

    def state_dict(self) -> dict[str, int]:
        """Return how many batches have been served since the first epoch's start."""
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that `state` counts."""
        self.served = state["served"]
