"""A user's own LightningModule with our losses works from any folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("training.lightning", reason="needs the extra [train]")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "lightning_module.py"


def test_the_example_runs_beside_a_users_own_training_module(tmp_path: Path):
    shutil.copy(EXAMPLE, tmp_path)
    for name in ("training", "heads", "data"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    ended = subprocess.run(
        [sys.executable, EXAMPLE.name],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    right = int(ended.stdout.splitlines()[-1].split()[0])
    assert right > 330
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        *("data.py", "heads.py", "lightning_module.py", "training.py")
    ]


def test_the_example_stands_in_the_documentation():
    assert "../examples/lightning_module.py" in (ROOT / "docs" / "mnist.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_documentations_example_runs_when_pasted(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mnist.md").read_text(), re.S)
    exec(compile(example, "docs/mnist.md", "exec"), {})
    assert "of 360 right" in capsys.readouterr().out
