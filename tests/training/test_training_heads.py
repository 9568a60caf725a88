from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from training.networks.heads import HEADS, head


def loss_and_gradients(name: str, x: Tensor, layer: nn.Linear, target: Tensor) -> list[Tensor]:
    loss = head(name)(x, layer, target)
    return [loss, *torch.autograd.grad(loss, (x, *layer.parameters()))]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_every_head_is_the_built_in_to_rounding(name: str, dtype: torch.dtype, bias: bool):
    layer = nn.Linear(8, 10, bias=bias, dtype=dtype)
    x = torch.randn(32, 8, dtype=dtype, requires_grad=True)
    target = torch.randint(10, (32,))
    got, expected = (loss_and_gradients(n, x, layer, target) for n in (name, "builtin"))
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_takes_sequences(name: str):
    layer, target = nn.Linear(8, 10), torch.randint(10, (4, 5))
    x = torch.randn(4, 5, 8)
    flat = head(name)(x.flatten(0, 1), layer, target.flatten())
    assert torch.equal(head(name)(x, layer, target), flat)


@pytest.mark.parametrize("name", HEADS)
def test_autocast_narrows_the_layer_and_not_the_loss(name: str):
    layer, target = nn.Linear(8, 10), torch.randint(10, (32,))
    x = torch.randn(32, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(x)
        got = head(name)(x, layer, target)
    assert logits.dtype == torch.bfloat16
    exact = nn.functional.cross_entropy(logits.double(), target).float()
    torch.testing.assert_close(got, exact)  # float32's tolerance: 16-bit loss would miss by 1e-3
    (gradient,) = torch.autograd.grad(got, layer.weight)
    assert gradient.dtype == torch.float32


def test_unknown_head_names_the_known_ones():
    known = "builtin, jacobian, custom, custom-fused"
    with pytest.raises(ValueError, match=f"head must be one of {known}, got 'x'"):
        head("x")
