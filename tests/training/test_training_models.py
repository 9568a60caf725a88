from __future__ import annotations

import pytest
import torch
from torch import nn

from training.networks.models import MODELS, Network, build


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28)])
def test_ten_logits_an_image(name: str, shape: tuple[int, int, int]):
    network, images = build(name, shape), torch.randn(3, *shape)
    assert network(images).shape == (3, 10)
    assert network.trunk(images).shape == (3, network.last.in_features)


def test_accuracy_is_the_share_that_is_right():
    network = Network(nn.Identity(), nn.Linear(2, 2, bias=False))
    nn.init.eye_(network.last.weight)
    features = torch.eye(2)[torch.tensor([0, 1, 1, 0])]
    assert network.accuracy(features, torch.tensor([0, 1, 1, 1])) == 0.75


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
