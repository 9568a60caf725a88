"""scripts/benchmark.py compares like with like and shows every claim. No time is asserted."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra [train]")
pytest.importorskip("rich", reason="needs the extra [train]")

SCRIPT = Path(__file__).parent.parent / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def bench():
    """The scripts' package, with tiny cases and without the seconds that compiling takes."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        modules = (
            "cases",
            "contestants",
            "goals",
            "last_layer",
            "memory",
            "plan",
            "speed",
            "timing",
        )
        bench = importlib.import_module("benchmarks")
        for name in modules:
            importlib.import_module(f"benchmarks.{name}")
        patch.setattr(bench.cases, "CASES", tuple(map(tiny, bench.cases.CASES)))
        patch.setattr(bench.cases, "SCALING", tuple(map(tiny, bench.cases.SCALING)))
        patch.setattr(bench.cases, "MEMORY", tiny(bench.cases.MEMORY))
        patch.setattr(bench.cases, "CURVE_CLASSES", (2, 5))
        effort = bench.timing.Effort(warm_up=1, least=3, most=3, seconds=0)
        last_layer = bench.last_layer
        patch.setattr(last_layer, "CASES", tuple(map(tiny_last_layer, last_layer.CASES)))
        patch.setattr(last_layer, "MEMORY", tiny_last_layer(last_layer.MEMORY))
        patch.setattr(last_layer, "CURVE_CLASSES", (2, 5))
        quick = bench.plan.Plan(effort, curve_elements=20, last_layer=effort, whole_last_layer=True)
        patch.setattr(bench.plan, "QUICK", quick)
        patch.setattr(torch, "compile", lambda function, **_: function)
        yield bench
    torch.set_num_threads(threads)


def tiny(case):
    shape = tuple(min(size, limit) for size, limit in zip(case.shape, (4, 6, 2, 3), strict=False))
    return dataclasses.replace(case, shape=shape, calls=min(case.calls, 2))


