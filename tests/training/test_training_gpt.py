from __future__ import annotations

import math

import pytest
import torch

from training.networks.gpt import build_gpt
from training.networks.heads import head


def test_a_position_sees_none_that_follows():
    network = build_gpt(300, 8, 64)
    tokens = torch.randint(300, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 300
    before, after = network(tokens), network(changed)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert not torch.isclose(after[:, 5:], before[:, 5:]).all(-1).any()


@pytest.mark.parametrize("name", ["builtin", "custom-fused"])
def test_the_first_loss_knows_nothing(name: str):
    network, tokens = build_gpt(300, 8, 64), torch.randint(300, (4, 8))
    loss = head(name)(network.trunk(tokens), network.last, torch.randint(300, (4, 8)))
    assert loss.item() == pytest.approx(math.log(300), abs=0.1)


def test_every_parameter_has_a_gradient():
    network, tokens = build_gpt(300, 8, 64), torch.randint(300, (4, 8))
    head("custom-fused")(network.trunk(tokens), network.last, tokens).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
