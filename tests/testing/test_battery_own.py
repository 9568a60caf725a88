"""The package's own operators pass the whole battery."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import custom_ops
from custom_ops import cross_entropy, jacobian, linear_cross_entropy
from custom_ops.testing import check

LABELS = torch.tensor([1, 3, 0])


def logits():
    return torch.randn(3, 4)


def probabilities():
    return torch.randn(3, 4).softmax(1)


def head():
    return torch.randn(3, 2), torch.randn(4, 2), LABELS


def own_head(x, W, target):
    return linear_cross_entropy(x, W, target)


def torch_head(x, W, target):
    return F.cross_entropy(x @ W.T, target)


CASES = {
    "softmax": (partial(custom_ops.softmax, dim=1), lambda: (logits(),), partial(F.softmax, dim=1)),
    "softmax over rows": (
        partial(custom_ops.softmax, dim=0),
        lambda: (logits(),),
        partial(F.softmax, dim=0),
    ),
    "log_softmax": (
        partial(custom_ops.log_softmax, dim=1),
        lambda: (logits(),),
        partial(F.log_softmax, dim=1),
    ),
    "contract": (custom_ops.contract, lambda: (probabilities(), logits()), None),
    "labels": (cross_entropy, lambda: (logits(), LABELS), F.cross_entropy),
    "labels, a loss a row": (
        partial(cross_entropy, reduction="none"),
        lambda: (logits(), LABELS),
        partial(F.cross_entropy, reduction="none"),
    ),
    "labels, smoothed": (
        partial(cross_entropy, label_smoothing=0.1, reduction="sum"),
        lambda: (logits(), LABELS),
        partial(F.cross_entropy, label_smoothing=0.1, reduction="sum"),
    ),
    "labels, weighted": (
        cross_entropy,
        lambda: (logits().requires_grad_(), LABELS, torch.rand(4)),
        F.cross_entropy,
    ),
    "probabilities": (cross_entropy, lambda: (logits(), probabilities()), F.cross_entropy),
    "z-loss, cap and scale": (
        partial(cross_entropy, z_loss=0.1, softcap=3.0, logit_scale=0.5),
        lambda: (logits(), LABELS),
        None,
    ),
    "last layer": (own_head, head, torch_head),
    "Softmax": (custom_ops.Softmax(1), lambda: (logits(),), torch.nn.Softmax(1)),
    "LogSoftmax": (custom_ops.LogSoftmax(1), lambda: (logits(),), torch.nn.LogSoftmax(1)),
    "CrossEntropyLoss": (
        custom_ops.CrossEntropyLoss(),
        lambda: (logits(), LABELS),
        torch.nn.CrossEntropyLoss(),
    ),
    "LinearCrossEntropyLoss": (
        custom_ops.LinearCrossEntropyLoss(2, 4, bias=True),
        lambda: (torch.randn(3, 2), LABELS),
        None,
    ),
    "the literal softmax": (jacobian.softmax, lambda: (logits(),), partial(F.softmax, dim=1)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.exhaustive
def test_own_operator_passes_the_compiler_kind(name):
    function, inputs, _ = CASES[name]
    report = check(function, *inputs(), only=["compile"])
    assert report.passed, str(report)


@pytest.mark.parametrize("name", CASES)
def test_own_operator_passes(name):
    function, inputs, reference = CASES[name]
    report = check(function, *inputs(), reference=reference, skip=["compile"])
    assert report.passed, str(report)
