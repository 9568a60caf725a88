from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra [train]")
pytest.importorskip("rich", reason="needs the extra [train]")

from rich.console import Console

from training import figure, report, table
from training.record import Record

HEADS = ["builtin", "jacobian", "custom", "custom-fused"]


def a_record(steps: int = 30) -> Record:
    record = Record(HEADS)
    record.starts = [0]
    for step in range(steps):
        record.gradient_size.append([1.0, 2.0])
        for i, name in enumerate(HEADS):
            record.loss[name].append(math.exp(-step / 10) + i * 1e-7)
            record.seconds[name].append(9.0 if step < report.WARM_UP else 0.010 + i * 0.001)
        for i, name in enumerate(HEADS[1:]):
            record.gradient_difference[name].append([1e-8 * step, 2e-8 * step * (i + 1)])
            if step % 10 == 0:
                record.probe_loss_difference[name].append(1e-8)
                record.probe_gradient_difference[name].append([3e-9, 0.0])
        if step % 10 == 0:
            record.probes.append(step)
    return record


def a_report(record: Record | None = None) -> dict[str, Any]:
    metrics = {f"test_accuracy/{name}": 0.98765 for name in HEADS}
    metrics |= {f"test_loss/{name}": 0.04 for name in HEADS}
    costs = {n: {"head_us": 50.0, "head_peak_bytes": 1e4, "peak_bytes": 2e7} for n in HEADS}
    settings = {"data": "mnist", "model": "cnn", "batch_size": 128, "seed": 0, "precision": "32"}
    settings["unit"] = "images"
    return report.build(
        record or a_record(),
        metrics,
        costs,
        ["0.weight", "0.bias"],
        settings,
        128,
        torch.device("cpu"),
    )


def test_the_numbers():
    built = a_report()
    assert built["steps"] == 30
    custom = built["heads"]["custom"]
    assert custom["step_ms"] == pytest.approx(12)  # no warm-up step among them
    assert custom["per_second"] == pytest.approx(128 / 12e-3)
    assert custom["final_loss"] == built["series"]["loss"]["custom"][-1]
    differences = built["differences"]["custom"]
    assert differences["own_path"]["loss"] == pytest.approx(2e-7)
    assert differences["own_path"]["gradients"] == pytest.approx([2.9e-7, 1.16e-6])
    assert differences["same_weights"] == {"loss": 1e-8, "gradients": [3e-9, 0.0]}
    own = built["series"]["own_path"]["jacobian"]["gradients"]
    assert [len(parameter) for parameter in own] == [30, 30]
    assert built["series"]["same_weights"]["steps"] == [0, 10, 20]


def test_the_steps_after_a_resumption_are_warm_up_too():
    record = a_record()
    record.starts = [0, 15]
    record.seconds["builtin"][15:25] = [7.0] * 10
    assert max(report.timed_steps(record, "builtin")) == pytest.approx(0.010)


def test_what_is_not_finite_is_null_and_hides_no_largest():
    record = a_record()
    record.loss["custom"][3] = math.nan
    record.gradient_difference["custom"][4] = [math.inf, math.nan]
    built = a_report(record)
    read = json.loads(json.dumps(built, allow_nan=False))
    assert read["series"]["loss"]["custom"][3] is None
    assert read["series"]["own_path"]["custom"]["gradients"][0][4] is None
    assert read["differences"]["custom"]["own_path"]["loss"] == pytest.approx(2e-7)


def test_the_table_fits_eighty_columns_and_shows_every_number(capsys):
    table.show(a_report())
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    for part in ("98.77 %", "12.00 ms", "19.07 MiB", "0.weight", "1.2e-06", "3.0e-09", "own path"):
        assert part in text, part
    assert "…" not in text


def test_the_table_goes_where_it_is_told(tmp_path: Path):
    with (tmp_path / "table").open("w") as file:
        table.show(a_report(), Console(file=file, width=80))
    assert "98.77 %" in (tmp_path / "table").read_text()


@pytest.mark.parametrize("steps", [1, 30])
def test_the_picture_is_a_png(tmp_path: Path, steps: int):
    record = a_record(steps)
    figure.save(a_report(record), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
