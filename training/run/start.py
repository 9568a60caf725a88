"""One run of a command line: its Trainer, training and test, in a folder that is held meanwhile."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from training.data.examples import ExampleData
from training.lightning import (
    Checkpoint,
    CSVLogger,
    LightningEnvironment,
    LightningModule,
    Logger,
    ModelCheckpoint,
    RichProgressBar,
    TensorBoardLogger,
    Trainer,
    rank_zero_only,
    seed_everything,
)
from training.refusal import Refused
from training.run import folder, processes
from training.run.arguments import PRECISIONS, kept
from training.run.checkpoint import AtomicCheckpointIO, StepLimit, steps_done
from training.run.signals import Signals

# The folder is the run's own: what is in it is meant to be there.
warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty.*")
# A run that goes on at the end of a validation ends that epoch at once.
warnings.filterwarnings("ignore", message=r".*could not find the monitored key.*")

Module = TypeVar("Module", bound=LightningModule)

BEST = "best.ckpt"


@dataclass(frozen=True)
class Finished(Generic[Module]):
    """A run after its last step and its test."""

    module: Module
    trainer: Trainer
    steps: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Limit:
    """After how many steps a run ends, and the flag that says so."""

    steps: int
    flag: str


def limit(arguments: argparse.Namespace, data: ExampleData) -> Limit:
    """Return the lower of `--epochs`, in steps, and `--max-steps`."""
    epochs = Limit(
        arguments.epochs * data.batches(arguments.devices), f"--epochs {arguments.epochs}"
    )
    if arguments.max_steps is None or arguments.max_steps >= epochs.steps:
        return epochs
    return Limit(arguments.max_steps, f"--max-steps {arguments.max_steps}")


def check(arguments: argparse.Namespace) -> None:
    """Raise `Refused` for what the machine or Lightning does not allow; write nothing."""
    _make_trainer(arguments, Path(os.devnull), None, [])


@contextmanager
def held(arguments: argparse.Namespace, data: ExampleData) -> Iterator[Path]:
    """Hold the folder of the run that the arguments ask for, new or to be resumed.

    Raise `Refused`, before anything is written, for what the run to be resumed does not allow. In a
    process that the run has launched, only return its folder.
    """
    launched = processes.launched_in()
    if launched is not None:
        yield launched
        return
    run = arguments.run or folder.claim(arguments.out)
    with folder.locked(run):
        _refuse_fewer_steps(run, limit(arguments, data))
        folder.save_settings(run, arguments.command, kept(arguments))
        try:
            with processes.announced(run):
                yield run
        except OSError as error:
            if error.filename is not None:
                raise
            # Writing names no file: what is written is in the run's folder.
            raise OSError(error.errno, error.strerror or str(error), str(run)) from error


def train(
    arguments: argparse.Namespace,
    data: ExampleData,
    make_module: Callable[[], Module],
    run: Path,
    signals: Signals,
) -> Finished[Module]:
    """Train from where the checkpoint in the folder `run` was made, or from the start, and test.

    Args:
        arguments: of `training.run.arguments.Parser`.
        data: what to train and to test on.
        make_module: makes the module; called with the seed set.
        run: the folder of the checkpoint and the logs.
        signals: what may interrupt the training.
    """
    seed_everything(arguments.seed, verbose=False)
    # torch would fill what it allocates, in the timed steps.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    module = make_module()
    last = run / folder.CHECKPOINT
    steps = limit(arguments, data).steps
    callbacks: list[Any] = [StepLimit(last, arguments.checkpoint_every, steps, signals)]
    if arguments.keep_best:
        callbacks.insert(0, _best(run))  # its state is in the checkpoint of the other
    often = min(10, data.batches(arguments.devices))
    trainer = _make_trainer(arguments, run, _logger(arguments, run), callbacks, often)
    try:
        trainer.fit(
            module,
            datamodule=data,
            ckpt_path=last if last.is_file() else None,
            weights_only=True,
        )
        # By its path: without one Lightning would look for a checkpoint of its own choice.
        tested = run / BEST if arguments.keep_best else last
        (metrics,) = trainer.test(
            module, datamodule=data, ckpt_path=tested, weights_only=True, verbose=False
        )
    except BaseException:
        _end_launched(trainer)
        raise
    return Finished(module, trainer, steps, dict(metrics))


def device(arguments: argparse.Namespace) -> torch.device:
    """Return where the run's first process computes."""
    return torch.device(_accelerator(arguments))


def _make_trainer(
    arguments: argparse.Namespace,
    run: Path,
    logger: Logger | None,
    callbacks: list[Any],
    log_every: int = 10,
) -> Trainer:
    accelerator = _accelerator(arguments)
    if not arguments.no_progress:
        callbacks = [*callbacks, _ProgressBar(console_kwargs={"stderr": True})]
    checkpointing = any(isinstance(callback, Checkpoint) for callback in callbacks)
    processes.forget_places()
    try:
        trainer = Trainer(
            accelerator=accelerator,
            devices=arguments.devices,
            strategy="ddp" if arguments.devices > 1 else "auto",
            precision=PRECISIONS[arguments.precision],  # type: ignore[arg-type]
            max_epochs=arguments.epochs,
            # On the CPU all we use is deterministic as it is. On CUDA what is not says so and runs.
            deterministic="warn" if accelerator == "cuda" else False,
            callbacks=callbacks,
            # The run starts its own processes, whatever a job's or a shell's variables say.
            plugins=[AtomicCheckpointIO(), LightningEnvironment()],
            default_root_dir=run,  # Lightning looks for checkpoints of requeued jobs there
            logger=logger or False,
            log_every_n_steps=log_every,
            num_sanity_val_steps=0,
            enable_checkpointing=checkpointing,
            enable_progress_bar=not arguments.no_progress,
            enable_model_summary=False,
            use_distributed_sampler=False,  # the data deals the examples out
        )
    except (ValueError, RuntimeError) as error:
        raise Refused(f"Lightning refuses: {' '.join(str(error).split())}") from error
    # Lightning takes a variable's word for it, which may be another launcher's.
    rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]
    return trainer


def _best(run: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=run,
        filename=Path(BEST).stem,
        monitor="val_loss",
        enable_version_counter=False,
        auto_insert_metric_name=False,
    )


def _refuse_fewer_steps(run: Path, limit: Limit) -> None:
    for path in run.rglob(folder.CHECKPOINT):
        done = steps_done(path)
        if done > limit.steps:
            raise Refused(
                f"{limit.flag}: the run in {run} has taken {done} steps already, and that would be "
                f"{limit.steps}"
            )


def _end_launched(trainer: Trainer) -> None:
    """End the processes that the Trainer has launched: they would wait for this one."""
    launched = getattr(trainer.strategy.launcher, "procs", [])
    ended = list(launched)
    launched.clear()  # Lightning watches the list, and kills this process if one there has failed
    for process in ended:
        process.kill()
        process.wait()


class _ProgressBar(RichProgressBar):
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}


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


def _logger(arguments: argparse.Namespace, run: Path) -> Logger | None:
    # Each process of a run logs into a version of its own: Lightning would empty an earlier one.
    if arguments.logger == "csv":
        return CSVLogger(run, name="logs")
    if arguments.logger == "tensorboard":
        return TensorBoardLogger(run, name="logs")
    return None
