"""The command for a day with a device, as far as it goes without one."""

import importlib
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("check_device")


def test_all_of_it_takes_ten_minutes(script, tmp_path):
    parts = script.parts(tmp_path)
    assert sum(part.limit for part in parts) <= 600
    assert len({part.name for part in parts}) == len(parts)


def test_what_it_measures_is_there(script, tmp_path):
    pytest.importorskip("rich", reason="needs the extra [train]")
    cases = importlib.import_module("benchmarks.device_cases")
    names = [f"step: {case.name}" for case in cases.STEPS]
    names += [layer.name for layer in cases.LAST_LAYERS]
    names += [f"curve: {case.name}" for case in cases.CURVE]
    names += [case.name for case in cases.CASES]
    for part in script.parts(tmp_path):
        assert Path(part.command[1]).exists() or part.command[1] == "-m"
        if "--only" in part.command:
            only = part.command[part.command.index("--only") + 1]
            assert any(only in name for name in names), part


@pytest.mark.parametrize("code", [0, 3])
def test_a_part_tells_how_it_ended_and_keeps_what_it_said(script, tmp_path, code):
    command = (sys.executable, "-c", f"print('here'); raise SystemExit({code})")
    line = script.run(script.Part("a part", command, 300), tmp_path)
    assert line.startswith(f"a part: ended with {code} ")
    assert (tmp_path / "a part.txt").read_text() == "here\n"


def test_a_part_that_goes_on_is_ended_at_its_limit(script, tmp_path):
    """With the processes that it has started."""
    started = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sleep]); "
    sleep = "import time; time.sleep(3600)"
    command = (
        sys.executable,
        "-c",
        f"sleep = {sleep!r}; {started}print(p.pid, flush=True); p.wait()",
    )
    line = script.run(script.Part("a part", command, 10), tmp_path)
    assert line.startswith("a part: ended at its limit")
    child = Path("/proc") / (tmp_path / "a part.txt").read_text().strip() / "stat"
    while is_running(child):  # a signal takes its time; pytest's own limit ends this
        time.sleep(0.01)


def is_running(status: Path) -> bool:
    """Whether the process of this file is there, and is not one that has only to be counted."""
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
