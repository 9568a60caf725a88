from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.refusal import Refused
from training.run import arguments, folder
from training.run.arguments import Parser, kept


def parser() -> Parser:
    parser = Parser("A description.", "x")
    parser.add_argument("--head", default="custom")
    parser.add_argument("--seeds", type=int, default=1)
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
    from training.networks.models import MODELS

    heads = pytest.importorskip("training.networks.heads")
    assert set(arguments.MODELS) == set(MODELS)
    assert set(arguments.HEADS) == set(heads.HEADS)
    data = pytest.importorskip("training.data")
    assert arguments.DATA == data.NAMES


def started(out: Path, *argv: str) -> Path:
    """Leave a run's folder as a run that was started with `argv` would."""
    started = parser().parse([*argv, "--out", str(out)])
    if started.data == "auto":
        started.data = "digits"
    run = folder.claim(out)
    folder.save_settings(run, started.command, kept(started))
    (run / folder.CHECKPOINT).touch()
    return run


def resumed(out: Path, *argv: str):
    return parser().parse(["--resume", "--out", str(out), *argv])


def test_resume_takes_up_the_settings_and_may_raise_how_far_it_goes(tmp_path: Path):
    run = started(tmp_path, "--seed", "3", "--head", "jacobian", "--epochs", "2", "--seeds", "2")
    again = resumed(tmp_path, "--epochs", "5", "--seeds", "4")
    assert (again.run, again.seed, again.head, again.data) == (run, 3, "jacobian", "digits")
    assert (again.epochs, again.seeds) == (5, 4)


def test_resume_with_what_auto_found(tmp_path: Path):
    started(tmp_path)
    assert resumed(tmp_path, "--data", "auto").data == "digits"


def test_resume_finds_the_newest_run_or_the_one_that_is_named(tmp_path: Path):
    runs = [started(tmp_path, "--seed", str(seed)) for seed in range(11)]
    assert [run.name for run in runs[8:]] == ["version_8", "version_9", "version_10"]
    assert resumed(tmp_path).run == runs[10]
    assert resumed(runs[4]).seed == 4


def test_resume_passes_over_what_another_command_made(tmp_path: Path):
    run = started(tmp_path)
    other = folder.claim(tmp_path)
    folder.save_settings(other, "other", {})
    (other / folder.CHECKPOINT).touch()
    assert resumed(tmp_path).run == run


def test_resume_cannot_change_the_run(tmp_path: Path):
    run = started(tmp_path)
    with pytest.raises(Refused) as error:
        resumed(tmp_path, "--batch-size", "64")
    assert f"--batch-size 64: the run in {run} was started with --batch-size 128" in str(error)


def test_resume_cannot_take_seeds_away(tmp_path: Path):
    started(tmp_path, "--seeds", "3")
    with pytest.raises(Refused, match=r"--seeds 2: the run in .* was started with 3"):
        resumed(tmp_path, "--seeds", "2")


def test_resume_of_nothing(tmp_path: Path):
    with pytest.raises(Refused, match=f"--resume: there is no checkpoint in {tmp_path}"):
        resumed(tmp_path)


def test_a_run_whose_settings_are_missing_is_no_run(tmp_path: Path):
    (started(tmp_path) / folder.SETTINGS).unlink()
    with pytest.raises(Refused, match=f"--resume: there is no checkpoint in {tmp_path}"):
        resumed(tmp_path)


@pytest.mark.parametrize("content", ["", '{"mark"', "\x00\x01"])
def test_damaged_settings_are_a_line_that_names_them(tmp_path: Path, content: str):
    path = started(tmp_path) / folder.SETTINGS
    path.write_text(content)
    with pytest.raises(Refused, match=f"{path} is damaged"):
        resumed(tmp_path)


def test_settings_are_plain_json(tmp_path: Path):
    saved = json.loads((started(tmp_path) / folder.SETTINGS).read_text())
    assert saved["batch_size"] == 128


def test_paths_are_those_of_the_moment_they_were_given(tmp_path: Path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = started(tmp_path / "runs", "--data-dir", "data/mine")
    monkeypatch.chdir(tmp_path)
    assert resumed(tmp_path / "runs").data_dir == tmp_path / "here" / "data" / "mine"
    assert resumed(Path("runs")).run == run


def test_a_home_folder_is_found_in_every_way_of_writing_it(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for argv in (["--out=~/x"], ["--out", "~/x"], ["--out", str(tmp_path / "x")]):
        assert parser().parse(argv).out == tmp_path / "x"
