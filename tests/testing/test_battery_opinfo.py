"""No false alarm on torch's own differentiable operators, with samples that torch has of them."""

import functools

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

from custom_ops.testing import check

QUICK = ("add", "cumsum", "exp", "logsumexp", "matmul", "nn_functional_linear", "var")
MOST = 64  # entries of the input; a sample in the middle of those

# What is found, and is so: name of the operator: checks, and why.
ISSUE = "https://github.com/pytorch/pytorch/issues/"
NORM = "third derivatives and nested forward mode are wrong: " + ISSUE
KNOWN = {
    "cumprod": (("reverse over forward", "nested forward"), "at a zero: " + ISSUE + "196701"),
    "nn_functional_layer_norm": (
        ("third derivative", "reverse over forward", "nested forward"),
        NORM + "175754, " + ISSUE + "196700",
    ),
}


def infos():
    names = []
    for info in op_db:
        if info.supports_autograd and torch.float64 in info.supported_dtypes("cpu"):
            names.append(info)
    return {info.formatted_name: info for info in names}


INFOS = infos()


def sample_of(info):
    """A sample in the middle of the small ones, or None."""
    samples = []
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        first = [sample.input] if isinstance(sample.input, Tensor) else sample.input
        if not isinstance(first, (list, tuple)) or not all(isinstance(x, Tensor) for x in first):
            continue
        if 1 < sum(x.numel() for x in first) <= MOST:
            samples.append(sample)
    return samples[len(samples) // 2] if samples else None


def report_of(name, **options):
    info = INFOS[name]
    sample = sample_of(info)
    if sample is None:
        pytest.skip("no small sample")
    keywords = {k: x.detach() if isinstance(x, Tensor) else x for k, x in sample.kwargs.items()}

    @functools.wraps(info.op)
    def function(input, *args):
        return info.gradcheck_wrapper(info.op, input, *args, **keywords)

    function.__name__ = name
    return check(function, sample.input, *sample.args, **options)


def unexpected(report, name):
    known = KNOWN.get(name, ((), ""))[0]
    return [row for row in report.failures if row.check not in known]


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_operator_passes_every_derivative(name):
    report = report_of(name, only=["derivatives", "torch.func", "reuse"])
    assert report.passed, str(report)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", INFOS)
def test_no_false_alarm(name):
    report = report_of(name, skip=["compile"])
    rows = unexpected(report, name)
    assert not rows, str(report)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list(INFOS)[::3])
def test_no_false_alarm_of_the_compiler_kind(name):
    report = report_of(name, only=["compile"])
    assert report.passed, str(report)
