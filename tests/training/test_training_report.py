from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("training.lightning", reason="needs the extra [train]")

from rich.console import Console

from training.comparison import figure, report, table
from training.comparison.outcome import Cost, Outcome, load, save
from training.comparison.record import Record
from training.refusal import Refused

HEADS = ["builtin", "jacobian", "custom", "custom-fused"]
PATHS = [*HEADS, "exact"]
EPS = torch.finfo(torch.float32).eps
NAN = math.nan


def a_record(steps: int = 30) -> Record:
    record = Record(PATHS)
    record.starts = [0]
    for step in range(steps):
        for i, name in enumerate(PATHS):
            record.loss[name].append(math.exp(-step / 10) + i * 1e-7)
            record.seconds[name].append(9.0 if step < report.WARM_UP else 0.010 + i * 0.001)
        record.gradients.append({name: [1.0, 2.0] for name in PATHS})
        record.gradient_differences.append(
            {name: [1e-8 * step, 2e-8 * step * (i + 1)] for i, name in enumerate(PATHS[1:])}
        )
        if step % 5 == 0:
            record.probes.append(step)
            record.probe_losses.append({name: 1.0 + 1e-8 * (name != "builtin") for name in PATHS})
            record.probe_gradients.append({name: [0.5, 2.0] for name in PATHS})
            record.probe_differences.append({name: [EPS, 0.0] for name in PATHS[1:]})
    return record


def an_outcome(seed: int = 0, record: Record | None = None, **answers: list[int]) -> Outcome:
    """Twenty targets of ten classes, all answered rightly unless said."""
    targets = list(range(10)) * 2
    return Outcome(
        seed=seed,
        record=record or a_record(),
        losses=dict.fromkeys(PATHS, 0.04),
        predictions={name: answers.get(name.replace("-", "_"), targets) for name in PATHS},
        targets=targets,
        costs={name: Cost([5e-5, 6e-5, 9e-5], 10_000, 20_000_000) for name in HEADS},
    )


def a_report(*outcomes: Outcome, independent: bool = True, **settings: object) -> dict[str, Any]:
    asked = {"data": "mnist", "model": "cnn", "batch_size": 128, "seed": 0, "precision": "32"}
    return report.build(
        outcomes or (an_outcome(),),
        report.Questions(
            heads=HEADS,
            parameters=["0.weight", "0.bias"],
            settings=asked | settings,
            unit="images",
            independent=independent,
            targets=128,
            device=torch.device("cpu"),
        ),
    )


