"""What goes wrong is said in one line, and costs nothing that was there."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("training.lightning", reason="needs the extra [train]")

from test_training_scripts import DIGITS, ENVIRONMENT, SMALL, call, command, report

from training.data import mnist
from training.networks import heads
from training.run import checkpoint, folder
from training.run.folder import write_json

__all__ = ["call"]

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


@pytest.fixture
def refusal(call: Callable[..., None], capsys) -> Callable[..., str]:
    """The one line of a command that ends with 2."""

    def refusal(script: str, *arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            call(script, *arguments)
        assert exit.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return refusal


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head `custom` answers NaN."""
    right = heads.HEADS["custom"]

    def head(*arguments: Any) -> torch.Tensor:
        return right(*arguments) * math.nan

    monkeypatch.setitem(heads.HEADS, "custom", head)


# A head that breaks, and a run that diverges.
@pytest.mark.parametrize("lr", [0.05, 3e38])
def test_a_loss_that_is_not_finite_is_null_a_sentence_and_a_failure(
    call: Callable[..., None], capsys, request, tmp_path: Path, lr: float
):
    if lr < 1:
        request.getfixturevalue("broken")
    for again in ((), ("--resume",)):  # not for ever: a resumed run says it as well
        settings = again or (*DIGITS, "--model", "linear", "--max-steps", 5, "--lr", lr)
        (tmp_path / "version_0" / "result.json").unlink(missing_ok=True)
        with pytest.raises(SystemExit) as exit:
            call("train", *settings, "--no-progress", "--out", tmp_path)
        assert exit.value.code == 1
        result = json.loads((tmp_path / "version_0" / "result.json").read_text())
        assert result["test_loss"] is None
        assert result["steps"] == 5
        assert "the loss is not finite" in capsys.readouterr().out


def test_the_best_of_losses_that_are_not_finite_is_a_failure_too(
    call: Callable[..., None], broken, tmp_path: Path
):
    settings = (*DIGITS, "--model", "linear", "--epochs", 2, "--keep-best")
    with pytest.raises(SystemExit) as exit:
        call("train", *settings, "--out", tmp_path)
    assert exit.value.code == 1
    assert json.loads((tmp_path / "version_0" / "result.json").read_text())["test_loss"] is None


