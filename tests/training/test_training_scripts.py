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

from training.classifier import Classifier
from training.data import DigitData, mnist
from training.run.checkpoint import AtomicCheckpointIO

# Lightning's own use of torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

SCRIPTS = Path(__file__).parents[2] / "scripts"
DIGITS = ("--data", "digits", "--accelerator", "cpu", "--no-progress")
LM = ("--vocabulary", 4096, "--width", 32, "--context", 64, "--accelerator", "cpu", "--no-progress")
SMALL = {
    "train": (*DIGITS, "--model", "linear"),
    "compare": (*DIGITS, "--model", "linear", "--seeds", 1),
    "train_lm": LM,
}

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
    """The one in the first run's folder, of `compare`'s in that of its first seed."""
    (path,) = (*out.glob("version_0/last.ckpt"), *out.glob("version_0/seed_0/last.ckpt"))
    return torch.load(path, weights_only=True)


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "version_0" / "report.json").read_text())


def same_weights(a: Path, b: Path) -> bool:
    first, second = checkpoint(a)["state_dict"], checkpoint(b)["state_dict"]
    return all(torch.equal(first[key], second[key]) for key in first | second)


@pytest.mark.parametrize("script", ["train", "compare"])
def test_killed_in_mid_epoch_and_resumed_ends_at_the_same_weights(tmp_path: Path, script: str):
    # 131 batches an epoch, 118 with a validation set apart: no checkpoint falls on an epoch's end.
    settings = (*DIGITS, "--model", "mlp", "--batch-size", 11, "--epochs", 2)
    settings = (*settings, "--checkpoint-every", 10)
    settings += ("--seeds", 1) if script == "compare" else ()
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    ended = run(script, *settings, "--out", undisturbed)
    assert ended.returncode == 0, ended.stderr

    with subprocess.Popen(
        command(script, *settings, "--out", killed),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not list(killed.rglob("last.ckpt")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (loader,) = checkpoint(killed)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    batches = 131 if script == "compare" else 118
    assert 0 < loader["served"] < batches
    assert not same_weights(undisturbed, killed)

    resumed = run(script, "--resume", "--out", killed, "--no-progress")
    assert resumed.returncode == 0, resumed.stderr
    assert same_weights(undisturbed, killed)
    if script == "compare":
        reports = [report(out) for out in (undisturbed, killed)]
        series = [content["seeds"][0]["series"] for content in reports]
        assert series[0]["loss"] == series[1]["loss"]
        assert reports[0]["differences"] == reports[1]["differences"]
        assert series[1]["starts"] == [0, loader["epoch"] * batches + loader["served"]]


# 15 batches an epoch: interrupted within one, at the end of one, at the end of training.
@pytest.mark.parametrize("script", ["train", "compare"])
@pytest.mark.parametrize("first", [("--max-steps", 20), ("--max-steps", 15), ("--epochs", 1)])
def test_a_finished_run_can_be_continued(
    call: Callable[..., None], tmp_path: Path, script: str, first: tuple[str, int]
):
    settings = (*DIGITS, "--model", "mlp", "--batch-size", 100, "--logger", "none")
    settings += ("--seeds", 1) if script == "compare" else ("--validation", 0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(script, *settings, "--epochs", 2, "--out", whole)
    call(script, *settings, "--epochs", 2, *first, "--out", parts)
    more = ("--epochs", 2, "--max-steps", 1000)
    call(script, "--resume", "--out", parts, "--no-progress", *more)
    assert same_weights(whole, parts)


# 13 batches an epoch beside the validation set, seen after each.
@pytest.mark.parametrize("first", [20, 13, 26])
def test_a_run_with_a_validation_set_can_be_continued(
    call: Callable[..., None], tmp_path: Path, first: int
):
    settings = (*DIGITS, "--model", "mlp", "--batch-size", 100, "--keep-best", "--epochs", 3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call("train", *settings, "--out", whole)
    call("train", *settings, "--max-steps", first, "--out", parts)
    call("train", "--resume", "--out", parts, "--no-progress", "--max-steps", 1000)
    assert same_weights(whole, parts)
    results = [(out / "version_0" / "result.json").read_text() for out in (whole, parts)]
    assert results[0] == results[1]


def test_seeds_can_be_added_and_the_earlier_ones_stay(call: Callable[..., None], tmp_path: Path):
    settings = (*DIGITS, "--model", "linear", "--max-steps", 6)
    call("compare", *settings, "--seeds", 2, "--out", tmp_path)
    before = report(tmp_path)
    outcome = tmp_path / "version_0" / "seed_1" / "outcome.pt"
    written = outcome.stat().st_mtime_ns
    call("compare", "--resume", "--seeds", 3, "--no-progress", "--out", tmp_path)
    after = report(tmp_path)
    assert [seed["seed"] for seed in after["seeds"]] == [0, 1, 2]
    assert after["seeds"][:2] == before["seeds"]
    assert outcome.stat().st_mtime_ns == written


def test_every_seed_is_the_comparison_of_that_seed_alone(call: Callable[..., None], tmp_path: Path):
    settings = (*DIGITS, "--model", "linear", "--max-steps", 6)
    call("compare", *settings, "--seeds", 2, "--seed", 3, "--out", tmp_path / "both")
    call("compare", *settings, "--seeds", 1, "--seed", 4, "--out", tmp_path / "one")
    both, one = report(tmp_path / "both"), report(tmp_path / "one")
    assert both["seeds"][1]["series"]["loss"] == one["seeds"][0]["series"]["loss"]
    assert both["seeds"][0]["series"]["loss"] != one["seeds"][0]["series"]["loss"]
    for name, right in one["answers"]["right"].items():
        assert both["answers"]["right"][name][1] == right[0]


def test_resuming_after_the_last_step_only_tests(call: Callable[..., None], tmp_path: Path):
    settings = (*DIGITS, "--model", "linear", "--max-steps", 9, "--logger", "none")
    call("train", *settings, "--out", tmp_path)
    path = tmp_path / "version_0" / "result.json"
    result = path.read_text()
    path.unlink()  # killed between the last checkpoint and the result
    before = checkpoint(tmp_path)["state_dict"]
    call("train", "--resume", "--out", tmp_path, "--no-progress")
    assert path.read_text() == result
    after = checkpoint(tmp_path)["state_dict"]
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("script", ["train", "compare"])
@pytest.mark.parametrize(
    ("limits", "binding"),
    [(("--max-steps", 3), "--max-steps 3"), (("--epochs", 1, "--max-steps", 50), "--epochs 1")],
)
def test_resuming_a_finished_run_names_the_limit_that_binds(
    call: Callable[..., None], capsys, tmp_path: Path, script: str, limits, binding: str
):
    settings = (*DIGITS, "--model", "linear", *limits, "--logger", "none")
    settings += ("--seeds", 1) if script == "compare" else ()
    call(script, *settings, "--out", tmp_path)
    capsys.readouterr()
    call(script, "--resume", "--out", tmp_path, "--no-progress")
    said = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path / 'version_0'} has finished" in said
    assert f"It ended at {binding}; more would continue it." in said


@pytest.mark.parametrize("script", ["train", "compare", "train_lm"])
@pytest.mark.parametrize("lower", [("--max-steps", 2), ("--epochs", 1, "--max-steps", 4)])
def test_a_lower_target_than_what_was_done_is_refused(
    call: Callable[..., None], capsys, tmp_path: Path, script: str, lower
):
    settings = SMALL[script]
    call(script, *settings, "--max-steps", 5, "--out", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        call(script, "--resume", "--out", tmp_path, "--no-progress", *lower)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    steps = lower[-1]
    assert f"--max-steps {steps}: the run in {tmp_path / 'version_0'} has taken 5 steps" in line
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_steps_that_are_reported_are_those_that_were_taken(
    call: Callable[..., None], capsys, tmp_path: Path
):
    settings = (*DIGITS, "--model", "linear", "--batch-size", 100, "--epochs", 2)
    call("train", *settings, "--max-steps", 4, "--out", tmp_path)
    call("train", "--resume", "--out", tmp_path, "--no-progress", "--max-steps", 9)
    assert "after 9 steps" in capsys.readouterr().out
    assert json.loads((tmp_path / "version_0" / "result.json").read_text())["steps"] == 9


def test_every_run_has_a_folder_of_its_own_and_nothing_else_is_touched(
    call: Callable[..., None], tmp_path: Path
):
    foreign = {
        "settings.json": '{"mine": 1}',
        "last.ckpt": "mine",
        "result.json": "mine",
        "logs/version_0/metrics.csv": "mine",
        "version_0/settings.json": '{"mine": 2}',
        "version_0/last.ckpt": "mine",
        "version_1": "a file",
    }
    for name, content in foreign.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    settings = (*DIGITS, "--model", "linear", "--max-steps", 3)
    call("train", *settings, "--out", tmp_path)
    call("compare", *settings, "--seeds", 1, "--out", tmp_path)
    call("train", "--resume", "--max-steps", 4, "--no-progress", "--out", tmp_path)
    assert {name: (tmp_path / name).read_text() for name in foreign} == foreign
    assert json.loads((tmp_path / "version_2" / "result.json").read_text())["steps"] == 4
    assert (tmp_path / "version_3" / "report.json").is_file()
    assert len(list(tmp_path.iterdir())) == 4 + 4


def test_the_best_weights_are_kept_and_tested_if_asked_for(
    call: Callable[..., None], monkeypatch, tmp_path: Path
):
    def worse_after_the_first_epoch(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        return step(self, batch, index) * (1 if self.current_epoch == 0 else -1)

    step = Classifier.training_step
    monkeypatch.setattr(Classifier, "training_step", worse_after_the_first_epoch)
    settings = (*DIGITS, "--model", "mlp", "--epochs", 3, "--keep-best")
    call("train", *settings, "--out", tmp_path)
    run = tmp_path / "version_0"
    best, last = (torch.load(run / name, weights_only=True) for name in ("best.ckpt", "last.ckpt"))
    (callback,) = (v for k, v in last["callbacks"].items() if k.startswith("ModelCheckpoint"))
    assert callback["best_model_path"] == str(run / "best.ckpt")
    assert (best["epoch"], last["epoch"]) == (0, 2)
    result = json.loads((run / "result.json").read_text())
    assert result["tested"] == "best.ckpt"
    data = DigitData("digits")
    model = Classifier.load_from_checkpoint(run / "best.ckpt").eval()
    with torch.no_grad():
        answers = model(data.examples.test_inputs).argmax(1)
    assert result["test_right"] == (answers == data.examples.test_targets).sum()


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
    settings = ("--max-steps", 12, "--logger", logger, "--seeds", 2)
    call("compare", *DIGITS, *settings, "--out", tmp_path)
    content, run = report(tmp_path), tmp_path / "version_0"
    assert content["steps"] == 12
    assert list(content["heads"]) == ["builtin", "jacobian", "custom", "custom-fused"]
    assert content["settings"]["data"] == "digits"
    assert [seed["seed"] for seed in content["seeds"]] == [0, 1]
    assert (run / "report.png").stat().st_size > 10_000
    assert list((run / "seed_1" / "logs").rglob("metrics.csv" if logger == "csv" else "events.*"))
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert content["sentence"] in " ".join(printed.split())
    assert max(map(len, printed.splitlines()[:-1])) <= 80


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_a_resumed_run_keeps_the_logs_it_had(
    call: Callable[..., None], tmp_path: Path, logger: str
):
    settings = ("--model", "linear", "--max-steps", 12, "--logger", logger)
    call("train", *DIGITS, *settings, "--out", tmp_path)
    (first,) = (tmp_path / "version_0" / "logs").iterdir()
    before = {path: path.read_bytes() for path in first.iterdir()}
    call("train", "--resume", "--max-steps", 24, "--no-progress", "--out", tmp_path)
    assert before == {path: path.read_bytes() for path in first.iterdir()}
    assert len(list((tmp_path / "version_0" / "logs").iterdir())) == 2


def test_train_lm_leaves_its_report(call: Callable[..., None], capsys, tmp_path: Path):
    call("train_lm", *LM, "--max-steps", 12, "--out", tmp_path)
    content = report(tmp_path)
    assert content["steps"] == 12
    builtin, fused = content["heads"].values()
    assert list(content["heads"]) == ["builtin", "custom-fused"]
    assert content["settings"]["vocabulary"] == 4096
    assert builtin["final_loss"] == pytest.approx(fused["final_loss"], rel=1e-5)
    assert builtin["final_loss"] < content["seeds"][0]["series"]["loss"]["builtin"][0] - 0.5
    logits = 8 * 64 * 4096 * 4
    assert builtin["peak_bytes"] > 2 * logits
    assert max(content["differences"]["custom-fused"]["same_weights"]["gradients"]) < 1e-6
    assert (tmp_path / "version_0" / "report.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "tokens a second" in printed
    assert content["sentence"] in " ".join(printed.split())
    assert max(map(len, printed.splitlines()[:-1])) <= 80


def test_train_lm_goes_on_where_it_stopped(call: Callable[..., None], tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call("train_lm", *LM, "--max-steps", 6, "--out", whole)
    call("train_lm", *LM, "--max-steps", 3, "--out", parts)
    call("train_lm", "--resume", "--max-steps", 6, "--no-progress", "--out", parts)
    assert same_weights(whole, parts)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64"])
def test_other_precisions(call: Callable[..., None], tmp_path: Path, precision: str):
    settings = (*DIGITS, "--model", "mlp", "--max-steps", 12, "--logger", "none", "--seeds", 1)
    call("compare", *settings, "--precision", precision, "--out", tmp_path)
    differences = report(tmp_path)["differences"]
    bound = 1e-15 if precision == "64" else 1e-2
    for difference in differences.values():
        assert max(difference["same_weights"]["gradients"]) <= bound
        assert difference["same_weights"]["loss"] <= 1e-6


@pytest.mark.parametrize("head", ["custom", "custom-fused"])
def test_two_processes_train_one_model(tmp_path: Path, head: str):
    settings = (*DIGITS, "--model", "linear", "--epochs", 2, "--devices", 2, "--head", head)
    ended = run("train", *settings, "--out", tmp_path)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "version_0" / "result.json").read_text())
    assert result["steps"] == 2 * 6  # 646 examples each
    assert result["test_accuracy"] > 0.8
    assert len(ended.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("compare", ("--devices", 2), "--devices 2: the comparison runs on one device"),
        ("compare", ("--precision", "16-mixed", "--accelerator", "cpu"), "16-mixed needs CUDA"),
        ("train", ("--devices", 5000, "--accelerator", "cpu"), "--devices 5000: this machine has"),
        (
            "train",
            (*DIGITS, "--keep-best", "--validation", 0),
            "--keep-best needs a validation set",
        ),
        ("train", (*DIGITS, "--validation", 5), "--validation 5: expected 0, or from 10 to 1427"),
        ("compare", ("--seeds", 0), "expected a whole number from 1 to 1000, got 0"),
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
    settings += ("--seeds", 1)
    ended = run("compare", *settings, "--out", tmp_path / "run")
    assert ended.returncode == 0
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"MNIST is not under {tmp_path} and cannot be downloaded")
    assert "linear on digits: 3 steps" in ended.stdout


@pytest.mark.parametrize("script", ["compare", "train_lm"])
def test_help_is_there_without_lightning(tmp_path: Path, script: str):
    shadow = tmp_path / "pytorch_lightning.py"
    shadow.write_text("raise RuntimeError")
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
    helped = subprocess.run(
        command(script, "--help"), env=environment, capture_output=True, text=True, timeout=60
    )
    assert helped.returncode == 0
    assert "--resume" in helped.stdout