def shown(content: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    table.show(content)
    return capsys.readouterr().out


def test_the_numbers():
    built = a_report()
    assert built["steps"] == 30
    custom = built["heads"]["custom"]
    assert custom["test_accuracy"] == 1
    assert custom["step_ms"] == pytest.approx(12)  # no warm-up step among them
    assert custom["per_second"] == pytest.approx(128 / 12e-3)
    assert custom["head_us"] == pytest.approx(60)
    assert custom["head_us_quartiles"] == pytest.approx([55, 75])
    differences = built["differences"]["custom"]
    assert differences["own_path"]["loss"] == pytest.approx(2e-7)
    assert differences["own_path"]["gradients"] == pytest.approx([2.9e-7, 1.16e-6])
    assert differences["same_weights"]["loss"] == pytest.approx(1e-8)
    assert differences["same_weights"]["gradients"] == [EPS, 0.0]
    assert built["yardstick"] == "exact"


def test_a_difference_is_also_given_in_roundings_of_the_largest_entry():
    record = a_record()
    record.gradients[7]["builtin"] = [0.5, 4.0]
    record.probe_differences[2]["custom"] = [EPS, 12 * EPS]
    differences = a_report(an_outcome(record=record))["differences"]
    assert differences["custom"]["same_weights"]["roundings"] == pytest.approx(3)  # 12 / 4
    assert differences["exact"]["same_weights"]["roundings"] == pytest.approx(1)  # 1 / 1
    half = a_report(an_outcome(record=record), precision="16-mixed")["differences"]["custom"]
    expected = 3 * EPS / torch.finfo(torch.float16).eps
    assert half["same_weights"]["roundings"] == pytest.approx(expected)


def test_the_steps_after_a_resumption_are_warm_up_too():
    record = a_record()
    record.starts = [0, 15]
    record.seconds["builtin"][15:25] = [7.0] * 10
    assert max(report.timed_steps(record, "builtin")) == pytest.approx(0.010)


def test_answers_are_paired_seed_by_seed():
    targets = list(range(10)) * 2
    wrong = [9, *targets[1:]]
    other = [8, *targets[1:-1], 0]
    built = a_report(an_outcome(0, builtin=wrong, custom=other), an_outcome(1, custom=wrong))
    answers = built["answers"]
    assert answers["right"]["builtin"] == [19, 20]
    assert answers["right"]["custom"] == [18, 19]
    assert answers["spread"]["builtin"] == pytest.approx(math.sqrt(0.5))
    beside = answers["beside_first"]["custom"]
    assert (beside["differ"], beside["gained"], beside["lost"]) == ([2, 1], [0, 0], [1, 1])
    assert beside["difference"] == pytest.approx(-2 / 40)
    assert beside["p"] == pytest.approx(0.5)
    assert beside["interval"][0] < -2 / 40 < 0 < beside["interval"][1]
    assert answers["disagree"]["custom | custom-fused"] == [2, 1]
    assert answers["by_class"]["builtin"]["0"] == {"accuracy": 0.75, "targets": 2}
    assert answers["by_class"]["custom"]["9"]["accuracy"] == 0.75


def test_tokens_of_one_text_are_not_tested_as_if_they_were_independent(capsys):
    built = a_report(independent=False)
    assert built["answers"]["beside_first"]["custom"]["p"] is None
    assert "McNemar" not in shown(built, capsys)
    assert "follow one curve" in built["sentence"]
    first, *_, last = built["heads"].values()
    share = last["head_peak_bytes"] / first["head_peak_bytes"]
    assert built["title"].startswith(f"One loss curve; last layer and loss in {share:.0%} of")


def test_the_sentence_says_to_how_many_digits_and_what_was_faster():
    record, outcome = a_record(), an_outcome()
    record.probe_differences[2]["custom"] = [3 * EPS, 0.0]
    assert "no head's last layer and loss are faster" in a_report(outcome)["sentence"]
    faster = Cost([3e-5, 3e-5, 3e-5], 10_000, 20_000_000)
    outcome = replace(an_outcome(record=record), costs=outcome.costs | {"custom": faster})
    said = a_report(outcome)["sentence"]
    assert "to 6.4 digits of its largest entry (3.0 roundings of float32, where" in said
    assert said.endswith("last layer and loss are fastest in custom, 30 µs for builtin's 60 µs.")


def test_what_is_not_finite_is_counted_and_hides_no_largest(capsys):
    record = a_record()
    record.loss["custom"][3] = NAN
    record.gradient_differences[4]["custom"] = [math.inf, NAN]
    record.gradients[4]["custom"] = [math.inf, NAN]
    built = a_report(an_outcome(record=record))
    read = json.loads(json.dumps(built, allow_nan=False))
    series = read["seeds"][0]["series"]
    assert series["loss"]["custom"][3] is None
    assert series["own_path"]["custom"]["gradients"][0][4] is None
    own = read["differences"]["custom"]["own_path"]
    assert own["loss"] == pytest.approx(2e-7)
    assert (own["loss_not_finite"], own["gradients_not_finite"], own["places"]) == (1, 1, 30)
    assert read["not_finite"]["custom"]["loss"] == 1
    assert read["not_finite"]["builtin"]["loss"] == 0
    assert "custom is not finite at 1 of 30 steps" in built["sentence"]


def broken_at_probes(count: int, name: str = "custom") -> Record:
    """A head that is NaN at the first so many of six probes, and equal to the built-in's after."""
    record = a_record()
    for i in range(6):
        lost = i < count
        record.probe_losses[i][name] = NAN if lost else record.probe_losses[i]["builtin"]
        record.probe_gradients[i][name] = [NAN, NAN] if lost else [0.5, 2.0]
        record.probe_differences[i][name] = [NAN, NAN] if lost else [0.0, 0.0]
    return record


@pytest.mark.parametrize("count", [1, 5, 6])
def test_a_head_that_is_not_finite_at_some_probes_is_said_to_be_everywhere(
    capsys, tmp_path: Path, monkeypatch, count: int
):
    built = a_report(an_outcome(record=broken_at_probes(count)))
    same = built["differences"]["custom"]["same_weights"]
    assert (same["loss_not_finite"], same["gradients_not_finite"], same["places"]) == (
        *(count, count),
        6,
    )
    text = " ".join(shown(built, capsys).split())
    assert "not finite" in text
    assert f"custom is not finite at {count} of 6 probes" in built["sentence"]
    assert f"custom is not finite at {count} of 6 probes" in built["title"]
    assert f"{count} of 6" in text
    drawn: list[str] = []
    monkeypatch.setattr(figure.Axes, "text", lambda self, x, y, s, *args, **kwargs: drawn.append(s))
    figure.save(built, tmp_path / "report.png")
    assert f"not finite, {count} of 6" in drawn


def test_where_the_built_in_is_not_finite_it_is_named_and_not_the_others():
    record = a_record()
    record.loss["builtin"][3] = NAN
    built = a_report(an_outcome(record=record))
    assert built["sentence"].startswith("builtin is not finite at 1 of 30 steps:")
    assert built["differences"]["custom"]["own_path"]["loss_not_finite"] == 1


@pytest.mark.parametrize("seeds", [1, 2, 10])
def test_the_tables_fit_eighty_columns_and_nothing_is_cut(capsys, seeds: int):
    text = shown(a_report(*map(an_outcome, range(seeds))), capsys)
    assert max(len(line) for line in text.splitlines()) <= 80
    for part in ("100.00 %", "12.00 ms", "60 µs", "19.07 MiB", "0.weight", "own path", "exact"):
        assert part in text, part
    assert "…" not in text


def test_the_table_goes_where_it_is_told(tmp_path: Path):
    with (tmp_path / "table").open("w") as file:
        table.show(a_report(), Console(file=file, width=80))
    assert "100.00 %" in (tmp_path / "table").read_text()


@pytest.mark.parametrize(("steps", "seeds"), [(1, 1), (30, 1), (30, 5)])
def test_the_picture_is_a_png(tmp_path: Path, steps: int, seeds: int):
    outcomes = [an_outcome(seed, a_record(steps)) for seed in range(seeds)]
    figure.save(a_report(*outcomes), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_in_the_picture_no_mark_lies_on_another(tmp_path: Path, monkeypatch):
    drawn: dict[str, list[tuple[float, float]]] = {}
    plot = figure.Axes.plot

    def watch(self, x, y=None, *args, **kwargs):
        if args and args[0] in ("o", "."):
            drawn.setdefault(self.get_title() + str(id(self)), []).extend(zip(x, y, strict=True))
        return plot(self, x, *([] if y is None else [y]), *args, **kwargs)

    monkeypatch.setattr(figure.Axes, "plot", watch)
    figure.save(a_report(*map(an_outcome, range(3))), tmp_path / "report.png")
    assert drawn
    for marks in drawn.values():
        assert len(set(marks)) == len(marks)


def test_the_title_of_the_picture_is_what_it_shows():
    title = a_report(*map(an_outcome, range(2)))["title"]
    assert title.startswith("Another head changes no right answer of 20;")
    wrong = [(t + 1) % 10 for t in range(10)] * 2
    better = a_report(*(an_outcome(seed, builtin=wrong) for seed in range(2)))
    assert better["title"].startswith("jacobian, custom and custom-fused answer otherwise")
    assert better["sentence"].startswith("jacobian, custom and custom-fused answer otherwise")


def test_one_seed_is_not_taken_for_the_head_nor_a_rounding_for_a_difference():
    targets = list(range(10)) * 2
    wrong = [(t + 1) % 10 for t in targets]
    one = a_report(an_outcome(custom=wrong))
    assert one["answers"]["beside_first"]["custom"]["p"] < 1e-5
    assert "one seed cannot tell a head from its rounding" in one["sentence"]
    # Two networks that differ much, and to either side: training has amplified a rounding.
    two = a_report(an_outcome(0, custom=wrong), an_outcome(1, builtin=wrong[:8] + targets[8:]))
    beside = two["answers"]["beside_first"]["custom"]
    assert beside["p"] < 0.05 < beside["over_seeds"]["p"]
    assert two["sentence"].startswith("No head is seen to answer otherwise than builtin")


def test_an_outcome_comes_back_as_it_was_saved(tmp_path: Path):
    path = tmp_path / "outcome.pt"
    outcome = an_outcome(record=broken_at_probes(2))
    assert load(path) is None
    save(outcome, path)
    again = load(path)
    assert repr(again.record.state_dict()) == repr(outcome.record.state_dict())
    assert again.costs == outcome.costs
    assert again.predictions == outcome.predictions


@pytest.mark.parametrize("content", [b"", b"half", b"PK\x03\x04"])
def test_a_damaged_outcome_is_a_line_that_names_it(tmp_path: Path, content: bytes):
    path = tmp_path / "outcome.pt"
    path.write_bytes(content)
    with pytest.raises(Refused, match=f"{path} is damaged"):
        load(path)
