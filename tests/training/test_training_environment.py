"""What a shell, a job or a notebook leaves in the environment changes no run."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("training.lightning", reason="needs the extra [train]")

from test_training_scripts import DIGITS, ENVIRONMENT, SMALL, call, command

from training.run import processes

__all__ = ["call"]

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

RESULT = {"train": "result.json", "compare": "report.json", "train_lm": "report.json"}
LEFT = {
    "slurm": {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "job", "SLURM_PROCID": "2"},
    "slurm of two nodes": {
        **{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"},
        **{"SLURM_JOB_NAME": "job", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"},
    },
    "torchrun": {
        **{"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "GROUP_RANK": "1"},
        **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"},
        **{"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"},
    },
    "a rank": {"LOCAL_RANK": "1", "NODE_RANK": "1"},
    "mpi": {"OMPI_COMM_WORLD_RANK": "1", "JSM_NAMESPACE_RANK": "1", "PMI_RANK": "1"},
    "notebook": {"MPLBACKEND": "module://no_such_notebook.backend_inline"},
    "no backend": {"MPLBACKEND": "nonsense"},
}


@pytest.mark.parametrize("script", SMALL)
def test_a_process_that_finds_itself_ranked_by_a_job_leaves_its_results(
    call: Callable[..., None], monkeypatch, tmp_path: Path, script: str
):
    for left in LEFT.values():
        for name, value in left.items():
            monkeypatch.setenv(name, value)
    call(script, *SMALL[script], "--max-steps", 3, "--out", tmp_path)
    assert json.loads((tmp_path / "version_0" / RESULT[script]).read_text())["steps"] == 3
    assert list(tmp_path.rglob("metrics.csv"))


# As processes: what Lightning and matplotlib read, they read when they are imported.
@pytest.mark.parametrize("left", LEFT)
def test_whatever_was_left_in_the_environment_a_run_leaves_its_results(tmp_path: Path, left: str):
    ended = subprocess.run(
        command("train", *SMALL["train"], "--max-steps", 12, "--out", tmp_path),
        env={**ENVIRONMENT, **LEFT[left]},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr
    assert json.loads((tmp_path / "version_0" / "result.json").read_text())["steps"] == 12
    assert len(list(tmp_path.rglob("metrics.csv"))) == 1


def test_two_processes_find_each_other_beside_the_variables_of_another_launcher(tmp_path: Path):
    settings = (*DIGITS, "--model", "linear", "--epochs", 1, "--devices", 2)
    left = {name: value for left in LEFT.values() for name, value in left.items()}
    ended = subprocess.run(
        command("train", *settings, "--out", tmp_path),
        env={**ENVIRONMENT, **left},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 1
    assert json.loads((tmp_path / "version_0" / "result.json").read_text())["steps"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["version_0"]


def test_a_process_believes_its_own_parent_alone(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUSTOM_OPS_RUN", f"{os.getppid()} {tmp_path}")
    assert processes.launched_in() == tmp_path
    processes.forget_places()
    assert os.environ["LOCAL_RANK"] == "1"
    monkeypatch.setenv("CUSTOM_OPS_RUN", f"{os.getppid() + 1} {tmp_path}")
    assert processes.launched_in() is None
    processes.forget_places()
    assert "LOCAL_RANK" not in os.environ


def test_what_lightning_refuses_is_one_line_before_anything_is_written(
    call: Callable[..., None], capsys, monkeypatch, tmp_path: Path
):
    from training.run import start

    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("these\nsettings  cannot be")

    monkeypatch.setattr(start, "Trainer", refuse)
    for script in SMALL:
        with pytest.raises(SystemExit) as exit:
            call(script, *SMALL[script], "--out", tmp_path / "run")
        assert exit.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("error: Lightning refuses: these settings cannot be")
    assert not (tmp_path / "run").exists()
