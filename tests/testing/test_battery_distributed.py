"""Two processes, each with half of the classes."""

import torch
from twins import LocalSmoothing, WholeSmoothing, whole_smoothing

from custom_ops.testing import check


def report(function):
    z, t = torch.randn(3, 4), torch.tensor([1, 3, 0])
    return check(function, z, t, reference=whole_smoothing, shards={0: 1}, only=["distributed"])


def test_smoothing_over_the_local_classes_is_found():
    (row,) = report(LocalSmoothing).failures
    assert row.mistake == "distributed"
    assert "process 0 of 2" in row.sentence


def test_smoothing_over_all_classes_passes():
    assert report(WholeSmoothing).passed


def test_without_shards_the_check_is_not_run():
    assert "two processes" not in {row.check for row in check(torch.exp, torch.ones(2)).rows}
