"""Faults found in other fused losses, each as a test that ours does not have it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import differentiable

import custom_ops
from custom_ops import cross_entropy

pytestmark = pytest.mark.usefixtures("backend")

X, T = torch.randn(6, 9, generator=torch.Generator().manual_seed(3)), torch.arange(6)


def test_logits_are_not_the_gradients_buffer():
    """Written over the logits without a version bump, a later use of them reads garbage."""
    (leaf,) = differentiable(X)
    z = leaf * 1
    loss, later = cross_entropy(z, T), z.sum()
    (d,) = torch.autograd.grad(loss + later, leaf)
    torch.testing.assert_close(d, torch.autograd.grad(F.cross_entropy(leaf, T), leaf)[0] + 1)
    assert torch.equal(z, leaf)


def test_second_backward_of_a_retained_graph_is_not_scaled_twice():
    (leaf,) = differentiable(X)
    loss = cross_entropy(leaf, T)
    first = torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)[0]
    second = torch.autograd.grad(loss, leaf, torch.tensor(3.0))[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("frozen", ["features", "head"])
def test_training_one_side_alone_gives_its_gradient(frozen):
    h, W = torch.randn(6, 4), torch.randn(9, 4)
    (leaf,) = differentiable(W if frozen == "features" else h)
    z = h @ leaf.T if frozen == "features" else leaf @ W.T
    (d,) = torch.autograd.grad(cross_entropy(z, T), leaf, retain_graph=True)
    torch.testing.assert_close(d, torch.autograd.grad(F.cross_entropy(z, T), leaf)[0])


@pytest.mark.parametrize("masked", [range(1024), range(4096, 5000), range(1, 5000)])
def test_a_whole_tile_at_minus_infinity_is_not_nan(masked):
    x = torch.randn(2, 5000)
    x[:, list(masked)] = -torch.inf
    target = torch.tensor([0 if 0 not in masked else 4999] * 2)
    results = []
    for f in (cross_entropy, F.cross_entropy):
        (leaf,) = differentiable(x)
        loss = f(leaf, target)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(custom_ops.softmax(x, 1), F.softmax(x, 1))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_an_empty_batch_does_not_crash(reduction):
    (leaf,) = differentiable(X[:0])
    loss, stats = cross_entropy(leaf, T[:0], reduction=reduction, return_stats=True)
    (d,) = torch.autograd.grad(loss.sum() + stats.lse.sum(), leaf, create_graph=True)
    assert d.shape == (0, 9)
    assert torch.autograd.grad(d.sum(), leaf)[0].shape == (0, 9)


def test_upstream_gradients_a_row_that_are_not_all_ones_count():
    (leaf,) = differentiable(X)
    g = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5, 7.0])
    got = torch.autograd.grad(cross_entropy(leaf, T, reduction="none"), leaf, g)
    want = torch.autograd.grad(F.cross_entropy(leaf, T, reduction="none"), leaf, g)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("label", [-1, 9, 2**40, -(2**40)])
def test_a_bad_label_is_an_error_and_nothing_is_written_or_read(label):
    target = T.clone()
    target[3] = label
    with pytest.raises(IndexError, match=rf"target\[3\] is {label}, out of range"):
        cross_entropy(X, target)


@pytest.mark.parametrize("weight", [None, torch.linspace(0.1, 2.0, 9)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_smoothing_is_torchs_with_weights_and_ignored_rows(weight, reduction):
    target = T.clone()
    target[2] = -100
    options = {"label_smoothing": 0.3, "reduction": reduction}
    torch.testing.assert_close(
        cross_entropy(X, target, weight, **options), F.cross_entropy(X, target, weight, **options)
    )


def test_the_backward_of_an_exported_program_takes_any_batch():
    class Loss(torch.nn.Module):
        def forward(self, x, target):
            return cross_entropy(x, target)

    n = torch.export.Dim("n")
    program = torch.export.export(Loss(), (X, T), dynamic_shapes=({0: n}, {0: n})).module()
    for rows in (2, 5, 6):
        (leaf,) = differentiable(X[:rows])
        (d,) = torch.autograd.grad(program(leaf, T[:rows]), leaf)
        (want,) = torch.autograd.grad(F.cross_entropy(leaf, T[:rows]), leaf)
        torch.testing.assert_close(d, want)


def test_every_registered_operator_passes_opcheck():
    torch.library.opcheck(torch.ops.custom_ops.checked_labels.default, (T, 9, -100))
    torch.library.opcheck(
        torch.ops.custom_ops.checked_labels.default, (T.reshape(2, 3).to(torch.uint8), 9, 255)
    )