def tiny_last_layer(case):
    return dataclasses.replace(case, rows=4, features=3, classes=6)


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory):
    """The report, what was printed and the folder of a whole run."""
    out = tmp_path_factory.mktemp("benchmark") / "a folder"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for module in (bench.memory, bench.speed):
            patch.setattr(module, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
        importlib.import_module("benchmark").main(["--quick", f"--out={out}"])
    return json.loads((out / "benchmark.json").read_text()), printed.getvalue(), out


# What is compared


def test_every_contestant_finds_the_gradient_of_the_builtin(bench):
    for case in bench.cases.CASES:
        names = bench.contestants.of(case)[1:]  # a copy has no gradient
        entered = bench.contestants.enter(case, names)
        found = {}
        for name, (prepare, work) in entered.items():
            _, (gradient,) = work(prepare())
            found[name] = gradient.clone()  # in place, it lies where the next logits will
        for name in names:
            torch.testing.assert_close(found[name], found["builtin"], msg=f"{case.name}, {name}")


def test_in_place_takes_part_wherever_logits_are_used_once(bench):
    for case in bench.cases.CASES:
        takes_part = "in place" in bench.contestants.of(case)
        assert takes_part == (case.op == "cross_entropy" and case.calls == 1), case.name


def test_logits_are_no_leaf_and_written_anew(bench):
    prepare, _ = bench.contestants.enter(bench.cases.CASES[0], ["builtin"])["builtin"]
    logits = prepare()
    assert logits.requires_grad
    assert not logits.is_leaf
    drawn = logits.detach().clone()
    logits.detach().zero_()
    again = prepare()
    assert torch.equal(again, drawn)
    assert again.data_ptr() == logits.data_ptr()


def test_every_round_times_everybody_and_warming_up_does_not_count(bench):
    calls = []
    works = {
        name: bench.contestants.Contestant(lambda: torch.ones(1), lambda _, n=name: calls.append(n))
        for name in ("a", "b")
    }
    effort = bench.timing.Effort(warm_up=2, least=3, most=9, seconds=0)
    times = bench.timing.in_turns(works, effort, calls=5)
    assert [len(times[name]["samples"]) for name in "ab"] == [3, 3]
    assert [calls.count(name) for name in "ab"] == [25, 25]


def test_memory_in_a_process_of_its_own_counts_the_builtins_three_tensors(bench, monkeypatch):
    monkeypatch.setattr(bench.memory, "CONTESTANTS", ("builtin",))
    case = dataclasses.replace(bench.cases.MEMORY, shape=(1024, 4096), goals=())
    found = bench.memory.peaks(case, threads=1)
    bytes, expected = found["bytes"]["builtin"], 3 * found["logits_bytes"]
    assert bytes["allocated"] == pytest.approx(expected, rel=0.01)
    assert bytes["resident"] in (None, pytest.approx(expected, rel=0.1))


def test_a_large_case_is_measured_again_in_a_process_whose_heap_keeps_its_memory(
    bench, monkeypatch
):
    def heap(_case, _effort, threads):
        return {name: os.environ.get(name) for name in bench.speed.KEEPS_MEMORY}, threads

    monkeypatch.setattr(bench.speed, "_row", heap)
    monkeypatch.setattr(bench.speed, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    found = bench.speed.row_on_kept_heap(bench.cases.CASES[0], None, threads=2)
    assert found == (bench.speed.KEEPS_MEMORY, 2)
    assert not bench.speed.KEEPS_MEMORY.items() & os.environ.items()
    again = [step.name for step in bench.plan.steps(bench.plan.QUICK, 1) if "heap" in step.name]
    assert again == [f"heap kept: {case.name}" for case in bench.cases.CASES if case.calls == 1]


@pytest.mark.parametrize(
    ("measure", "measured", "met"),
    [
        ("over builtin", 7, True),
        ("over builtin", 6.99, False),
        ("copies", 7, True),
        ("MiB", 8, False),
    ],
)
def test_a_speed_up_is_bounded_from_below_and_a_cost_from_above(bench, measure, measured, met):
    goal = bench.goals.Goal("ours", measure, 7)
    (claim,) = bench.goals.judge([goal], {"ours": {measure: measured}})
    assert claim["met"] is met


# What is shown


def test_every_goal_is_judged_and_stands_beside_its_ratio(bench, run):
    report, printed, _ = run
    cases = (*bench.cases.CASES, bench.cases.MEMORY)
    layers = (*bench.last_layer.CASES, bench.last_layer.MEMORY)
    goals = [goal for case in (*cases, *layers) for goal in case.goals]
    sections = [report[name] for name in bench.plan.SECTIONS]
    claims = [c for section in sections for row in section for c in row.get("claims", ())]
    assert sorted((c["contestant"], c["measure"], c["bound"]) for c in claims) == sorted(goals)
    missed = sum(not claim["met"] for claim in claims)
    assert len(re.findall(r"\d [≥≤] [\d.]+", printed)) == len(goals) - missed
    assert len(re.findall(r"\d [<>] [\d.]+", printed)) == missed
    assert f"{len(goals) - missed} of {len(goals)} goals met" in printed


def test_the_tables_fit_eighty_columns(run):
    _, printed, out = run
    lines = printed.replace(str(out), "").splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in printed


def test_a_busy_machines_times_leave_the_labels_whole(bench, run, capsys):
    report, _, _ = run
    slow = {"median": 23.9, "quartiles": [1.0, 99.0]}
    rows = [{**row, "seconds": dict.fromkeys(row["seconds"], slow)} for row in report["rows"]]
    importlib.import_module("benchmarks.table").show({**report, "rows": rows})
    printed = capsys.readouterr().out
    assert "23900000" in printed
    assert "cross_entropy, ms" in printed
    assert "…" not in printed


def test_the_heading_names_the_machine(run):
    report, printed, _ = run
    shown = ("machine", "cores", "threads", "vectors", "torch", "python", "backend", "date")
    for key in shown:
        assert str(report["environment"][key]) in " ".join(printed.split()), key


def test_ratios_are_those_of_the_medians(run):
    report, _, _ = run
    for row in report["rows"]:
        median = {name: times["median"] for name, times in row["seconds"].items()}
        for name, ratios in row["ratios"].items():
            assert ratios["over builtin"] == pytest.approx(median["builtin"] / median[name])
            assert ratios["over compiled"] == pytest.approx(median["compiled"] / median[name])
            assert ratios["copies"] == pytest.approx(median[name] / median["copy"])
            low, high = row["seconds"][name]["quartiles"]
            assert low <= median[name] <= high


def test_every_section_is_in_the_file(bench, run):
    report, _, out = run
    assert all(report[section] for section in bench.plan.SECTIONS)
    assert report["settings"]["effort"]["least"] == 3
    pictures = [f"benchmark-{name}.png" for name in ("curve", "large", "small")]
    assert sorted(path.name for path in out.iterdir()) == [*pictures, "benchmark.json"]
    for picture in pictures:
        assert (out / picture).read_bytes().startswith(b"\x89PNG\r\n")


def drawn(bench, report):
    """The picture of large logits, and where its marks stand by their colour."""
    figures = dict(importlib.import_module("benchmarks.figure").figures(report))
    axes = figures["large"].axes[0]
    marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
    return figures, [(m.get_xdata()[0], m.get_ydata()[0], m.get_mfc()) for m in marks]


def test_no_mark_of_a_picture_hides_another(bench, run):
    _, marks = drawn(bench, run[0])
    lanes = [lane for _, lane, colour in marks if colour != "white"]
    assert len(set(lanes)) == len(lanes) > 20


def test_a_heap_that_keeps_its_memory_is_a_hollow_mark_in_the_same_lane(bench, run):
    row = run[0]["rows"][0]
    _, marks = drawn(bench, {**run[0], "rows": [row], "rows, heap kept": [row]})
    hollow = [lane for _, lane, colour in marks if colour == "white"]
    filled = [lane for _, lane, colour in marks if colour != "white"]
    assert hollow == filled
    assert len(hollow) == len(row["ratios"]) - 2  # the copy and torch's own have no mark


def test_a_pictures_title_says_how_fast_ours_is(bench, run):
    rows = [row for row in run[0]["rows"] if row["calls"] == 1]
    for row, ratio in zip(rows, [3.0] + [2.0] * len(rows), strict=False):
        row = row["ratios"]["ours"]
        row["over builtin"] = ratio
    figures, _ = drawn(bench, {**run[0], "rows": rows})
    title = figures["large"].get_suptitle()
    assert title == "Large logits on the CPU: 2 to 3 times as fast as torch's"
    assert "small" not in figures


@pytest.mark.parametrize(
    ("only", "title"),
    [
        ("log_softmax", "forward + backward"),
        ("curve", "cross_entropy, about 20 logits"),
        ("scaling", "one thread and several"),
    ],
)
def test_a_part_alone_is_measured_and_shown(bench, tmp_path, capsys, only, title):
    importlib.import_module("benchmark").main(["--quick", f"--only={only}", f"--out={tmp_path}"])
    printed, errors = capsys.readouterr()
    assert title in printed
    assert "peak memory" not in printed
    assert errors == ""
    assert bool(list(tmp_path.glob("*.png"))) == (only != "scaling")


def test_a_part_that_does_not_exist_is_answered_with_the_names():
    command = [sys.executable, str(SCRIPT), "--only", "sofmax"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--only 'sofmax' is in none of these names:" in done.stderr
    assert "softmax 4096x1000 float32" in done.stderr