def test_a_comparison_with_a_broken_head_names_it_and_fails(
    call: Callable[..., None], broken, capsys, tmp_path: Path
):
    settings = (*DIGITS, "--model", "linear", "--max-steps", 12, "--seeds", 2)
    with pytest.raises(SystemExit) as exit:
        call("compare", *settings, "--out", tmp_path)
    assert exit.value.code == 1
    content = report(tmp_path)
    assert content["heads"]["custom"]["test_loss"] is None
    assert content["heads"]["jacobian"]["test_loss"] is not None
    assert content["sentence"].startswith(
        "custom is not finite at 24 of 24 steps and 4 of 4 probes"
    )
    assert "not finite, 4" in capsys.readouterr().out
    assert (tmp_path / "version_0" / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize("script", SMALL)
def test_a_damaged_checkpoint_is_one_line_that_names_it(
    call: Callable[..., None], refusal, tmp_path: Path, script: str
):
    call(script, *SMALL[script], "--max-steps", 3, "--out", tmp_path)
    (path,) = tmp_path.rglob("last.ckpt")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        path.write_bytes(content)
        line = refusal(script, "--resume", "--max-steps", 5, "--no-progress", "--out", tmp_path)
        assert f"{path} is damaged" in line
    torch.save({"state_dict": {}}, path)
    line = refusal(script, "--resume", "--max-steps", 5, "--no-progress", "--out", tmp_path)
    assert f"{path} is not the checkpoint of such a run" in line


def test_damaged_best_weights_are_one_line_that_names_them(
    call: Callable[..., None], refusal, tmp_path: Path
):
    settings = (*DIGITS, "--model", "linear", "--epochs", 1, "--keep-best")
    call("train", *settings, "--out", tmp_path)
    run = tmp_path / "version_0"
    (run / "result.json").unlink()
    (run / "best.ckpt").write_bytes(b"half")
    line = refusal("train", "--resume", "--no-progress", "--out", tmp_path)
    assert f"{run / 'best.ckpt'} is damaged" in line
    assert not (run / "result.json").exists()


@pytest.mark.parametrize("script", SMALL)
def test_a_run_without_its_checkpoint_is_not_begun_anew(
    call: Callable[..., None], refusal, tmp_path: Path, script: str
):
    call(script, *SMALL[script], "--max-steps", 3, "--out", tmp_path)
    (path,) = tmp_path.rglob("last.ckpt")
    path.unlink()
    line = refusal(script, "--resume", "--max-steps", 5, "--no-progress", "--out", tmp_path)
    assert f"there is no checkpoint in {tmp_path / 'version_0'}" in line


@pytest.mark.parametrize("script", SMALL)
def test_a_run_in_use_is_one_line(call: Callable[..., None], refusal, tmp_path: Path, script: str):
    call(script, *SMALL[script], "--max-steps", 3, "--out", tmp_path)
    with folder.locked(tmp_path / "version_0"):
        line = refusal(script, "--resume", "--max-steps", 5, "--no-progress", "--out", tmp_path)
        assert f"{tmp_path / 'version_0'} is in use" in line
        call(script, *SMALL[script], "--max-steps", 3, "--out", tmp_path)
    assert (tmp_path / "version_1").is_dir()


@pytest.mark.parametrize("script", SMALL)
def test_a_place_that_cannot_be_written_is_one_line(refusal, tmp_path: Path, script: str):
    (tmp_path / "file").write_text("")
    line = refusal(script, *SMALL[script], "--out", tmp_path / "file" / "runs")
    assert str(tmp_path / "file") in line


@pytest.mark.parametrize("script", SMALL)
def test_a_disk_that_is_full_is_one_line_and_the_checkpoint_stays(
    call: Callable[..., None], refusal, monkeypatch, tmp_path: Path, script: str
):
    settings = (*SMALL[script], "--checkpoint-every", 2, "--out", tmp_path)
    call(script, *settings, "--max-steps", 4)
    (path,) = tmp_path.rglob("last.ckpt")
    before = path.read_bytes()

    class Full:
        """A file on a disk that has room for a little."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, content: bytes) -> int:
            if self.file.tell() + len(content) > 2000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content)

        def flush(self) -> None:
            self.file.flush()

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: save(content, Full(file)))
    line = refusal(script, "--resume", "--max-steps", 9, "--no-progress", "--out", tmp_path)
    assert str(path) in line
    assert path.read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_a_log_that_cannot_be_written_is_one_line(
    refusal, monkeypatch, tmp_path: Path, logger: str
):
    from training.run import start

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kind = start.CSVLogger if logger == "csv" else start.TensorBoardLogger
    monkeypatch.setattr(kind, "log_metrics", full)
    settings = (*SMALL["train"], "--max-steps", 12, "--logger", logger)
    line = refusal("train", *settings, "--out", tmp_path)
    assert f"{tmp_path / 'version_0'}: No space left on device" in line


@pytest.mark.parametrize("script", ["train", "compare"])
def test_mnist_that_cannot_be_read_is_one_line(refusal, monkeypatch, tmp_path: Path, script: str):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in mnist.MD5:
        (raw / name).write_bytes(b"")

    def unreadable(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    line = refusal(script, "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert f"{raw / 'train-images-idx3-ubyte'}: Permission denied" in line
    assert not (tmp_path / "run").exists()


def test_a_result_that_is_damaged_is_one_line(call: Callable[..., None], refusal, tmp_path: Path):
    call("train", *SMALL["train"], "--max-steps", 3, "--out", tmp_path)
    path = tmp_path / "version_0" / "result.json"
    path.write_text("{")
    line = refusal("train", "--resume", "--no-progress", "--out", tmp_path)
    assert f"{path} is damaged" in line


def test_a_run_that_was_killed_before_its_first_checkpoint_is_no_run_to_resume(
    refusal, tmp_path: Path
):
    run = folder.claim(tmp_path)
    write_json(run / folder.SETTINGS, {"mark": "of another"})
    line = refusal("train", "--resume", "--out", tmp_path)
    assert f"there is no checkpoint in {tmp_path}" in line


def test_a_checkpoint_that_is_not_there_has_no_steps(tmp_path: Path):
    assert checkpoint.steps_done(tmp_path / "last.ckpt") == 0


@pytest.mark.parametrize("script", ["train", "compare"])
@pytest.mark.parametrize("output", ["a reader that has gone", "ascii"])
def test_the_results_are_there_whatever_becomes_of_the_text(
    tmp_path: Path, script: str, output: str
):
    read, write = os.pipe()
    gone = output != "ascii"
    if gone:
        os.close(read)
    ended = subprocess.run(
        command(script, *SMALL[script], "--max-steps", 3, "--out", tmp_path),
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        stdout=write if gone else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(write)
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr
    name = "result.json" if script == "train" else "report.png"
    assert (tmp_path / "version_0" / name).is_file()
    if not gone:
        os.close(read)
        assert ended.stdout.isascii()
        assert script == "train" or " us" in ended.stdout
