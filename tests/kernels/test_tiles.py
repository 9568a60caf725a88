"""How much of a tile of the Triton kernels is idle; pure numbers, no Triton."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from custom_ops.kernels.cuda.tiles import (
    Tiles,
    elementwise_tiles,
    split_tiles,
    stepped_tiles,
    tiles,
)

SIZES = st.one_of(st.integers(1, 300), st.integers(1, 300_000))


def idle(t: Tiles, classes: int) -> float:
    """The share of the classes of all tiles of a row that are not there."""
    return 1 - classes / (t.classes * t.steps * t.chunks + t.rest)


@pytest.mark.parametrize(
    ("classes", "inner", "before", "forward", "gradient"),
    [
        (300, 1, 0.41, 0.41, 0.22),
        (600, 1, 0.41, 0.22, 0.06),
        (1000, 1, 0.02, 0.02, 0.02),
        (1500, 1, 0.27, 0.02, 0.02),
        (10_000, 1, 0.39, 0.02, 0.02),
        (50_257, 1, 0.12, 0.12, 0.06),
        (128_256, 1, 0.02, 0.02, 0.02),
        (19, 512, 0.41, 0.05, 0.05),
        (21, 256, 0.34, 0.05, 0.05),
        (150, 256, 0.41, 0.01, 0.00),
        (1000, 256, 0.02, 0.02, 0.02),
    ],
)
def test_what_is_idle(classes, inner, before, forward, gradient):
    whole = tiles(classes, inner, torch.float32, tensors=2)
    size = classes, inner, torch.float32, 8
    assert idle(whole, classes) == pytest.approx(before, abs=0.01)
    assert idle(stepped_tiles(whole, *size), classes) == pytest.approx(forward, abs=0.01)
    assert idle(elementwise_tiles(whole, *size), classes) == pytest.approx(gradient, abs=0.01)


@given(
    classes=SIZES,
    inner=st.sampled_from([1, 2, 4096]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    vector=st.sampled_from([1, 2, 4, 8]),
)
def test_tiles_cover_a_row_once_and_are_of_powers_of_two(classes, inner, dtype, vector):
    whole = tiles(classes, inner, dtype, tensors=2)
    size = classes, inner, dtype, vector
    for t in (whole, stepped_tiles(whole, *size), elementwise_tiles(whole, *size)):
        span = t.classes * t.steps
        assert span * (t.chunks - 1) < classes <= span * t.chunks
        assert t.classes * (t.steps - 1) < classes
        for number in (t.rows, t.classes, t.warps, t.lanes):
            assert number & (number - 1) == 0 < number
        assert t.rows <= 2048
        assert 1 <= t.warps <= 32
        assert t.classes % t.lanes == 0
        assert t.rows * t.classes * (4 if dtype == torch.float64 else 1) <= max(
            whole.rows * whole.classes * (4 if dtype == torch.float64 else 1), 32 * 32 * t.warps
        )


@given(
    classes=SIZES,
    inner=st.sampled_from([1, 2, 4096]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    tensors=st.integers(1, 2),
)
def test_of_rows_needed_whole_two_tiles_have_less_idle(classes, inner, dtype, tensors):
    whole = tiles(classes, inner, dtype, tensors)
    split = split_tiles(whole, classes, inner)
    if split == whole:
        least = 128 if inner == 1 else 8
        assert (
            whole.chunks > 1
            or idle(whole, classes) <= 1 / 8
            or (
                # three quarters and more are there, or two tiles would be as wide
                classes > whole.classes * 3 // 4 or whole.classes <= 2 * least
            )
        )
        return
    assert split.classes < classes <= split.classes + split.rest < whole.classes
    assert idle(split, classes) < idle(whole, classes)
    for number in (split.classes, split.rest):
        assert number & (number - 1) == 0 < number
    if classes > 1024:
        assert idle(split, classes) <= 1 / 4


@given(classes=SIZES, inner=st.sampled_from([1, 2, 4096]), wide=st.booleans())
def test_a_narrower_tile_never_has_more_idle(classes, inner, wide):
    dtype = torch.float64 if wide else torch.float32
    whole = tiles(classes, inner, dtype, tensors=2)
    stepped = stepped_tiles(whole, classes, inner, dtype, 4)
    tight = elementwise_tiles(whole, classes, inner, dtype, 4)
    assert idle(stepped, classes) <= idle(whole, classes)
    assert idle(tight, classes) <= idle(whole, classes)
    if inner == 1 and classes > 1024:  # eight tiles of a row or more: one of them is idle at most
        assert idle(tight, classes) <= 1 / 8
    if inner > 1 and stepped.chunks == 1:
        assert stepped.classes * stepped.steps < classes + 8
