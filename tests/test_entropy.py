"""stats.entropy: −Σ p log p of each row, with every derivative, in both cross-entropies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import differentiable
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from custom_ops import cross_entropy, jacobian, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("backend")

D, INF = torch.double, torch.inf
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "few classes": ((5, 7), {}),
    "many": ((3, 2500), {}),
    "pixels": ((2, 40, 3, 5), {"softcap": 3.0, "logit_scale": 1.5}),
    "one row": ((6,), {}),
}


def entropy(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    return cross_entropy(input, target, return_stats=True, **options)[1].entropy


def of_rows(x: Tensor, W: Tensor, target: Tensor, b: Tensor | None = None, **o: Any) -> Tensor:
    return linear_cross_entropy(x, W, target, b, return_stats=True, **o)[1].entropy


def oracle(input: Tensor, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """By torch's own entr, whose value at 0 is 0."""
    dim = 1 if input.dim() > 1 else 0
    z = logit_scale * input.double()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return torch.special.entr(z.softmax(dim)).sum(dim)


def labels_of(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros((*shape[:1], *shape[2:]) if len(shape) > 1 else (), dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_it_is_that_of_torchs_entr(case: str, dtype: torch.dtype):
    shape, options = CASES[case]
    input = 3 * torch.randn(shape, dtype=D).to(dtype)
    got = entropy(input, labels_of(shape), **options)
    assert got.dtype == (D if dtype == D else torch.float32)
    assert_close(got, oracle(input, **options).to(got.dtype))


def test_its_gradient_is_the_contraction_with_the_literal_jacobian():
    z = torch.randn(7, dtype=D, requires_grad=True)
    (d,) = torch.autograd.grad(entropy(z, torch.tensor(0)), z)
    p = z.detach().softmax(0)
    want = jacobian.contract_with_jacobian(-p.log(), jacobian.softmax_jacobian(z.detach()))
    assert_close(d, want)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.7, "z_loss": 0.1}])
def test_derivatives_of_every_kind(options: dict[str, Any], soft: bool):
    target = torch.rand(3, 4, dtype=D) if soft else torch.tensor([1, -100, 3])

    def f(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, stats = cross_entropy(z, target, return_stats=True, **options)
        return loss, stats.lse, stats.entropy

    z = torch.randn(3, 4, dtype=D, requires_grad=True)
    assert gradcheck(f, z, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, z, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}])
def test_derivatives_of_the_last_layer(options: dict[str, Any]):
    target = torch.tensor([1, -100, 3, 0])

    def f(x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = linear_cross_entropy(
            x, W, target, b, return_stats=True, block_rows=2, **options
        )
        return loss, stats.entropy

    leaves = [torch.randn(s, dtype=D, requires_grad=True) for s in ((4, 3), (5, 3), (5,))]
    assert gradcheck(f, leaves, check_forward_ad=True)
    assert gradgradcheck(f, leaves, check_fwd_over_rev=True)


def test_third_order_and_nested_forward_mode():
    z = torch.randn(4, dtype=D)
    ours = lambda z: entropy(z, torch.tensor(0))  # noqa: E731
    for third in (
        lambda f: torch.func.jacrev(torch.func.hessian(f)),
        lambda f: torch.func.jacfwd(torch.func.jacfwd(torch.func.jacfwd(f))),
    ):
        assert_close(third(ours)(z), third(oracle)(z))


def test_the_last_layer_is_that_of_its_logits():
    x, W, b = (torch.randn(s, dtype=D) for s in ((9, 3), (11, 3), (11,)))
    target = torch.arange(9)
    target[4] = -100
    leaves, wide = differentiable(x, W, b), differentiable(x, W, b)
    got = of_rows(leaves[0], leaves[1], target, leaves[2], block_rows=4)
    want = oracle(F.linear(*wide)) * (target >= 0)
    assert_close(got, want)
    v = torch.randn(9, dtype=D)
    first = torch.autograd.grad(got, leaves, v, create_graph=True)
    firsts = torch.autograd.grad(want, wide, v, create_graph=True)
    assert_close(first, firsts)
    second = torch.autograd.grad([d.sin().sum() for d in first], leaves)
    assert_close(second, torch.autograd.grad([d.sin().sum() for d in firsts], wide))


def test_a_class_without_probability_adds_nothing():
    z = torch.tensor([[0.0, -INF, 0.0], [3.0, -INF, -INF], [0.0, -200.0, 0.0]], requires_grad=True)
    H = entropy(z, torch.tensor([0, 0, 0]))
    log2 = torch.tensor(2.0).log()
    assert_close(H, torch.stack((log2, torch.tensor(0.0), log2)))
    (d,) = torch.autograd.grad(H.sum(), z, create_graph=True)
    assert d.isfinite().all()
    assert_close(d[1], torch.zeros(3))
    (dd,) = torch.autograd.grad(d.square().sum(), z)
    assert dd.isfinite().all()


def test_a_common_offset_costs_no_digit():
    z = torch.randn(4, 50, dtype=D)
    assert_close(
        entropy((z + 4096).float(), torch.zeros(4).long()),
        oracle((z + 4096).float()).float(),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("value", [torch.nan, INF])
def test_an_ignored_row_has_none(value: float):
    z = torch.randn(3, 4)
    z[1] = value
    z.requires_grad_()
    H = entropy(z, torch.tensor([0, -100, 2]))
    assert H[1] == 0
    (d,) = torch.autograd.grad(H.sum(), z)
    assert (d[1] == 0).all()
    assert d.isfinite().all()


def test_the_gradient_may_take_the_place_of_the_logits():
    leaf = torch.randn(3, 4, requires_grad=True)
    gradients = []
    for inplace in (False, True):
        z = leaf * 1
        loss, stats = cross_entropy(
            z, torch.tensor([0, 1, 2]), return_stats=True, inplace_backward=inplace
        )
        place = z.data_ptr()
        (d,) = torch.autograd.grad(loss + stats.entropy.sum(), leaf)
        gradients.append(d)
        assert z.data_ptr() == place
    assert_close(gradients[1], gradients[0])


def test_vmap_and_compile_give_the_same():
    z, target = torch.randn(2, 3, 4), torch.tensor([0, 1, 2])
    f = lambda z: entropy(z, target)  # noqa: E731
    assert_close(torch.func.vmap(f)(z), torch.stack([f(part) for part in z]))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    leaf, same = z[0].clone().requires_grad_(), z[0].clone().requires_grad_()
    (d,) = torch.autograd.grad(compiled(leaf).sum(), leaf)
    assert_close(d, torch.autograd.grad(f(same).sum(), same)[0])
    x, W = torch.randn(3, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    compiled = torch.compile(of_rows, fullgraph=True, backend="aot_eager")
    d = torch.autograd.grad(compiled(x, W, target).sum(), (x, W))
    assert_close(d, torch.autograd.grad(of_rows(x, W, target).sum(), (x, W)))


def test_no_classes_have_none():
    assert (entropy(torch.zeros(2, 0), torch.full((2,), -100)) == 0).all()
