"""Where a private name of torch is gone, the package is imported and right; it may be slower."""

import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jacfwd, vmap

from custom_ops import cross_entropy, linear_cross_entropy, log_softmax, softmax, surroundings

SOURCE = Path(surroundings.__file__).read_text()
NAMES = dict(re.findall(r'^(\w+) = _find\("([^"]+)"\)$', SOURCE, re.M))
TARGET = torch.tensor([1, 0, 2])
OPS = {
    "softmax": (lambda z: softmax(z, 1), lambda z: F.softmax(z, 1)),
    "log_softmax": (lambda z: log_softmax(z, 1), lambda z: F.log_softmax(z, 1)),
    "cross_entropy": (lambda z: cross_entropy(z, TARGET), lambda z: F.cross_entropy(z, TARGET)),
    "linear_cross_entropy": (
        lambda z: linear_cross_entropy(z, z, TARGET),
        lambda z: F.cross_entropy(z @ z.T, TARGET),
    ),
}


def test_every_private_name_is_in_this_torch():
    """One that is not costs speed: look for what has replaced it."""
    assert len(NAMES) > 8
    assert [path for path in NAMES.values() if surroundings._find(path) is None] == []


def test_without_any_private_name_nothing_is_taken_for_plain():
    nothing = SOURCE.replace("getattr(found, name, None)", "None")
    assert nothing != SOURCE
    module = types.ModuleType("without")
    exec(compile(nothing, "without", "exec"), module.__dict__)
    t = torch.zeros(2)
    assert not module.is_plain(t, "cpu")
    assert not module.is_known(t)
    assert module.is_watched()
    assert module.graph_is_kept()
    assert module.forward_levels() == 2
    assert (module.func_levels(), module.dispatch_modes()) == ([], [])
    assert module.below_autograd is None
    module.set_decomposition(torch.ops.aten.add.Tensor, lambda: None)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", NAMES)
def test_without_a_private_name_values_and_derivatives_are_right(monkeypatch, name: str, op: str):
    monkeypatch.setattr(surroundings, name, None)
    ours, theirs = OPS[op]
    z = torch.randn(3, 3, dtype=torch.double)

    def results(f) -> list[Tensor]:
        leaf = z.clone().requires_grad_()
        value = f(leaf)
        (d,) = torch.autograd.grad(value.square().sum(), leaf, create_graph=True)
        (dd,) = torch.autograd.grad(d.square().sum(), leaf)
        total = lambda x: f(x).square().sum()  # noqa: E731
        batch = vmap(grad(total))(torch.stack([z, 2 * z]))
        return [value, d, dd, jacfwd(jacfwd(total))(z), batch]

    torch.testing.assert_close(results(ours), results(theirs))
