"""The driver's version comes from its own program, or is not known."""

import stat
from pathlib import Path

import pytest

from training.driver import driver_version


@pytest.fixture
def program(tmp_path: Path, monkeypatch):
    """Put a program of that name where the shell looks first."""

    def put(script: str) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)

    monkeypatch.setenv("PATH", str(tmp_path))
    return put


def test_the_first_devices_driver_is_named(program):
    program('echo "580.65.06"; echo "580.65.06"')
    assert driver_version() == "580.65.06"


@pytest.mark.parametrize("script", ["exit 9", "true"])
def test_a_program_that_fails_or_says_nothing_leaves_it_unknown(program, script):
    program(script)
    assert driver_version() is None


def test_without_the_program_it_is_unknown(program):
    assert driver_version() is None
