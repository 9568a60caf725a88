"""One run of a command line: its folder, its data, its Trainer, training and test."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from training.arguments import PRECISIONS, checkpoint_path, save_settings
from training.checkpoint import AtomicCheckpointIO, StepLimit
from training.examples import ExampleData
from training.lightning import (
    Callback,
    CSVLogger,
    LightningModule,
    Logger,
    RichProgressBar,
    TensorBoardLogger,
    Trainer,
    rank_zero_only,
    seed_everything,
)

Data = TypeVar("Data", bound=ExampleData)
Module = TypeVar("Module", bound=LightningModule)


class Refused(ValueError):
    """The settings ask for what this machine or this run cannot give; the message says what."""


@dataclass(frozen=True)
class Finished(Generic[Module]):
    """A run after its last step and its test."""

    module: Module
    trainer: Trainer
    data: ExampleData
    steps: int
    metrics: dict[str, float]


def start(
    arguments: argparse.Namespace,
    make_data: Callable[[argparse.Namespace], Data],
    make_module: Callable[[Data], Module],
    result: str,
) -> Finished[Module] | None:
    """Train and test as the arguments say; return None if a resumed run has nothing left to do.

    Args:
        arguments: of `training.arguments.Parser`.
        make_data: makes what to train and to test on; fills in what the arguments leave open.
        make_module: makes the module from the data; called with the seed set.
        result: the JSON file that a finished run leaves in its folder; its entry `steps` tells
            how far it got.
    """
    accelerator = _accelerator(arguments)
    data = make_data(arguments)
    steps_per_epoch = data.batches(arguments.devices)
    steps = min(arguments.epochs * steps_per_epoch, arguments.max_steps or 2**62)
    if arguments.resume and _steps_done(arguments.out / result) >= steps:
        return None
    _prepare_folder(arguments, result)

    seed_everything(arguments.seed, verbose=False)
    # torch would fill what it allocates, in the timed steps.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    module = make_module(data)
    checkpoint = checkpoint_path(arguments.out)
    callbacks: list[Callback] = [StepLimit(checkpoint, arguments.checkpoint_every, steps)]
    if not arguments.no_progress:
        callbacks.append(_ProgressBar())
    trainer = Trainer(
        accelerator=accelerator,
        devices=arguments.devices,
        strategy="ddp" if arguments.devices > 1 else "auto",
        precision=PRECISIONS[arguments.precision],  # type: ignore[arg-type]
        max_epochs=arguments.epochs,
        # On the CPU all we use is deterministic as it is. On CUDA what is not says so and runs.
        deterministic="warn" if accelerator == "cuda" else False,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        logger=_logger(arguments),
        log_every_n_steps=min(10, steps_per_epoch),
        enable_checkpointing=False,  # StepLimit's is the only one
        enable_progress_bar=not arguments.no_progress,
        enable_model_summary=False,
        use_distributed_sampler=False,  # Batches deals the examples out
    )
    trainer.fit(
        module,
        datamodule=data,
        ckpt_path=checkpoint if arguments.resume else None,
        weights_only=True,
    )
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    return Finished(module, trainer, data, steps, dict(metrics))


class _ProgressBar(RichProgressBar):
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}


@rank_zero_only
def write_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    """Write a result as a whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=indent, allow_nan=False) + "\n")
    part.replace(path)


def _accelerator(arguments: argparse.Namespace) -> str:
    """Return `cpu` or `cuda`; refuse what Lightning would change silently or fail at later."""
    there = torch.cuda.is_available()
    accelerator = arguments.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if there else "cpu"
    if accelerator == "cuda" and not there:
        raise Refused("--accelerator cuda: this torch sees no CUDA device")
    # On the CPU a device is a process, and Lightning starts as many as it is told.
    devices = torch.cuda.device_count() if accelerator == "cuda" else os.cpu_count() or 1
    if arguments.devices > devices:
        raise Refused(f"--devices {arguments.devices}: this machine has {devices} ({accelerator})")
    if accelerator == "cpu" and arguments.precision == "16-mixed":
        raise Refused("--precision 16-mixed needs CUDA; bf16-mixed runs on the CPU as well")
    return accelerator


def _steps_done(result: Path) -> int:
    return json.loads(result.read_text())["steps"] if result.is_file() else 0


@rank_zero_only
def _prepare_folder(arguments: argparse.Namespace, result: str) -> None:
    """Write the settings; of an earlier run remove what would be taken for this one's."""
    out = arguments.out
    earlier = (out / "settings.json").is_file()
    if earlier and not arguments.resume:
        for stale in (checkpoint_path(out), out / result):
            stale.unlink(missing_ok=True)
        shutil.rmtree(out / "logs", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    save_settings(arguments)


def _logger(arguments: argparse.Namespace) -> Logger | bool:
    if arguments.logger == "csv":
        return CSVLogger(arguments.out, name="logs")
    if arguments.logger == "tensorboard":
        return TensorBoardLogger(arguments.out, name="logs")
    return False
