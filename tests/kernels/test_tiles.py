"""How much of a tile of the Triton kernels is idle; pure numbers, no Triton."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from custom_ops.kernels.cuda.tiles import Tiles, elementwise_tiles, tiles

SIZES = st.one_of(st.integers(1, 300), st.integers(1, 300_000))


def idle(t: Tiles, classes: int) -> float:
    """The share of the classes of all tiles of a row that are not there."""
    return 1 - classes / (t.classes * t.chunks)


@pytest.mark.parametrize(
    ("classes", "inner", "before", "now"),
    [
        (600, 1, 0.41, 0.06),
        (1000, 1, 0.02, 0.02),
        (10_000, 1, 0.39, 0.02),
        (50_257, 1, 0.12, 0.06),
        (128_256, 1, 0.02, 0.02),
        (19, 512, 0.41, 0.21),
        (21, 256, 0.34, 0.13),
        (150, 256, 0.41, 0.06),
    ],
)
def test_what_is_idle_in_a_gradient(classes, inner, before, now):
    whole = tiles(classes, inner, torch.float32, tensors=2)
    tight = elementwise_tiles(whole, classes, inner)
    assert idle(whole, classes) == pytest.approx(before, abs=0.01)
    assert idle(tight, classes) == pytest.approx(now, abs=0.01)


@given(classes=SIZES, inner=st.sampled_from([1, 2, 4096]), wide=st.booleans())
def test_a_tile_keeps_its_size_and_never_has_more_idle(classes, inner, wide):
    whole = tiles(classes, inner, torch.float64 if wide else torch.float32, tensors=2)
    tight = elementwise_tiles(whole, classes, inner)
    assert tight.rows * tight.classes == whole.rows * whole.classes
    assert tight.rows <= 2048
    assert tight.classes * (tight.chunks - 1) < classes <= tight.classes * tight.chunks
    assert idle(tight, classes) <= idle(whole, classes)
    if inner == 1 and classes > 1024:  # eight tiles of a row or more: one of them is idle at most
        assert idle(tight, classes) <= 1 / 8
