"""Checkpoints that survive `kill -9`, and the end of a run that counts its steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from training.lightning import Callback, LightningModule, TorchCheckpointIO, Trainer


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the old checkpoint, then take its place in one system call.

    Lightning's own writes under the system's folder for temporary files and moves: a copy, if that
    is another file system, and a kill in the middle of it leaves half a checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save at `path`: the whole checkpoint, or what was there before."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # the content before the name, should the machine go down
        part.replace(path)


class StepLimit(Callback):
    """Keep one checkpoint, every so many steps and at the last, and stop there.

    Steps are counted by the loader, whose number is right whatever the optimizers are: Lightning's
    own `global_step` counts each optimizer's. A checkpoint is made at the end of a batch, never
    after the loop: then an epoch cut short would pass for a finished one when training goes on.

    Args:
        path: of the checkpoint.
        every: steps between two.
        steps: of the whole run.
    """

    def __init__(self, path: Path, every: int, steps: int) -> None:
        self.path = path
        self.every = every
        self.steps = steps

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop at once if the run was interrupted after its last step."""
        if _served(trainer) >= self.steps:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save and stop where due."""
        last = _served(trainer) >= self.steps
        if last or _served(trainer) % self.every == 0:
            trainer.save_checkpoint(self.path)
        if last:
            trainer.should_stop = True


def _served(trainer: Trainer) -> int:
    loader: Any = trainer.train_dataloader
    return loader.served
