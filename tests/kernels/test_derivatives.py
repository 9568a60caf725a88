"""The registered operators: derivatives to second order, and arguments that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from custom_ops.kernels import cpu, cuda

D = torch.double
FLAT = (1, D, -100, [0.1, 0.01, 1.5, 4.0])  # dim, dtype, ignore_index and the numbers
FLOAT = (1, torch.float32, *FLAT[2:])
LABELS = torch.tensor([1, -100, 3, 0])
CPP = pytest.param(
    "custom_ops", marks=pytest.mark.skipif(cpu.library is None, reason="no C++ kernels")
)
TRITON = pytest.param(
    "custom_ops_cuda", marks=pytest.mark.skipif(cuda.library is None, reason="no Triton")
)


@pytest.fixture(params=[TRITON if cuda.interpreted else CPP])
def ops(request: pytest.FixtureRequest) -> Any:
    """The operators of one namespace: in Triton's interpreter its own, else those in C++."""
    return getattr(torch.ops, request.param)


def leaf(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, dtype=D, requires_grad=True, **options)


@pytest.mark.parametrize("log", [False, True])
def test_softmax(ops: Any, log: bool):
    f = lambda x: ops.softmax(x, 1, log)  # noqa: E731
    assert gradcheck(f, leaf(3, 4))
    assert gradgradcheck(f, leaf(3, 4))


@pytest.mark.parametrize("name", ["contract", "log_softmax_vjp", "log_softmax_jvp"])
def test_maps(ops: Any, name: str):
    f = lambda p, v: getattr(ops, name)(p, v, 1)  # noqa: E731
    assert gradcheck(f, (leaf(3, 4), leaf(3, 4)))
    assert gradgradcheck(f, (leaf(3, 4), leaf(3, 4)))


@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy(ops: Any, soft: bool):
    weight = torch.rand(4, dtype=D, requires_grad=True)

    def f(x: Tensor, weight: Tensor, *y: Tensor) -> tuple[Tensor, ...]:
        target = y[0] if soft else LABELS
        loss, M, L, _, H = ops.cross_entropy(x, target, weight, *FLAT, True)
        return loss, M + L, H  # M and L apart are each a shift of the other

    inputs = (leaf(4, 4), weight, *((torch.rand(4, 4, dtype=D, requires_grad=True),) * soft))
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("soft", [False, True])
def test_the_gradient_of_cross_entropy(ops: Any, soft: bool):
    weight = torch.rand(4, dtype=D, requires_grad=True)

    def f(x: Tensor, weight: Tensor, g: Tensor, q: Tensor, *y: Tensor) -> Tensor:
        target = y[0] if soft else LABELS
        given = (t.detach() for t in (x, target, weight))
        _, M, L, *_ = ops.cross_entropy(*given, *FLAT, False)
        return ops.cross_entropy_vjp(x, target, weight, g, q, M, L, *FLAT)

    inputs = (leaf(4, 4), weight, leaf(4), leaf(4))
    inputs += (torch.rand(4, 4, dtype=D, requires_grad=True),) * soft
    assert gradcheck(f, inputs)


def test_total(ops: Any):
    if ops is torch.ops.custom_ops:
        assert gradcheck(ops.total, leaf(5))
        assert gradgradcheck(ops.total, leaf(5))


