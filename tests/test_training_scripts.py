"""The command lines: as processes where a process is what is tested, else called."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("training.lightning", reason="needs the extra [train]")

from torchvision.datasets import MNIST

from training import mnist
from training.checkpoint import AtomicCheckpointIO

# Lightning's own use of torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

SCRIPTS = Path(__file__).parents[1] / "scripts"
DIGITS = ("--data", "digits", "--accelerator", "cpu", "--no-progress")

# One thread: a sum over two is rounded in two ways. No mirror of MNIST behind this proxy.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
}


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPTS / f"{script}.py"), *map(str, arguments)]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(script, *arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call a script's `main`, without the seconds that a process takes to import Lightning."""

    def call(script: str, *arguments: object) -> None:
        spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main([str(argument) for argument in arguments])

    return call


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "last.ckpt", weights_only=True)


def same_weights(a: Path, b: Path) -> bool:
    first, second = checkpoint(a)["state_dict"], checkpoint(b)["state_dict"]
    return all(torch.equal(first[key], second[key]) for key in first | second)


@pytest.mark.parametrize("script", ["train", "compare"])
def test_killed_in_mid_epoch_and_resumed_ends_at_the_same_weights(tmp_path: Path, script: str):
    # 131 batches an epoch: no checkpoint before the last falls on an epoch's end.
    settings = (*DIGITS, "--model", "mlp", "--batch-size", 11, "--epochs", 2)
    settings = (*settings, "--checkpoint-every", 10)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    ended = run(script, *settings, "--out", undisturbed)
    assert ended.returncode == 0, ended.stderr

    with subprocess.Popen(
        command(script, *settings, "--out", killed),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not (killed / "last.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (loader,) = checkpoint(killed)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert 0 < loader["served"] < 2 * 131
    assert loader["served"] % 131 != 0
    assert not same_weights(undisturbed, killed)

    resumed = run(script, "--resume", "--out", killed, "--no-progress")
    assert resumed.returncode == 0, resumed.stderr
    assert same_weights(undisturbed, killed)
    if script == "compare":
        reports = [json.loads((out / "report.json").read_text()) for out in (undisturbed, killed)]
        assert reports[0]["series"]["loss"] == reports[1]["series"]["loss"]
        assert reports[0]["differences"] == reports[1]["differences"]
        assert reports[1]["series"]["starts"] == [0, loader["served"]]


# 15 batches an epoch: interrupted within one, at the end of one, at the end of training.
@pytest.mark.parametrize("script", ["train", "compare"])
@pytest.mark.parametrize("first", [("--max-steps", 20), ("--max-steps", 15), ("--epochs", 1)])
def test_a_finished_run_can_be_continued(
    call: Callable[..., None], tmp_path: Path, script: str, first: tuple[str, int]
):
    settings = (*DIGITS, "--model", "mlp", "--batch-size", 100, "--logger", "none")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(script, *settings, "--epochs", 2, "--out", whole)
    call(script, *settings, "--epochs", 2, *first, "--out", parts)
    more = ("--epochs", 2, "--max-steps", 1000)
    call(script, "--resume", "--out", parts, "--no-progress", *more)
    assert same_weights(whole, parts)


def test_resuming_after_the_last_step_only_tests(call: Callable[..., None], tmp_path: Path):
    settings = (*DIGITS, "--model", "linear", "--max-steps", 9, "--logger", "none")
    call("train", *settings, "--out", tmp_path)
    result = (tmp_path / "result.json").read_text()
    (tmp_path / "result.json").unlink()  # killed between the last checkpoint and the result
    before = checkpoint(tmp_path)["state_dict"]
    call("train", "--resume", "--out", tmp_path, "--no-progress")
    assert (tmp_path / "result.json").read_text() == result
    after = checkpoint(tmp_path)["state_dict"]
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("script", ["train", "compare"])
def test_resuming_a_finished_run_says_so(
    call: Callable[..., None], capsys, tmp_path: Path, script: str
):
    settings = (*DIGITS, "--model", "linear", "--max-steps", 3, "--logger", "none")
    call(script, *settings, "--out", tmp_path)
    capsys.readouterr()
    call(script, "--resume", "--out", tmp_path)
    assert f"{tmp_path} has finished" in capsys.readouterr().out


def test_a_fresh_run_leaves_nothing_of_the_earlier_one(call: Callable[..., None], tmp_path: Path):
    settings = (*DIGITS, "--model", "linear", "--max-steps", 3)
    call("train", *settings, "--out", tmp_path)
    stale = tmp_path / "logs" / "version_0" / "stale"
    stale.touch()
    (tmp_path / "mine").touch()
    call("train", *settings, "--out", tmp_path)
    assert not stale.exists()
    assert (tmp_path / "mine").exists()


def test_a_write_that_breaks_off_leaves_the_checkpoint_before_it(monkeypatch, tmp_path: Path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def break_off(checkpoint: object, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_checkpoint_is_replaced_and_never_written_over(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with path.open("rb") as before:  # the old file lives as long as it is open
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
        assert torch.load(before, weights_only=True) == {"step": 1}
    assert torch.load(path, weights_only=True) == {"step": 2}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_compare_leaves_its_report(call: Callable[..., None], capsys, tmp_path: Path, logger: str):
    call("compare", *DIGITS, "--max-steps", 12, "--logger", logger, "--out", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == 12
    assert list(report["heads"]) == ["builtin", "jacobian", "custom", "custom-fused"]
    assert report["settings"]["data"] == "digits"
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert list((tmp_path / "logs").rglob("metrics.csv" if logger == "csv" else "events.*"))
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 80


LM = ("--vocabulary", 4096, "--width", 32, "--context", 64, "--accelerator", "cpu")


def test_train_lm_leaves_its_report(call: Callable[..., None], capsys, tmp_path: Path):
    call("train_lm", *LM, "--max-steps", 12, "--no-progress", "--out", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == 12
    builtin, fused = report["heads"].values()
    assert list(report["heads"]) == ["builtin", "custom-fused"]
    assert report["settings"]["vocabulary"] == 4096
    assert builtin["final_loss"] == pytest.approx(fused["final_loss"], rel=1e-5)
    assert builtin["final_loss"] < report["series"]["loss"]["builtin"][0] - 0.5
    logits = 8 * 64 * 4096 * 4
    assert builtin["peak_bytes"] > 2 * logits
    assert max(report["differences"]["custom-fused"]["same_weights"]["gradients"]) < 1e-6
    assert (tmp_path / "report.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "tokens a second" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 80


def test_train_lm_goes_on_where_it_stopped(call: Callable[..., None], tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call("train_lm", *LM, "--max-steps", 6, "--no-progress", "--out", whole)
    call("train_lm", *LM, "--max-steps", 3, "--no-progress", "--out", parts)
    call("train_lm", "--resume", "--max-steps", 6, "--no-progress", "--out", parts)
    assert same_weights(whole, parts)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64"])
def test_other_precisions(call: Callable[..., None], tmp_path: Path, precision: str):
    settings = (*DIGITS, "--model", "mlp", "--max-steps", 12, "--logger", "none")
    call("compare", *settings, "--precision", precision, "--out", tmp_path)
    differences = json.loads((tmp_path / "report.json").read_text())["differences"]
    bound = 1e-15 if precision == "64" else 1e-2
    for difference in differences.values():
        assert max(difference["same_weights"]["gradients"]) <= bound
        assert difference["same_weights"]["loss"] <= 1e-6


@pytest.mark.parametrize("head", ["custom", "custom-fused"])
def test_two_processes_train_one_model(tmp_path: Path, head: str):
    settings = (*DIGITS, "--model", "linear", "--epochs", 2, "--devices", 2, "--head", head)
    ended = run("train", *settings, "--out", tmp_path)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 2 * 6  # 718 examples each
    assert result["test_accuracy"] > 0.8
    assert len(ended.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("compare", ("--devices", 2), "--devices 2: the comparison runs on one device"),
        ("compare", ("--precision", "16-mixed", "--accelerator", "cpu"), "16-mixed needs CUDA"),
        ("train", ("--devices", 5000, "--accelerator", "cpu"), "--devices 5000: this machine has"),
        ("train", ("--batch-size", 0), "expected a whole number from 1, got 0"),
        ("train_lm", ("--devices", 2), "--devices 2: the comparison runs on one device"),
        ("train_lm", ("--vocabulary", 255), "expected a whole number from 256 to 131072, got 255"),
        ("train_lm", ("--width", 48), "--width: expected a multiple of 32, got 48"),
    ],
)
def test_what_cannot_be_is_one_line(
    call: Callable[..., None], capsys, script: str, arguments: tuple[object, ...], says: str
):
    with pytest.raises(SystemExit) as exit:
        call(script, *arguments)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_corrupt_file_is_one_line(call: Callable[..., None], capsys, tmp_path: Path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in mnist.MD5:
        (raw / name).write_bytes(b"not MNIST")
    with pytest.raises(SystemExit) as exit:
        call("compare", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{raw / 'train-images-idx3-ubyte'} is corrupt" in line


def test_mnist_by_name_without_mnist_is_one_line(
    call: Callable[..., None], monkeypatch, capsys, tmp_path: Path
):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(SystemExit) as exit:
        call("train", "--data", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: MNIST is not under {tmp_path} and cannot be downloaded" in line
    assert "--data-dir" in line
    assert not (tmp_path / "run").exists()


def test_auto_without_mnist_is_one_line_and_the_digits(tmp_path: Path):
    settings = ("--data-dir", tmp_path, "--max-steps", 3, "--model", "linear", "--no-progress")
    ended = run("compare", *settings, "--out", tmp_path / "run")
    assert ended.returncode == 0
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"MNIST is not under {tmp_path} and cannot be downloaded")
    assert "linear on digits: 3 steps" in ended.stdout


@pytest.mark.parametrize("script", ["compare", "train_lm"])
def test_help_is_there_without_lightning(tmp_path: Path, script: str):
    shadow = tmp_path / "pytorch_lightning.py"
    shadow.write_text("raise RuntimeError")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    helped = subprocess.run(
        command(script, "--help"), env=environment, capture_output=True, text=True, timeout=60
    )
    assert helped.returncode == 0
    assert "--resume" in helped.stdout
