from __future__ import annotations

import pytest
import torch

from training.models import MODELS, build


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28)])
def test_ten_logits_an_image(name: str, shape: tuple[int, int, int]):
    assert build(name, shape)(torch.randn(3, *shape)).shape == (3, 10)


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_determines_the_weights(name: str):
    torch.manual_seed(5)
    a = build(name, (1, 8, 8)).state_dict()
    torch.manual_seed(5)
    b = build(name, (1, 8, 8)).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_unknown_model_names_the_known_ones():
    with pytest.raises(ValueError, match="model must be one of linear, mlp, cnn, got 'rnn'"):
        build("rnn", (1, 8, 8))
