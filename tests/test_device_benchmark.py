"""scripts/benchmark.py --device cuda as far as it goes without one: CPU tensors, another clock."""

import dataclasses
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra [train]")
pytest.importorskip("rich", reason="needs the extra [train]")

SCRIPT = Path(__file__).parent.parent / "scripts" / "benchmark.py"
CPU = torch.device("cpu")
MODULES = ("cases", "contestants", "goals", "last_layer", "plan", "rivals", "timing", "table")
DEVICE = ("device", "device_cases", "device_table", "device_timing", "device_environment")


@pytest.fixture
def bench(monkeypatch):
    """The scripts' package, without the seconds that compiling takes."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bench = importlib.import_module("benchmarks")
    for name in (*MODULES, *DEVICE):
        importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return bench


@pytest.fixture
def plan(bench):
    effort = bench.timing.Effort(warm_up=1, least=3, most=3, seconds=0)
    return bench.plan.Plan(effort, 20, effort, True)


def tiny(case):
    shape = tuple(map(min, case.case.shape, (4, 6, 2, 2)))
    return dataclasses.replace(case, case=dataclasses.replace(case.case, shape=shape, calls=1))


def tiny_layer(bench):
    return dataclasses.replace(bench.device_cases.LAST_LAYERS[0], rows=4, features=3, classes=6)


def two_seconds(contestant, calls: int) -> float:
    """A clock that does the work and always says the same."""
    for _ in range(calls):
        contestant.work(contestant.prepare())
    return 2.0 * calls


def no_wait() -> None:
    """The CPU is done when the call is over."""


@pytest.fixture
def rival(monkeypatch):
    """A library of one function that is right, one that fails, and one that has no memory."""

    def cross_entropy(logits, target):
        return torch.nn.functional.cross_entropy(logits, target)

    def refuse(*_, **__):
        raise TypeError("no such argument\nand more")

    def exhaust(*_, **__):
        raise torch.OutOfMemoryError

    library = types.ModuleType("liger_kernel.transformers.functional")
    library.liger_cross_entropy = cross_entropy
    library.liger_softmax = refuse
    library.liger_fused_linear_cross_entropy = exhaust
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, library.__name__, library)


def test_every_contestant_finds_the_gradient_of_the_builtin(bench, rival):
    for case in map(tiny, (*bench.device_cases.CASES, *bench.device_cases.CURVE)):
        if case.direction == "forward":
            continue
        found = {}
        entered = bench.device.enter(case, CPU)
        for name, (prepare, work) in entered.items():
            if name not in ("copy", "liger") or case.case.op == "cross_entropy" != name == "liger":
                result = work(prepare())
                gradient = result[-1] if isinstance(result[-1], torch.Tensor) else result[-1][0]
                found[name] = gradient.clone()
        for name in found:
            if name != "copy":
                torch.testing.assert_close(found[name], found["builtin"], msg=f"{name}: {case}")


def test_a_share_is_of_the_copys_bandwidth_on_the_bytes_that_must_move(bench, plan):
    for case in map(tiny, bench.device_cases.CASES):
        row = bench.device.row(case, plan, CPU, two_seconds, no_wait)
        size = case.case.elements * case.case.dtype.itemsize
        assert row["bytes_a_second"]["copy"] == size  # a read and a write in two seconds
        want = 1.0 if case.direction == "forward" else 1.5
        if case.case.op == "cross_entropy":  # and twice four labels, M and L
            want += 2 * 4 * (8 + 4 + 4) / (2 * size)
        assert row["ratios"]["ours"]["share"] == pytest.approx(want)
        assert row["ratios"]["ours"]["over builtin"] == 1
        assert len(row["seconds"]["ours"]["samples"]) == 3


def test_the_goals_are_those_that_were_set(bench):
    cases = bench.device_cases
    goals = {case.name: case.case.goals for case in (*cases.CASES, *cases.CURVE)}
    assert len(goals) == len(cases.CASES) + len(cases.CURVE) - 1  # the largest is in both
    for op in ("softmax", "log_softmax"):
        for dtype in ("float32", "bfloat16"):
            for direction, share in (("forward", 0.95), ("backward", 0.92)):
                name = f"{op} 16384x8192 {dtype} {direction}"
                assert goals[name] == (("ours", "share", share),)
    for shape, share in (("8192x32768", 0.93), ("2048x131072", 0.8)):
        for dtype in ("float32", "bfloat16"):
            for direction in ("forward", "backward"):
                name = f"softmax {shape} {dtype} {direction}"
                assert goals[name] == (("ours", "share", share),)
    (largest,) = (case for case in cases.CASES if case.case.op == "cross_entropy")
    assert largest.name == "cross_entropy 8192x128256 bfloat16 forward + backward"
    assert largest.case.goals == (("in place", "share", 0.9),)
    shares = {}
    for case in cases.CURVE:
        *share, builtin, compiled = case.case.goals
        assert (builtin, compiled) == (("ours", "over builtin", 1), ("ours", "over compiled", 1))
        shares[case.case.shape[1]] = share[0].bound if share else None
    assert shares == {
        **dict.fromkeys((10, 100)),
        **{1000: 0.75, 10_000: 0.8, 32_000: 0.85, 50_257: 0.85, 128_256: 0.92, 1_000_000: 0.6},
    }
    assert [c.case.shape for c in cases.CURVE][:: len(cases.CURVE) - 1] == [
        (32_768, 10),
        (4096, 1_000_000),
    ]
    small = cases.STEPS[:12]
    assert len({step.name for step in cases.STEPS}) == len(cases.STEPS) == 17
    assert {step.case.shape for step in small} == {(64, 10), (128, 10)}
    for step in small:
        bound = 0.9 if step.direction == "forward" else 1.3
        assert step.case.goals == (("ours", "over builtin", bound),)
    for step in cases.STEPS[12:]:
        assert step.case.goals == (("ours", "over builtin", 1), ("ours", "over compiled", 1))
    sizes = [layer.size for layer in cases.LAST_LAYERS]
    assert sizes == ["8192, 4096, 128256 bfloat16", "16384, 2048, 248320 bfloat16"]
    for layer in cases.LAST_LAYERS:
        assert {goal.contestant for goal in layer.goals} <= {"ours", *layer.within}


def test_the_last_layer_stands_beside_three_products(bench, plan):
    found = bench.device.last_layer_row(tiny_layer(bench), plan, CPU, two_seconds, no_wait)
    assert found["ratios"]["ours"]["floors"] == 1
    assert {claim["measure"] for claim in found["claims"]} == {"floors", "MiB"}
    assert {claim["contestant"] for claim in found["claims"]} == {"ours", *tiny_layer(bench).within}
    assert set(found["seconds"]) == {"three products", "builtin", "ours", *tiny_layer(bench).within}


def test_a_rival_takes_part_or_is_named_with_what_stopped_it(bench, plan, rival):
    loss, softmax = (
        next(c for c in bench.device_cases.CASES if c.case.op == op)
        for op in ("cross_entropy", "softmax")
    )
    row = bench.device.row(tiny(loss), plan, CPU, two_seconds, no_wait)
    assert "liger" in row["seconds"]
    assert row["failed"] == {}
    row = bench.device.row(tiny(softmax), plan, CPU, two_seconds, no_wait)
    assert row["failed"] == {"liger": "TypeError: no such argument"}
    layer = bench.device.last_layer_row(tiny_layer(bench), plan, CPU, two_seconds, no_wait)
    assert layer["failed"] == {"liger": "out of memory"}


def test_an_error_of_ours_is_not_passed_over(bench):
    broken = bench.contestants.Contestant(lambda: torch.ones(1), lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.device_timing.admit({"ours": broken}, no_wait)
    _, _, failed = bench.device_timing.admit({"compiled": broken}, no_wait)
    assert failed == {"compiled": "ZeroDivisionError: division by zero"}


def test_what_is_not_installed_is_said(bench, monkeypatch):
    def version(distribution: str) -> str:
        if distribution == "quack-kernels":
            return "0.3"
        raise bench.rivals.metadata.PackageNotFoundError

    monkeypatch.setattr(bench.rivals.metadata, "version", version)
    assert bench.rivals.versions() == {
        "liger": "not installed",
        "cce": "not installed",
        "quack": "0.3",
    }


def test_the_wall_clock_counts_every_call_and_waits_before_and_after(bench):
    said = []
    contestant = bench.contestants.Contestant(
        lambda: said.append("prepare"), lambda _: said.append("work")
    )
    seconds = bench.device_timing.WallClock(lambda: said.append("wait"))(contestant, 3)
    assert said == ["prepare", "wait", "work", "work", "work", "wait"]
    assert seconds >= 0


def test_the_devices_clock_runs_around_the_work_alone_and_after_a_flush(bench, monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("record")

        def synchronize(self):
            said.append("synchronize")

        def elapsed_time(self, other):
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: said.append("sleep"), raising=False)
    monkeypatch.setattr(bench.device_timing, "FLUSH_BYTES", 8)
    clock = bench.device_timing.EventClock(CPU)
    clock.flush = types.SimpleNamespace(sum=lambda: said.append("flush"))
    contestant = bench.contestants.Contestant(
        lambda: said.append("prepare"), lambda _: said.append("work")
    )
    assert clock(contestant, 2) == pytest.approx(2 * 7e-3)
    once = ["prepare", "flush", "sleep", "record", "work", "record", "synchronize"]
    assert said == once * 2


def test_a_whole_run_is_written_and_shown_in_eighty_columns(
    bench, plan, monkeypatch, tmp_path, capsys, rival
):
    cases, measured = bench.device_cases, bench.device
    monkeypatch.setattr(cases, "CASES", tuple(map(tiny, cases.CASES)))
    monkeypatch.setattr(cases, "CURVE", tuple(map(tiny, cases.CURVE)))
    monkeypatch.setattr(cases, "STEPS", tuple(map(tiny, cases.STEPS)))
    monkeypatch.setattr(cases, "LAST_LAYERS", (tiny_layer(bench),))
    monkeypatch.setattr(bench.plan, "QUICK", plan)
    monkeypatch.setattr(measured, "EventClock", lambda _: two_seconds)
    every = measured.steps
    monkeypatch.setattr(measured, "steps", lambda plan, _: every(plan, CPU))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # what the script sets is undone
    importlib.import_module("benchmark").main(
        ["--device=cuda", "--quick", f"--out={tmp_path / 'a folder'}"]
    )
    printed = capsys.readouterr().out
    report = importlib.import_module("json").loads(
        (tmp_path / "a folder" / "benchmark.json").read_text()
    )
    assert all(report[section] for section in measured.SECTIONS)
    lines = printed.replace(str(tmp_path), "").splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in printed
    shown = ("a GPU, driver", "liger", "not installed", "liger: out of memory", "goals met")
    for words in shown:
        assert words in printed
    claims = [c for section in measured.SECTIONS for row in report[section] for c in row["claims"]]
    expected = [g for c in (*cases.CASES, *cases.CURVE) for g in c.case.goals]
    expected += [g for c in cases.STEPS for g in c.case.goals]
    expected += tiny_layer(bench).goals
    assert len(claims) == len(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_one_sentence_says_so():
    command = [sys.executable, str(SCRIPT), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("error: --device cuda: this torch sees no CUDA device\n")
