"""Signals ask for the end: it comes at the end of a batch, with a checkpoint and one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("training.lightning", reason="needs the extra [train]")

from test_training_scripts import DIGITS, ENVIRONMENT, LM, call, command, report, same_weights

from training.classifier import Classifier
from training.comparison.lockstep import Comparison
from training.run import start
from training.run.signals import Signals, Stopped

__all__ = ["call"]

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

SETTINGS = {
    "train": (*DIGITS, "--model", "mlp", "--batch-size", 100, "--epochs", 1),
    "compare": (*DIGITS, "--model", "mlp", "--batch-size", 100, "--epochs", 1, "--seeds", 1),
    "train_lm": (*LM, "--max-steps", 9),
}


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Let something happen in the middle of a step, once."""

    def arrange(number: int, happen: Callable[[], None]) -> None:
        steps: list[int] = []
        for module in (Classifier, Comparison):
            right = module.training_step

            def step(self: Any, batch: Any, index: int, right: Any = right) -> Any:
                steps.append(index)
                if len(steps) == number:
                    happen()
                return right(self, batch, index)

            monkeypatch.setattr(module, "training_step", step)

    return arrange


@pytest.mark.parametrize("script", SETTINGS)
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_batchs_end_says_one_line_and_resume_goes_on(
    call, capsys, in_step, tmp_path: Path, script: str, signum: int, code: int
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(script, *SETTINGS[script], "--out", whole)
    capsys.readouterr()
    in_step(5, lambda: signal.raise_signal(signum))
    with pytest.raises(SystemExit) as exit:
        call(script, *SETTINGS[script], "--out", parts)
    assert exit.value.code == code
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"stopped by {signal.Signals(signum).name}: step 5 is saved in ")
    assert not out
    call(script, "--resume", "--out", parts, "--no-progress")
    assert same_weights(whole, parts)


def test_a_signal_in_the_second_seed_keeps_the_first(call, in_step, tmp_path: Path):
    settings = (*DIGITS, "--model", "linear", "--batch-size", 100, "--epochs", 1, "--seeds", 3)
    call("compare", *settings, "--out", tmp_path / "whole")
    in_step(20, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        call("compare", *settings, "--out", tmp_path / "parts")
    call("compare", "--resume", "--out", tmp_path / "parts", "--no-progress")
    whole, parts = (report(tmp_path / name) for name in ("whole", "parts"))
    for one, other in zip(whole["seeds"], parts["seeds"], strict=True):
        assert one["series"]["loss"] == other["series"]["loss"]
    assert parts["seeds"][1]["series"]["starts"] == [0, 5]


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_the_logs_up_to_a_signal_are_there(call, in_step, tmp_path: Path, logger: str):
    in_step(12, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        call("train", *SETTINGS["train"], "--logger", logger, "--out", tmp_path)
    (log,) = (tmp_path / "version_0" / "logs" / "version_0").glob("[me]*")
    assert log.stat().st_size > 30


def test_a_notice_of_the_jobs_end_saves_and_goes_on_and_nothing_is_requeued(
    call, in_step, monkeypatch, tmp_path: Path
):
    def notice() -> None:
        assert not list(tmp_path.rglob("*.ckpt"))
        signal.raise_signal(signal.SIGUSR1)

    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x"}.items():
        monkeypatch.setenv(name, value)
    in_step(5, notice)
    call("train", *SETTINGS["train"], "--out", tmp_path)
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["last.ckpt"]
    assert (tmp_path / "version_0" / "result.json").is_file()


@pytest.mark.parametrize("script", ["train", "compare"])
def test_the_checkpoint_of_a_requeued_job_is_not_what_is_tested(
    call, monkeypatch, tmp_path: Path, script: str
):
    settings = SETTINGS[script]
    call(script, *settings, "--out", tmp_path / "alone")
    wrong = torch.load(next((tmp_path / "alone").rglob("last.ckpt")), weights_only=True)
    for weight in wrong["state_dict"].values():
        weight.zero_()
    runs = tmp_path / "runs"
    for folder in (runs, runs / "version_0"):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(wrong, folder / "hpc_ckpt_3.ckpt")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    call(script, *settings, "--out", runs)
    name = "result.json" if script == "train" else "report.json"
    alone, ours = (
        json.loads((path / name).read_text())
        for path in (tmp_path / "alone" / "version_0", runs / "version_1")
    )
    key = "test_right" if script == "train" else "answers"
    assert ours[key] == alone[key]


def test_before_and_after_the_training_a_signal_acts_at_once():
    signals = Signals()
    with signals, pytest.raises(Stopped, match="stopped by SIGTERM"):
        signal.raise_signal(signal.SIGTERM)
    assert signals.stop is None


def test_a_second_request_does_not_wait_for_the_batch():
    with Signals() as signals:
        signals.waiting = True
        signal.raise_signal(signal.SIGINT)
        assert signals.stop == signal.SIGINT
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_launched_processes_end_with_the_run_and_not_the_run_with_them():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watched = [process]  # by Lightning, which kills this process for one that has failed
    strategy = SimpleNamespace(launcher=SimpleNamespace(procs=watched))
    start._end_launched(SimpleNamespace(strategy=strategy))
    assert process.returncode == -signal.SIGKILL
    assert not watched


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_together_and_go_on_together(tmp_path: Path, signum: int):
    settings = (*DIGITS, "--model", "linear", "--devices", 2, "--batch-size", 1, "--epochs", 9)
    settings += ("--checkpoint-every", 5, "--out", tmp_path, "--logger", "none")
    process = subprocess.Popen(
        command("train", *settings),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.rglob("last.ckpt")):
        assert process.poll() is None
        time.sleep(0.005)
    # A terminal sends it to all the processes, `kill` to one.
    (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, err
    (line,) = err.splitlines()
    assert line.startswith(f"stopped by {signal.Signals(signum).name}: step ")
    assert not out
    steps = int(line.split("step ")[1].split()[0])
    last = torch.load(tmp_path / "version_0" / "last.ckpt", weights_only=True)
    assert last["callbacks"]["StepLimit"]["steps"] == steps
