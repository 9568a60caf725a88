"""The decorator makes a pytest test of each check."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
PROJECT = """
import torch
from custom_ops.testing import battery

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, v):
        return v * ctx.saved_tensors[0]

KINDS = ["gradient", "second derivative", "determinism"]

@battery(lambda g: (torch.randn(3, 4, generator=g),), only=KINDS)
def test_twice():
    return Twice
"""


@pytest.fixture
def project(pytester):
    pytester.makepyfile(test_mine=PROJECT)

    def run(*arguments):
        return pytester.runpytest("-p", "custom_ops.testing.plugin", *arguments).stdout.str()

    return run


def test_each_check_is_a_test_and_the_fault_is_told(project):
    text = project("-q", "-rs")
    assert "test_twice[gradient]" in text
    assert "0.5 times the right" in text
    assert "test_mine.py:11 in Twice.backward" in text
    assert "left out, as `gradient` failed" in text
    assert "1 failed" in text
    assert "again with --battery-seed=0" in text


def test_k_and_lf_choose_among_the_checks(project):
    assert "2 passed" in project("-k", "two-runs or thread-count")
    project()
    assert "1 failed, " not in project("-q", "-k", "two-runs")
    assert "1 failed" in project("--lf")


def test_a_seed_is_told_and_gives_the_same_input_again(project):
    text = project("--battery-seed=random", "-k", "gradient and not upstream")
    (line,) = (line for line in text.splitlines() if line.startswith("battery: "))
    option = line.removeprefix("battery: ")
    again = project(option, "-k", "gradient and not upstream")
    shown = [part for part in text.splitlines() if "x = " in part or "v = " in part]
    assert shown
    assert shown == [part for part in again.splitlines() if "x = " in part or "v = " in part]


def test_a_test_takes_fixtures_and_works_without_the_plugin(pytester):
    pytester.makepyfile(
        """
        import pytest, torch
        from custom_ops.testing import battery

        @pytest.fixture(params=[torch.exp, torch.sin])
        def function(request):
            return request.param

        @battery(torch.ones(2), only=["determinism"])
        def test_it(function, request):
            return function
        """
    )
    pytester.runpytest("-p", "no:custom_ops.testing.plugin").assert_outcomes(passed=4)


def test_a_seed_that_is_no_number_is_a_usage_error(pytester):
    done = pytester.runpytest("-p", "custom_ops.testing.plugin", "--battery-seed=x")
    assert "--battery-seed must be a number, 0 or more, or 'random', got 'x'" in done.stderr.str()


def test_the_entry_point_is_the_plugin():
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.entry-points.pytest11]\n")[1].split("\n\n")[0]
    # under its own name, so that -p and pytest_plugins do not register it twice
    assert section == '"custom_ops.testing.plugin" = "custom_ops.testing.plugin"'


@pytest.mark.parametrize(
    ("module", "absent"), [("custom_ops", "custom_ops.testing"), ("custom_ops.testing", "pytest")]
)
def test_import_stays_small(module, absent):
    code = f"import sys, {module}; print({absent!r} in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
