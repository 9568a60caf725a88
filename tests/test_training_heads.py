from __future__ import annotations

import pytest
import torch

from training.heads import HEADS, head


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_head_is_the_built_in_to_rounding(name: str, dtype: torch.dtype):
    logits = torch.randn(32, 10).to(dtype).requires_grad_()
    target = torch.randint(10, (32,))
    loss = head(name)(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = head("builtin")(logits, target)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", HEADS)
def test_autocast_does_not_narrow_what_a_head_computes(name: str):
    logits, target = torch.randn(32, 10), torch.randint(10, (32,))
    expected = head(name)(logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(name)(logits, target), expected)


def test_unknown_head_names_the_known_ones():
    with pytest.raises(ValueError, match="head must be one of builtin, jacobian, custom, got 'x'"):
        head("x")
