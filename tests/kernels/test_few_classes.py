"""Rows of few classes beside float64: each number of classes, each remainder of rows, each edge.

On AVX-512 sixteen of them are taken at a time; elsewhere the same tests go over the other ways.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from custom_ops.kernels import Options, Problem, Rows, cpu, eager

pytestmark = pytest.mark.skipif(cpu.library is None, reason=f"C++ kernels: {cpu.missing}")

ops = torch.ops.custom_ops
close = partial(torch.testing.assert_close, equal_nan=True, rtol=1e-5, atol=1e-6)
CLASSES = [*range(1, 35), 47, 48, 49, 63, 64, 65, 100, 127, 128, 129]
NUMBERS = {
    "plain": (-100, [0.0, 0.0, 1.0, 0.0]),
    "z-loss": (-100, [0.0, 0.1, 1.0, 0.0]),
    "smoothed": (-100, [0.1, 0.0, 1.0, 0.0]),
    "capped": (-100, [0.0, 0.1, 0.5, 3.0]),
    "a class is ignored": (0, [0.0, 0.0, 1.0, 0.0]),
}


def problem(rows: int, classes: int, weighted: bool, ignored: int = -100):
    """Logits, labels, weights and the upstream gradients of the rows."""
    x, target = torch.randn(rows, classes) * 3, torch.randint(classes, (rows,))
    target[::7] = ignored
    weight = torch.rand(classes) + 0.5 if weighted else None
    return x, target, weight, torch.randn(rows), torch.randn(rows)


@pytest.mark.parametrize("options", NUMBERS)
@pytest.mark.parametrize("classes", CLASSES)
def test_loss_statistics_and_gradient(classes, options):
    flat = NUMBERS[options]
    o = Options.of(1, torch.float64, *flat)
    for rows, weighted in (
        (1, True),
        (3, False),
        (15, True),
        (16, False),
        (17, True),
        (150, False),
    ):
        x, target, weight, g, q = problem(rows, classes, weighted, flat[0])
        exact = Problem(x.double(), target, weight if weight is None else weight.double(), o)
        loss, M, L, *_ = eager.cross_entropy(exact)
        found = ops.cross_entropy(x, target, weight, 1, torch.float32, *flat, False)
        counted = target != flat[0]
        close(found[0].double(), loss)
        close((found[1] + found[2]).double()[counted], (M + L)[counted])
        for one in (g, g[:1].squeeze().expand(rows)):
            for of_lse in (None, q):
                up = Rows(one.double(), None if of_lse is None else q.double(), M, L)
                want = eager.cross_entropy_vjp(exact, up)
                args = x, target, weight, one, of_lse, *found[1:3], 1, torch.float32, *flat
                close(ops.cross_entropy_vjp(*args).double(), want)
                place = x.clone()
                ops.cross_entropy_vjp_(place, *args[1:])
                close(place.double(), want)


@pytest.mark.parametrize("classes", CLASSES)
def test_softmax_and_its_maps(classes):
    for rows in (1, 16, 37):
        x, v = torch.randn(rows, classes) * 3, torch.randn(rows, classes)
        p, y = F.softmax(x.double(), 1), F.log_softmax(x.double(), 1)
        v64 = v.double()
        close(ops.softmax(x, 1, False).double(), p)
        close(ops.softmax(x, 1, True).double(), y)
        p32, y32 = p.float(), y.float()
        p, y = p32.double(), y32.double()
        close(ops.contract(p32, v, 1).double(), p * (v64 - (p * v64).sum(1, True)))
        close(ops.log_softmax_vjp(y32, v, 1).double(), v64 - y.exp() * v64.sum(1, True))
        close(ops.log_softmax_jvp(y32, v, 1).double(), v64 - (y.exp() * v64).sum(1, True))


@pytest.mark.parametrize("classes", [2, 10, 21, 40])
def test_a_row_has_the_bits_it_has_alone(classes):
    x, target, weight, g, q = problem(50, classes, True)
    flat = 1, torch.float32, *NUMBERS["z-loss"]
    whole = ops.cross_entropy(x, target, weight, *flat, False)
    gradient = ops.cross_entropy_vjp(x, target, weight, g, q, *whole[1:3], *flat)
    p, J = ops.softmax(x, 1, False), ops.contract(x, x.flip(1), 1)
    for r in (0, 1, 15, 16, 33, 49):
        one = slice(r, r + 1)
        alone = ops.cross_entropy(x[one], target[one], weight, *flat, False)
        assert all(torch.equal(a, w[one]) for a, w in zip(alone[:3], whole[:3], strict=True))
        args = x[one], target[one], weight, g[one], q[one], *alone[1:3], *flat
        assert torch.equal(ops.cross_entropy_vjp(*args), gradient[one])
        assert torch.equal(ops.softmax(x[one], 1, False), p[one])
        assert torch.equal(ops.contract(x[one], x[one].flip(1), 1), J[one])


@pytest.mark.parametrize("classes", [5, 16, 21, 40])
def test_infinities_and_nan_are_torchs(classes):
    x = torch.randn(20, classes)
    x[1, 0], x[2, 0], x[3, 0], x[4] = torch.inf, torch.nan, -torch.inf, -torch.inf
    x[5, 1:] = -torch.inf
    target = torch.ones(20, dtype=torch.int64)
    target[5], target[6] = 0, -100
    x[6] = torch.nan  # nobody looks at an ignored row
    flat = 1, torch.float32, *NUMBERS["plain"]
    loss, M, L, *_ = ops.cross_entropy(x, target, None, *flat, False)
    z = x.clone().requires_grad_()
    want = F.cross_entropy(z, target, reduction="none")
    counted = target != -100
    close(loss[counted], want[counted].detach())
    assert loss[6] == 0
    g = torch.ones(20)
    d = ops.cross_entropy_vjp(x, target, None, g, None, M, L, *flat)
    (torchs,) = torch.autograd.grad(want, z, g)
    close(d[counted], torchs[counted])
    assert (d[6] == 0).all()
    close(ops.softmax(x, 1, False), F.softmax(x, 1))
    close(ops.softmax(x, 1, True), F.log_softmax(x, 1))


def test_labels_out_of_range_are_refused_before_anything_is_read():
    x = torch.randn(20, 10)
    for bad in (10, -1, 2**40, -(2**40), 2**32 + 3):
        target = torch.zeros(20, dtype=torch.int64)
        target[17] = bad
        with pytest.raises(IndexError, match=rf"{bad}"):
            ops.cross_entropy(x, target, None, 1, torch.float32, *NUMBERS["plain"], False)


def test_a_bad_label_of_a_gradient_makes_its_row_nan():
    x, target, _, g, _ = problem(20, 10, False)
    flat = 1, torch.float32, *NUMBERS["plain"]
    _, M, L, *_ = ops.cross_entropy(x, target, None, *flat, False)
    target[17] = 2**32 + 3
    d = ops.cross_entropy_vjp(x, target, None, g, None, M, L, *flat)
    assert d[17].isnan().all()
    assert d[:17].isfinite().all()
