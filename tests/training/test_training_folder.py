"""The folders of runs, without a run."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from training.refusal import Refused
from training.run import folder


def test_runs_are_numbered_one_after_the_other_past_whatever_bears_the_name(tmp_path: Path):
    out = tmp_path / "new" / "runs"
    assert folder.claim(out) == out / "version_0"
    (out / "version_7").write_text("no folder")
    (out / "version_12_old").mkdir()
    (out / "version_x").mkdir()
    assert folder.claim(out) == out / "version_8"


def test_a_folder_that_another_process_makes_at_the_same_moment_is_left_to_it(
    tmp_path: Path, monkeypatch
):
    numbers = iter([0, 0, 1])
    monkeypatch.setattr(folder, "next_version", lambda out: out / f"version_{next(numbers)}")
    (tmp_path / "version_0").mkdir()
    assert folder.claim(tmp_path) == tmp_path / "version_1"


def claim(out: Path, start, claimed) -> None:
    start.wait()
    claimed.put(folder.claim(out))


def test_processes_that_start_at_the_same_time_get_a_folder_each(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    start, claimed = context.Event(), context.Queue()
    processes = [context.Process(target=claim, args=(tmp_path, start, claimed)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    got = {claimed.get() for _ in processes}
    for process in processes:
        process.join()
    assert got == {tmp_path / f"version_{i}" for i in range(4)}


def test_a_file_in_the_place_of_the_runs_is_an_error_that_names_it(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(OSError, match="file") as error:
            folder.claim(out)
        assert error.value.filename


def test_a_run_is_held_by_one_process_at_a_time(tmp_path: Path):
    with (
        folder.locked(tmp_path),
        pytest.raises(Refused, match=f"^{tmp_path} is in use"),
        folder.locked(tmp_path),
    ):
        pass
    with folder.locked(tmp_path):
        pass


def test_two_processes_never_write_into_the_same_part(tmp_path: Path):
    seen: list[str] = []

    def write(file: BinaryIO) -> None:
        seen.append(Path(file.name).name)
        file.write(b"whole")

    folder.write_whole(tmp_path / "x", write)
    assert str(os.getpid()) in seen[0]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_breaks_off_leaves_what_was_there_and_no_part(tmp_path: Path):
    path = tmp_path / "x.json"
    folder.write_json(path, {"a": 1})

    def full(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as error:
        folder.write_whole(path, full)
    assert error.value.filename == str(path)
    assert folder.read_json(path) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_number_that_is_not_finite_is_no_json(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())
