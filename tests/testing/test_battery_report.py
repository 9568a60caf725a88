"""What check() takes, and what its report looks like."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch.autograd import Function

from custom_ops.testing import check
from custom_ops.testing.table import CHECKS

ROOT = Path(__file__).parents[2]


class Half(Function):
    """x², with half of its gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, v):
        return v * ctx.saved_tensors[0]


@pytest.fixture(scope="module")
def report():
    return check(Half, torch.linspace(-1, 1, 6).view(2, 3), skip=["compile"])


def test_every_line_fits_in_80_columns(report):
    lines = [*report.table().splitlines(), *str(report).splitlines()]
    assert max(map(len, lines)) <= 80


def test_a_students_report_fits_on_a_screen(report):
    assert len(str(report).splitlines()) <= 24


def test_expected_stands_beside_observed_with_the_smallest_input(report):
    (row,) = report.failures
    assert row.mistake == "factor"
    assert row.shown[0] == "x = [[-1]]"
    assert "expected gradient of x" in row.shown[2]
    assert "observed gradient of x" in row.shown[3]


def test_the_line_of_the_backward_is_told(report):
    (row,) = report.failures
    path, _, rest = row.location.partition(":")
    line = int(rest.split()[0])
    assert Path(path).read_text().splitlines()[line - 1].strip() == "def backward(ctx, v):"


def test_a_row_that_does_not_apply_says_why(report):
    reasons = {row.check: row.sentence for row in report.rows if row.status == "not applicable"}
    assert "must implement the jvp" in reasons["forward mode"]
    assert all(reasons.values())


def test_assert_raises_with_the_report(report):
    with pytest.raises(AssertionError, match=r"Half: 1 of \d+ checks failed"):
        report.assert_()  # noqa: PT009
    check(torch.exp, torch.ones(2), only=["gradient"]).assert_()  # noqa: PT009


def test_the_same_seed_gives_the_same_report():
    make = lambda g: (torch.randn(2, 3, generator=g),)  # noqa: E731
    first, second, other = (
        check(Half, make, only=["gradient"], seed=seed).rows[0].shown for seed in (1, 1, 2)
    )
    assert first == second != other


def test_a_hypothesis_strategy_makes_the_inputs():
    numbers = st.lists(st.floats(0.5, 2), min_size=1, max_size=3)
    strategy = numbers.map(lambda xs: (torch.tensor(xs, dtype=torch.double),))
    assert not check(Half, strategy, only=["gradient"]).passed
    assert check(torch.log, strategy, only=["gradient"]).passed


def test_a_module_is_checked_in_its_parameters_too():
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor([3.0, 2.0]))

        def forward(self, x):
            return Product.apply(x, self.scale)

    class Product(Function):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.save_for_backward(x, scale)
            return x * scale

        @staticmethod
        def backward(ctx, v):
            x, scale = ctx.saved_tensors
            return v * scale, -(v * x)

    (row,) = check(Scale(), torch.randn(2), only=["gradient"]).failures
    assert "the gradient of input 1 (`scale`) has the wrong sign" in row.sentence
    assert "Product.backward" in row.location


def test_lists_of_tensors_are_taken_apart():
    report = check(torch.stack, [torch.randn(2), torch.randn(2)], only=["derivatives"])
    assert report.passed


def test_only_the_inputs_that_require_grad_are_differentiated():
    x = torch.randn(2, requires_grad=True)
    report = check(lambda x, y: x * y.detach(), x, torch.randn(2), only=["gradient"])
    assert report.passed


def test_a_kink_is_left_out_and_counted():
    row = check(torch.relu, torch.tensor([-1.0, 0.0, 1.0]), only=["gradient"]).rows[0]
    assert row.status == "passed"
    assert "at a kink left out" in row.sentence


def test_a_backward_in_float32_is_found():
    class Rounded(Half):
        @staticmethod
        def backward(ctx, v):
            return (v * 2 * ctx.saved_tensors[0]).float().double()

    (row,) = check(Rounded, torch.randn(3), only=["gradient"]).failures
    assert row.mistake == "precision"


def test_a_forward_that_raises_is_one_row():
    report = check(lambda x: x.view(7), torch.randn(3))
    (row,) = report.failures
    assert (row.check, row.mistake) == ("forward", "forward raises")


@pytest.mark.parametrize("option", ["only", "skip"])
def test_an_unknown_check_is_refused(option):
    with pytest.raises(ValueError, match="no check is called 'gradeint'"):
        check(torch.exp, torch.ones(2), **{option: ["gradeint"]})


def test_inputs_without_a_floating_point_tensor_are_refused():
    with pytest.raises(TypeError, match="must hold a floating-point tensor"):
        check(torch.exp, torch.ones(2, dtype=torch.long))


def test_no_check_has_the_name_of_a_kind_or_of_another():
    names = [entry.name for entry in CHECKS]
    assert len(set(names)) == len(names)
    assert not set(names) & {entry.kind for entry in CHECKS}


def test_what_a_check_comes_after_stands_before_it():
    names = [entry.name for entry in CHECKS]
    for entry in CHECKS:
        assert all(names.index(name) < names.index(entry.name) for name in entry.after)


def test_the_page_lists_every_check_and_every_twin():
    from twins import TWINS

    page = (ROOT / "docs" / "battery.md").read_text()
    for entry in CHECKS:
        assert f"| {entry.kind} | {entry.name}" in page
    for twin in TWINS:
        assert f"| {twin.fault}" in page


def test_the_example_finds_its_three_mistakes():
    spec = importlib.util.spec_from_file_location("tries", ROOT / "examples" / "three_mistakes.py")
    example = importlib.util.module_from_spec(spec)
    sys.modules["tries"] = example
    spec.loader.exec_module(example)
    first, second, third, right = example.reports(skip=["compile"])
    assert "diagonal of J" in first.mistakes
    assert "coupling" in second.mistakes
    assert "large offset" in third.mistakes
    assert "gradient" not in {row.check for row in third.failures}
    assert right.passed
