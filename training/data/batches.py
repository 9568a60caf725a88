"""Batches of tensors held in memory, as a DataLoader that can go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

Batch = TypeVar("Batch")

#: Far enough apart that no epoch of one seed has the order of an epoch of another.
_SEED_STRIDE = 1_000_003


class Batches(DataLoader[tuple[Tensor, Tensor]]):
    """A DataLoader with its place in the epoch as a state; Lightning keeps it in its checkpoints.

    The order of an epoch is named by the sampler's `set_epoch`, which Lightning calls. Every
    iteration begins at the first batch; only a state that was loaded moves the start, once, and
    only in the epoch that it was saved in.
    """

    _served = 0
    _start = (0, 0)  # an epoch, and the batches of it to leave out

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        """Yield the batches of the epoch that is named when the first is asked for."""
        epoch, start = self._start
        self._start = (0, 0)
        self._served = start if epoch == self._epoch else 0
        for batch in islice(super().__iter__(), self._served, None):
            self._served += 1
            yield batch

    @property
    def _epoch(self) -> int:
        return getattr(self.sampler, "epoch", 0)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches have been served."""
        if not isinstance(self.sampler, DistributedSampler):
            return {}  # Lightning's overfit_batches put another sampler in, which has no epochs
        return {"epoch": self._epoch, "served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration where `state` was saved; at an epoch's end, the next epoch."""
        if not state or not isinstance(self.sampler, DistributedSampler):
            return
        epoch, served = state["epoch"], state["served"]
        if served >= len(self):
            epoch, served = epoch + 1, 0
        self.sampler.set_epoch(epoch)
        self._start = (epoch, served)


def make_batches(
    inputs: Tensor,
    targets: Tensor,
    batch_size: int,
    *,
    seed: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """Return batches (inputs, targets); the order is a function of the seed and the epoch.

    With several processes each takes every `world_size`-th example of the same order; the few that
    do not divide evenly wait for another epoch's order.

    Args:
        inputs, targets: (N, ...) each.
        batch_size: examples a batch and process; an epoch's last batch may have fewer.
        seed: of the shuffling; None keeps the order of the data.
        rank, world_size: this process among all.

    >>> batches = make_batches(torch.arange(5.0), torch.arange(5), 2)
    >>> [targets.tolist() for _, targets in batches]
    [[0, 1], [2, 3], [4]]
    """
    dataset: Any = _Tensors(inputs, targets)
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset,
        num_replicas=world_size,
        rank=rank,
        shuffle=seed is not None,
        seed=(seed or 0) * _SEED_STRIDE,
        drop_last=True,
    )
    return Batches(
        dataset,
        batch_size=batch_size,  # by name: Lightning makes the loader anew with names
        sampler=sampler,
        collate_fn=_same,
        generator=torch.Generator(),  # DataLoader would draw from torch's global one
    )


class _Tensors(TensorDataset):
    """A batch is taken out of the tensors in one piece."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        index = torch.tensor(indices)
        return tuple(tensor[index] for tensor in self.tensors)


def _same(batch: Batch) -> Batch:
    return batch
