"""The folders of runs: `version_0`, `version_1`, … in one place, each run in its own.

A folder is a run's if its settings bear our mark. Nothing is ever deleted, and nothing outside the
run's own folder is written: what else lies beside the folders, or bears such a name, stays.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from training.refusal import Refused

SETTINGS = "settings.json"
CHECKPOINT = "last.ckpt"

_MARK = "made by custom_ops/scripts"
_VERSION = re.compile(r"version_(\d+)")


def find(out: Path, command: str) -> Path:
    """Return the folder of the newest run of `command` in `out`, or `out` if it is one itself.

    Raise `Refused` if there is none with a checkpoint.
    """
    runs = [path for path in (out, *_newest_first(out)) if _is_run(path, command)]
    if not runs:
        raise Refused(
            f"--resume: there is no checkpoint in {out}, nor in a version_N there that {command} "
            "made; start without --resume, or name the run's folder with --out"
        )
    run = runs[0]
    if not any(run.rglob(CHECKPOINT)):
        raise Refused(
            f"--resume: there is no checkpoint in {run}; start without --resume, or name another "
            "run's folder with --out"
        )
    return run


def next_version(out: Path) -> Path:
    """Return the folder of a new run in `out`; it does not exist yet."""
    numbers = [_number(path) for path in _newest_first(out)]
    return out / f"version_{max(numbers, default=-1) + 1}"


def claim(out: Path) -> Path:
    """Make the folder of a new run in `out`, and return it; no other process gets the same."""
    while True:
        folder = next_version(out)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not os.path.lexists(folder):
                raise  # `out` is no folder
            continue
        return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; raise `Refused` if one is in there."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Refused(f"{folder} is in use: another process trains there") from error
    try:
        yield
    finally:
        lock.release()


def save_settings(folder: Path, command: str, settings: dict[str, Any]) -> None:
    """Write what a run was asked for, with the mark that makes the folder a run's."""
    write_json(folder / SETTINGS, {"mark": _MARK, "command": command, **settings})


def load_settings(folder: Path) -> dict[str, Any]:
    """Return what a run was asked for."""
    settings = _settings(folder)
    return {name: value for name, value in settings.items() if name not in ("mark", "command")}


def read_json(path: Path) -> Any:
    """Return what is in a JSON file; raise `Refused` if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise Refused(f"{path} is damaged: it is no JSON ({error})") from error


def write_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    """Write JSON as a whole or not at all. Raise `ValueError` for a number that is not finite."""
    text = json.dumps(content, indent=indent, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, and put it in its place in one system call.

    Whatever happens, `path` is the whole new content or what was there before. The file beside it
    has the process's number in its name: two processes never write the same.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the content before the name, should the machine go down
        part.replace(path)
    except OSError as error:
        # The system names no file where a write fails, only where an opening does.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def _newest_first(out: Path) -> list[Path]:
    if not out.is_dir():
        return []
    versions = [path for path in out.iterdir() if _VERSION.fullmatch(path.name)]
    return sorted(versions, key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("version_"))


def _is_run(folder: Path, command: str) -> bool:
    if not (folder / SETTINGS).is_file():
        return False
    settings = _settings(folder)
    return settings.get("mark") == _MARK and settings.get("command") == command


def _settings(folder: Path) -> dict[str, Any]:
    settings = read_json(folder / SETTINGS)
    return settings if isinstance(settings, dict) else {}