@pytest.mark.parametrize("wanted", [[0, 0, 0], [1, 1, 1]])
def test_the_last_layer(wanted: list[int]):
    op = torch.ops.custom_ops.linear_cross_entropy

    def f(x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        loss, M, L, _, H, *_ = op(x, W, b, LABELS, None, *FLAT, True, True, wanted, 3)
        return loss, M + L, H

    inputs = (leaf(4, 3), leaf(5, 3), leaf(5))
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


def test_the_gradients_of_the_last_layer():
    op, vjp = (
        torch.ops.custom_ops.linear_cross_entropy,
        torch.ops.custom_ops.linear_cross_entropy_vjp,
    )

    def f(x: Tensor, W: Tensor, b: Tensor, g: Tensor, q: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        given = (t.detach() for t in (x, W, b))
        _, M, L, *_ = op(*given, LABELS, None, *FLAT, False, True, [0, 0, 0], 3)
        return vjp(x, W, b, LABELS, None, g, q, M, L, e, *FLAT, False, [1, 1, 1], 3)

    assert gradcheck(f, (leaf(4, 3), leaf(5, 3), leaf(5), leaf(4), leaf(4), leaf(4)))


def test_a_half_precision_gradient_of_the_last_layer_is_differentiated():
    x, W = (torch.randn(n, 3).bfloat16().requires_grad_() for n in (4, 5))
    op = torch.ops.custom_ops.linear_cross_entropy
    flat = (1, torch.float32, -100, [0.0, 0.0, 1.0, 0.0])
    loss, *_ = op(x, W, None, LABELS, None, *flat, False, True, [0, 0, 0], 3)
    (d,) = torch.autograd.grad(loss, W, create_graph=True)
    assert d.dtype == torch.bfloat16
    assert torch.autograd.grad(d.float().square().sum(), (x, W))[0].abs().sum() > 0


def test_what_works_in_place_refuses_to_be_differentiated(ops: Any):
    x, rows = leaf(4, 4), torch.ones(4, dtype=D)
    args = (LABELS, None, rows, None, rows, rows, *FLAT)
    with pytest.raises(RuntimeError, match="works in place and cannot be differentiated"):
        ops.cross_entropy_vjp_(x * 1, *args)
    with torch.no_grad():
        z = x * 1
        ops.cross_entropy_vjp_(z, *args)
    assert not torch.equal(z, x)


X, ROWS = torch.randn(4, 5), torch.ones(4)
UNFIT = {
    "another shape": ("contract", (torch.ones(2000, 400), torch.ones(1, 4), 1), ValueError),
    "another type": ("contract", (X, X.double(), 1), TypeError),
    "integers": ("contract", (LABELS, LABELS, 0), NotImplementedError),
    "no such dimension": ("log_softmax_vjp", (X, X, 2), IndexError),
    "softmax of integers": ("softmax", (LABELS, 0, False), NotImplementedError),
    "softmax over no dimension": ("softmax", (X, -3, True), IndexError),
    "labels of another batch": (
        "cross_entropy",
        (X, LABELS[:3], None, *FLOAT, False),
        ValueError,
    ),
    "weights of other classes": (
        "cross_entropy",
        (X, LABELS, torch.ones(4), *FLOAT, False),
        ValueError,
    ),
    "rows of another batch": (
        "cross_entropy_vjp",
        (X, LABELS, None, ROWS[:3], None, ROWS, ROWS, *FLOAT),
        ValueError,
    ),
    "a maximum of another batch": (
        "cross_entropy_vjp",
        (X, LABELS, None, ROWS, None, ROWS[:3], ROWS, *FLOAT),
        ValueError,
    ),
    "statistics of two types": (
        "cross_entropy_vjp",
        (X, LABELS, None, ROWS, None, ROWS, ROWS.double(), *FLOAT),
        TypeError,
    ),
    "a direction of another shape": (
        "cross_entropy_hvp_",
        (X.clone(), LABELS, None, X[:3].clone(), ROWS, None, ROWS, ROWS, *FLOAT),
        ValueError,
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused(ops: Any, case: str):
    name, args, error = UNFIT[case]
    with pytest.raises(error):
        getattr(ops, name)(*args)


def test_a_last_layer_that_does_not_fit_is_refused():
    op = torch.ops.custom_ops.linear_cross_entropy
    rest = (None, LABELS, None, *FLOAT, False, True, [0, 0, 0], None)
    with pytest.raises(ValueError, match=r"got shapes \(4, 5\) and \(3, 4\)"):
        op(X, torch.ones(3, 4), *rest)
    with pytest.raises(ValueError, match=r"target must have shape \(3,\), got \(4,\)"):
        op(X[:3], torch.ones(3, 5), *rest)
