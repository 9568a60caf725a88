"""Every faulty twin is found by its check, and its mistake is named."""

import pytest
import torch
from twins import TWINS

from custom_ops.testing import check


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.fault)
def test_twin_is_found_and_named(twin):
    torch.manual_seed(0)
    report = check(twin.function, *twin.inputs(), reference=twin.reference, only=[twin.check])
    (row,) = report.rows
    assert row.failed
    assert row.mistake == twin.mistake
    assert twin.named in row.sentence


def test_there_are_at_least_sixteen_public_kinds():
    assert len({twin.fault for twin in TWINS if twin.public}) >= 16
