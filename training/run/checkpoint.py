"""Checkpoints that survive `kill -9` and a full disk, and a run's end after so many steps."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from training.lightning import Checkpoint, LightningModule, TorchCheckpointIO, Trainer
from training.refusal import Refused
from training.run.folder import write_whole
from training.run.signals import Signals, Stopped


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the old checkpoint, then take its place in one system call.

    Lightning's own writes under the system's folder for temporary files and moves: a copy, if that
    is another file system, and a kill in the middle of it leaves half a checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save at `path`: the whole checkpoint, or what was there before; else raise `OSError`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(file: BinaryIO) -> None:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch's writer reports a failure of the file in a way of its own.
                raise OSError(errno.EIO, f"cannot be written ({_first_line(error)})") from error

        write_whole(path, write)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the checkpoint at `path`; raise `Refused` if it is not whole."""
        load = super().load_checkpoint
        return _whole(Path(path), lambda: load(path, *args, **kwargs))


def read(path: Path) -> dict[str, Any]:
    """Return what torch has saved at `path`; raise `Refused` if it is not whole."""
    return _whole(path, lambda: torch.load(path, map_location="cpu", weights_only=True))


def _whole(path: Path, load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return load()
    except Exception as error:  # of a damaged file torch may raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the system does not let it be opened
        raise Refused(f"{path} is damaged: it is no checkpoint ({_first_line(error)})") from error


def steps_done(path: Path) -> int:
    """Return after how many steps the checkpoint at `path` was made; 0 if there is none."""
    if not path.is_file():
        return 0
    try:
        return read(path)["callbacks"][StepLimit.__qualname__]["steps"]
    except KeyError as error:
        raise Refused(f"{path} is not the checkpoint of such a run: it has no {error}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class StepLimit(Checkpoint):
    """Keep one checkpoint, every so many steps and at the last, and stop there or when asked to.

    Steps are counted here: Lightning's own `global_step` counts each optimizer's. A checkpoint is
    made at the end of a batch or of a validation, never after the loop: then an epoch cut short
    would pass for a finished one when training goes on.

    Args:
        path: of the checkpoint.
        every: steps between two.
        steps: of the whole run.
        signals: what may ask for the end.
    """

    def __init__(self, path: Path, every: int, steps: int, signals: Signals) -> None:
        self.path = path
        self.every = every
        self.steps = steps
        self.signals = signals
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the count."""
        return {"steps": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.done = state_dict["steps"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once if the run was interrupted after its last step."""
        self.signals.install()  # in place of Lightning's, which save nothing
        self.signals.waiting = True
        if self.done >= self.steps:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save and stop where due; raise `Stopped` if that was asked for."""
        self.done += 1
        stop, save = self._asked(trainer)
        if save or self.done >= self.steps or self.done % self.every == 0:
            trainer.save_checkpoint(self.path)
            self.signals.saved()
        if stop:
            signum = self.signals.stop or signal.SIGTERM  # another process has it
            raise Stopped(signum, f"step {self.done} is saved in {self.path}; --resume goes on")
        if self.done >= self.steps:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the validation has made the best so far."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let signals act at once again."""
        self.signals.waiting = False

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let signals act at once again."""
        self.signals.waiting = False

    def _asked(self, trainer: Trainer) -> tuple[bool, bool]:
        """Whether to stop and whether to save: all processes alike if one of them is asked to."""
        any = partial(trainer.strategy.reduce_boolean_decision, all=False)
        stop = self.signals.stop is not None
        if not any(stop or self.signals.save):
            return False, False
        return any(stop), True
