from __future__ import annotations

import json
from pathlib import Path

import pytest

from training import arguments
from training.arguments import Parser, checkpoint_path, save_settings


def parser() -> Parser:
    parser = Parser("A description.", out="runs/x")
    parser.add_argument("--head", default="custom")
    return parser


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit:
        parser().parse(argv)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--batch-size", "0"), "--batch-size: expected a whole number from 1, got 0"),
        (("--epochs", "x"), "--epochs: expected a whole number from 1, got x"),
        (("--seed", "-1"), "--seed: expected a whole number from 0, got -1"),
        (("--lr", "nan"), "--lr: expected a positive number, got nan"),
        (("--precision", "8"), "--precision: invalid choice: '8'"),
        (("--dta", "mnist"), "unrecognized arguments: --dta mnist"),
    ],
)
def test_a_bad_value_is_one_line(capsys, argv: tuple[str, ...], says: str):
    assert says in refusal(capsys, *argv)


def test_the_names_are_those_of_the_modules():
    from training.models import MODELS

    heads = pytest.importorskip("training.heads")
    assert set(arguments.MODELS) == set(MODELS)
    assert set(arguments.HEADS) == set(heads.HEADS)
    data = pytest.importorskip("training.data")
    assert arguments.DATA == data.NAMES


def started(out: Path, *argv: str) -> None:
    """Leave a run folder as a run that was started with `argv` would."""
    out.mkdir()
    started = parser().parse([*argv, "--out", str(out)])
    if started.data == "auto":
        started.data = "digits"
    save_settings(started)
    checkpoint_path(out).touch()


def test_resume_takes_up_the_settings_and_may_raise_the_epochs(tmp_path: Path):
    out = tmp_path / "run"
    started(out, "--seed", "3", "--head", "jacobian", "--epochs", "2", "--data-dir", "there")
    resumed = parser().parse(["--resume", "--out", str(out), "--epochs", "5"])
    assert (resumed.seed, resumed.head, resumed.data) == (3, "jacobian", "digits")
    assert (resumed.epochs, resumed.data_dir) == (5, Path("there"))


def test_resume_with_what_auto_found(tmp_path: Path):
    started(tmp_path / "run")
    resumed = parser().parse(["--resume", "--out", str(tmp_path / "run"), "--data", "auto"])
    assert resumed.data == "digits"


def test_resume_cannot_change_the_run(capsys, tmp_path: Path):
    out = tmp_path / "run"
    started(out)
    line = refusal(capsys, "--resume", "--out", str(out), "--batch-size", "64")
    assert f"--batch-size 64: the run in {out} was started with --batch-size 128" in line


def test_resume_of_nothing(capsys, tmp_path: Path):
    line = refusal(capsys, "--resume", "--out", str(tmp_path))
    assert f"--resume: there is no checkpoint in {tmp_path}" in line


def test_settings_are_plain_json(tmp_path: Path):
    started(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert saved["batch_size"] == 128
