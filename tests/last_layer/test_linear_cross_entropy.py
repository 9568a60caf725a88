"""linear_cross_entropy beside the literal Jacobian, float64 logits in one piece and torch's own."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, differentiable, oracle_cross_entropy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db

from custom_ops import jacobian, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("backend")

D = torch.double
# Each option alone, and all of them at once.
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.3},
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": 0.7},
    "normalizer": {"normalizer": 5.0},
    "ignored class": {"ignore_index": 1},
    "all": {
        "label_smoothing": 0.2,
        "z_loss": 0.3,
        "softcap": 2.0,
        "logit_scale": 0.7,
        "normalizer": 5.0,
        "ignore_index": 1,
    },
}
# Rows in one block, in several, in blocks of one, and in more than there are.
BLOCKS = (None, 2)


@pytest.fixture(params=OPTIONS)
def options(request):
    return dict(OPTIONS[request.param])


@pytest.fixture(params=["labels", "probabilities"])
def kind(request):
    return request.param


def case(kind, options, dtype=D, lead=(5,), features=3, classes=4):
    """Input, W, target, b and class weights; where there are several rows, one is ignored."""
    x, W, b = (
        torch.randn(*s, dtype=D) for s in ((*lead, features), (classes, features), (classes,))
    )
    w = torch.rand(classes, dtype=D) + 0.1
    if kind == "probabilities":
        options.pop("ignore_index", None)
        t = torch.rand(*lead, classes, dtype=D).to(dtype)
    else:
        t = torch.randint(classes, lead)
        if t.numel() > 1:
            t.view(-1)[1] = options.get("ignore_index", -100)
        elif t.item() == options.get("ignore_index", -100):
            t = t + 1
    return (*(s.to(dtype) for s in (x, W)), t, b.to(dtype), w.to(dtype))


def plain(x, W, t, b=None, *, weight=None, **options):
    """The float64 oracle on all logits at once, (…, D) flattened."""
    z = F.linear(x.double(), W.double(), None if b is None else b.double())
    rows = t.reshape(-1) if t.shape == x.shape[:-1] else t.reshape(-1, W.shape[0])
    loss, lse = oracle_cross_entropy(z.reshape(-1, W.shape[0]), rows, weight, **options)
    shape = x.shape[:-1]
    return loss.reshape(shape) if loss.dim() else loss, lse.reshape(shape)


@pytest.mark.parametrize("block_rows", BLOCKS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("lead", [(5,), (2, 3)])
def test_value_gradients_and_lse_agree_with_the_oracle(lead, kind, options, reduction, block_rows):
    if reduction != "mean":
        options.pop("normalizer", None)
    x, W, t, b, w = case(kind, options, lead=lead)
    ours, theirs = differentiable(x, W, b, w), differentiable(x, W, b, w)
    t1, t2 = (differentiable(t)[0] if t.is_floating_point() else t for _ in range(2))
    (x1, W1, b1, w1), (x2, W2, b2, w2) = ours, theirs
    got, stats = linear_cross_entropy(
        x1, W1, t1, b1, weight=w1, reduction=reduction, block_rows=block_rows,
        return_stats=True, **options,
    )  # fmt: skip
    want, lse = plain(x2, W2, t2, b2, weight=w2, reduction=reduction, **options)
    assert_close(got, want)
    assert_close(stats.lse, lse)
    v, u = torch.randn_like(want), torch.randn_like(lse)
    if t.is_floating_point():
        ours, theirs = [*ours, t1], [*theirs, t2]
    for a, c in zip(
        torch.autograd.grad((got, stats.lse), ours, (v, u)),
        torch.autograd.grad((want, lse), theirs, (v, u)),
        strict=True,
    ):
        assert_close(a, c)


@pytest.mark.parametrize("lead", [(), (1,), (2, 1, 3)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_any_number_of_leading_dimensions(lead, kind, reduction):
    x, W, t, b, w = case(kind, {"ignore_index": -100}, lead=lead)
    got, stats = linear_cross_entropy(x, W, t, b, weight=w, reduction=reduction, return_stats=True)
    want, lse = plain(x, W, t, b, weight=w, reduction=reduction)
    assert_close(got, want)
    assert_close(stats.lse, lse)
    counted = torch.ones(lead, dtype=bool) if t.is_floating_point() else t != -100
    prediction = F.linear(x, W, b).argmax(-1).masked_fill(~counted, -1)
    assert torch.equal(stats.prediction, prediction)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_first_second_and_mixed_derivatives(kind, options, reduction):
    if reduction != "mean":
        options.pop("normalizer", None)
    x, W, t, b, w = case(kind, options)
    inputs = differentiable(x, W, b, w, *([t] if t.is_floating_point() else []))

    def f(x, W, b, w, t=t):
        return linear_cross_entropy(
            x, W, t, b, weight=w, reduction=reduction, block_rows=2, **options
        )

    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True, check_batched_grad=True)


def test_statistics_have_second_derivatives_too(options):
    x, W, t, b, _ = case("labels", options)

    def f(x, W, b):
        loss, stats = linear_cross_entropy(x, W, t, b, block_rows=2, return_stats=True, **options)
        return loss, stats.lse

    inputs = differentiable(x, W, b)
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True)


def test_third_derivatives():
    x, W, t, b, _ = case("labels", {}, lead=(3,))

    def hessian_product(x, W, b):
        loss = linear_cross_entropy(x, W, t, b, z_loss=0.1, block_rows=2)
        g = torch.autograd.grad(loss, (x, W, b), create_graph=True)
        return torch.autograd.grad([s.sin().sum() for s in g], (x, W, b), create_graph=True)

    assert gradcheck(hessian_product, differentiable(x, W, b))


def test_the_literal_jacobian_gives_the_same():
    x, W, t, b, _ = case("probabilities", {})
    want = jacobian.last_layer_gradient(x, W, b, t)
    x1, W1, b1 = differentiable(x, W, b)
    loss = linear_cross_entropy(x1, W1, t, b1, reduction="sum", block_rows=2)
    got = torch.autograd.grad(loss, (x1, W1, b1), create_graph=True)
    for a, c in zip(got, (want.dC_dx, want.dC_dW.sum(0), want.dC_db.sum(0)), strict=True):
        assert_close(a, c)
    v = [torch.randn_like(s) for s in (x, W, b)]
    product = jacobian.last_layer_hvp(x, W, b, t, v[0], v[1], v[2])
    for a, c in zip(
        torch.autograd.grad(got, (x1, W1, b1), v),
        (product.x, product.W.sum(0), product.b.sum(0)),
        strict=True,
    ):
        assert_close(a, c)


@pytest.mark.parametrize("variant", ["", "chunked", "chunked_none"])
def test_torchs_own_samples_agree(variant):
    name = "nn.functional.linear_cross_entropy"
    found = [i for i in op_db if i.name == name and i.variant_test_name == variant]
    if not found:
        pytest.skip(f"this torch has no samples of {name}")
    (info,) = found
    count = 0
    for sample in info.sample_inputs("cpu", torch.float32, requires_grad=True):
        got = linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
        reference = {k: v for k, v in sample.kwargs.items() if k != "options"}
        want = F.linear_cross_entropy(sample.input, *sample.args, **reference)
        assert_close(got, want, equal_nan=True)
        leaves = [s for s in (sample.input, sample.args[0]) if s.requires_grad]
        for a, c in zip(
            torch.autograd.grad(got.sum(), leaves),
            torch.autograd.grad(want.sum(), leaves),
            strict=True,
        ):
            assert_close(a, c, equal_nan=True)
        count += 1
    assert count > 50


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_dtype_is_right_to_its_rounding(dtype, kind, options, reduction):
    if reduction != "mean":
        options.pop("normalizer", None)
    x, W, t, b, w = case(kind, options, dtype, lead=(9,), features=5, classes=7)
    leaves = differentiable(x, W, b)
    got = linear_cross_entropy(
        leaves[0], leaves[1], t, leaves[2], weight=w, reduction=reduction, block_rows=4, **options
    )
    # the plain form in the same type: logits and their gradient are rounded there as well
    exact, rough = differentiable(x.double(), W.double(), b.double()), differentiable(x, W, b)
    want, _ = plain(
        exact[0], exact[1], t, exact[2], weight=w.double(), reduction=reduction, **options
    )
    assert got.dtype == dtype
    half = dtype in (torch.float16, torch.bfloat16)
    tolerances = {"rtol": 5e-2, "atol": 5e-2} if half else {}  # logits of about 2, in 8 bits
    assert_close(got, want.to(dtype), **tolerances)
    for a, c, s in zip(
        torch.autograd.grad(got.sum(), leaves),
        torch.autograd.grad(want.sum(), exact),
        rough,
        strict=True,
    ):
        assert a.dtype == dtype
        assert a.shape == s.shape
        assert_close(a, c.to(dtype), **tolerances)


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weight_gradient_of_the_half_types_has_the_plain_forms_error_in_any_blocks(
    dtype, block_rows
):
    """torch's chunked path: 0.0017 grows to 0.03 with the number of chunks."""
    x, W = torch.randn(1000, 16).to(dtype), torch.randn(50, 16).to(dtype)
    t = torch.randint(50, (1000,))

    def gradient(loss, x, W):
        W = W.detach().requires_grad_()
        return torch.autograd.grad(loss(x, W, t), W)[0].double()

    exact = gradient(F.linear_cross_entropy, x.double(), W.double())
    error = gradient(F.linear_cross_entropy, x, W) - exact
    ours = gradient(lambda *a: linear_cross_entropy(*a, block_rows=block_rows), x, W) - exact
    assert ours.norm() <= error.norm()


FROZEN = [(True, True, True), (True, False, False), (False, True, False), (False, False, True),
          (False, True, True)]  # fmt: skip


@pytest.mark.parametrize("needs", FROZEN)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_only_what_requires_grad_gets_one(needs, reduction):
    x, W, t, b, _ = case("labels", {})
    leaves = [s.requires_grad_(n) for s, n in zip((x, W, b), needs, strict=True)]
    linear_cross_entropy(x, W, t, b, reduction=reduction, block_rows=2).sum().backward()
    copies = [s.detach().clone().requires_grad_() for s in (x, W, b)]
    plain(copies[0], copies[1], t, copies[2], reduction=reduction)[0].sum().backward()
    for leaf, copy, need in zip(leaves, copies, needs, strict=True):
        if need:
            assert_close(leaf.grad, copy.grad)
        else:
            assert leaf.grad is None


def test_a_retained_graph_gives_the_same_gradient_again_and_accumulates():
    x, W, t, b, _ = case("labels", {})
    x, W, b = differentiable(x, W, b)
    loss = linear_cross_entropy(x, W, t, b)
    first = torch.autograd.grad(loss, (x, W, b), retain_graph=True)
    kept = [s.clone() for s in first]
    for s in first:
        s.zero_()  # what is handed out is the caller's
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    for leaf, want in zip((x, W, b), kept, strict=True):
        assert_close(leaf.grad, 4 * want, rtol=0, atol=1e-15)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_micro_batches_add_up_to_the_batch():
    x, W, t, b, _ = case("labels", {}, lead=(8,))
    W1, W2 = differentiable(W, W)
    linear_cross_entropy(x, W1, t, b).backward()
    n = (t != -100).sum()
    for i in range(0, 8, 2):
        linear_cross_entropy(x[i : i + 2], W2, t[i : i + 2], b, normalizer=n).backward()
    assert_close(W1.grad, W2.grad)


def on_threads(threads: int, f: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return f()
    finally:
        torch.set_num_threads(before)


def test_bits_do_not_depend_on_the_number_of_threads():
    x, W, b = torch.randn(300, 32), torch.randn(5000, 32), torch.randn(5000)
    t, dz = torch.randint(5000, (300,)), torch.randn(128, 5000)

    def bits() -> tuple[Tensor, ...]:
        leaves = differentiable(x, W, b)
        loss = linear_cross_entropy(leaves[0], leaves[1], t, leaves[2], block_rows=128)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def bare() -> tuple[Tensor, ...]:  # a BLAS may cut a long sum into one for each thread
        loss = torch.addmm(b, x[:128], W.t())
        return loss, torch.mm(dz, W), torch.mm(dz.t(), x[:128]), dz.sum(0)

    results = zip(*(on_threads(n, bits) for n in (1, 2, 2)), strict=True)
    products = zip(*(on_threads(n, bare) for n in (1, 2)), strict=True)
    for (one, two, again), (alone, together) in zip(results, products, strict=True):
        assert torch.equal(two, again)
        assert torch.equal(one, two) or not torch.equal(alone, together)


def test_forward_alone_takes_no_gradient(monkeypatch):
    from custom_ops import kernels

    x, W, t, b, _ = case("labels", {})
    monkeypatch.setattr(kernels, "cross_entropy_vjp_", None)  # calling it would raise
    with torch.no_grad():
        got = linear_cross_entropy(x.requires_grad_(), W, t, b)
    assert_close(got, plain(x, W, t, b)[0].detach())
    assert_close(linear_cross_entropy(x.detach(), W, t, b), got)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_ignored_row_is_not_looked_at(value, reduction):
    x, W, t, b, _ = case("labels", {})
    x[1] = value
    leaves = differentiable(x, W, b)
    loss = linear_cross_entropy(leaves[0], leaves[1], t, leaves[2], reduction=reduction)
    gradients = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    products = torch.autograd.grad([g.sin().sum() for g in gradients], leaves)
    for s in (loss, *gradients, *products):
        assert s.isfinite().all()
    assert (gradients[0][1] == 0).all()
    _, (tangent) = torch.func.jvp(
        lambda W: linear_cross_entropy(x, W, t, b), (W,), (torch.ones_like(W),)
    )
    assert tangent.isfinite()


EMPTY = {"no rows": (0, 3, 4), "no classes": (2, 3, 0), "no features": (2, 0, 4)}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty_as_the_plain_form(name, reduction):
    N, features, classes = EMPTY[name]
    x, W, b = torch.randn(N, features), torch.randn(classes, features), torch.randn(classes)
    t = torch.zeros(N, dtype=torch.int64) if classes else torch.full((N,), -100)
    ours, theirs = differentiable(x, W, b), differentiable(x, W, b)
    got = linear_cross_entropy(ours[0], ours[1], t, ours[2], reduction=reduction)
    want = F.cross_entropy(F.linear(*theirs), t, reduction=reduction) if classes else got.detach()
    assert_close(got, want, equal_nan=True)
    gradients = torch.autograd.grad(got.sum(), ours)
    if classes:
        for a, c in zip(gradients, torch.autograd.grad(want.sum(), theirs), strict=True):
            assert_close(a, c, equal_nan=True)


def test_a_single_row_takes_its_label_with_or_without_a_dimension():
    x, W = torch.randn(3), torch.randn(4, 3)
    want = F.linear_cross_entropy(x, W, torch.tensor([2]))
    assert_close(linear_cross_entropy(x, W, torch.tensor([2])), want)
    assert_close(linear_cross_entropy(x, W, torch.tensor(2)), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tangents_of_gradients_have_the_half_types_too(dtype, reduction):
    x, W, t, b, _ = case("labels", {}, dtype)

    def gradients(x, W, b):
        return torch.func.grad(
            lambda *a: linear_cross_entropy(
                *a[:2], t, a[2], reduction=reduction, block_rows=2
            ).sum(),
            (0, 1, 2),
        )(x, W, b)

    values, tangents = torch.func.jvp(gradients, (x, W, b), (x, W, b))
    assert {s.dtype for s in (*values, *tangents)} == {dtype}


def test_all_rows_ignored():
    x, W, _, b, _ = case("labels", {})
    t = torch.full((5,), -100)
    leaves = differentiable(x, W, b)
    nothing = linear_cross_entropy(*leaves[:2], t, leaves[2])
    assert nothing.isnan()  # 0/0, as torch; its gradient is 0, as torch's
    assert all((g == 0).all() for g in torch.autograd.grad(nothing, leaves))
    loss = linear_cross_entropy(*leaves[:2], t, leaves[2], normalizer=3)
    loss.backward()
    assert loss == 0
    assert all((s.grad == 0).all() for s in leaves)


def test_one_class_and_rows_apart_in_memory():
    x, W = torch.randn(3, 8, dtype=D).t()[::2], torch.randn(6, 1, dtype=D).t()[:, ::2]
    t = torch.zeros(4, dtype=torch.int64)
    assert_close(linear_cross_entropy(x, W, t), torch.zeros((), dtype=D))
    W = torch.randn(3, 5, dtype=D).t()
    leaves = differentiable(x, W)
    got = linear_cross_entropy(*leaves, t, block_rows=3)
    assert_close(got, plain(*leaves, t)[0])


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_a_layer_for_each_position(kind):
    x, W, b = (
        torch.randn(4, 3, dtype=D),
        torch.randn(5, 2, 3, 3, dtype=D),
        torch.randn(5, 2, 3, dtype=D),
    )
    t = torch.randint(5, (4, 2, 3)) if kind == "labels" else torch.rand(4, 5, 2, 3, dtype=D)
    ours, theirs = differentiable(x, W, b), differentiable(x, W, b)
    for reduction in ("none", "sum", "mean"):
        got = linear_cross_entropy(*ours[:2], t, ours[2], reduction=reduction)
        want = F.linear_cross_entropy(*theirs[:2], t, linear_bias=theirs[2], reduction=reduction)
        assert_close(got, want)
        for a, c in zip(
            torch.autograd.grad(got.sum(), ours),
            torch.autograd.grad(want.sum(), theirs),
            strict=True,
        ):
            assert_close(a, c)
    _, stats = linear_cross_entropy(*ours[:2], t, ours[2], return_stats=True)
    logits = torch.einsum("cpqd,nd->ncpq", W, x) + b
    assert_close(stats.lse, logits.logsumexp(1))
    assert torch.equal(stats.prediction, logits.argmax(1))


@given(
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 14),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_blocks_of_any_size_agree(rows, features, classes, block_rows, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, dtype=D, generator=g)
    W = torch.randn(classes, features, dtype=D, generator=g)
    t = torch.randint(-1, classes, (rows,), generator=g)
    ours, theirs = differentiable(x, W), differentiable(x, W)
    options = {"ignore_index": -1, "reduction": "sum", "label_smoothing": 0.1}
    got = linear_cross_entropy(*ours, t, block_rows=block_rows, **options)
    want, _ = plain(*theirs, t, **options)
    assert_close(got, want)
    for a, c in zip(torch.autograd.grad(got, ours), torch.autograd.grad(want, theirs), strict=True):
        assert_close(a, c)


def test_autocast_takes_the_products_in_the_lower_precision():
    x, W, b = torch.randn(6, 8), torch.randn(5, 8), torch.randn(5)
    t = torch.randint(5, (6,))
    ours, theirs = differentiable(x, W, b), differentiable(x, W, b)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(*ours[:2], t, ours[2])
        want = F.cross_entropy(F.linear(*theirs), t)
    assert got.dtype == want.dtype == torch.float32
    assert_close(got, want)
    for a, c in zip(torch.autograd.grad(got, ours), torch.autograd.grad(want, theirs), strict=True):
        assert a.dtype == torch.float32
        assert_close(a, c, rtol=2**-7, atol=2**-9)  # bfloat16's rounding of the products


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(9, 9, 0, 5), (9, 0, 5), (9, 0, 2, 5)])
def test_a_layer_for_no_positions_has_torchs_answer(shape, soft, reduction):
    positions = shape[1:-1]
    target = torch.rand(9, 9, *positions) if soft else torch.zeros(9, *positions, dtype=torch.long)
    results = []
    for f in (linear_cross_entropy, F.linear_cross_entropy):
        x, W = torch.ones(9, 5, requires_grad=True), torch.ones(shape, requires_grad=True)
        loss = f(x, W, target, reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss.sum(), (x, W))))
    assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("rows", "classes"), [(0, 3), (0, 0), (4, 0), (0, 1)])
def test_no_rows_or_no_classes_have_gradients_of_zero(rows, classes, soft, reduction):
    leaves = differentiable(torch.ones(rows, 2), torch.ones(classes, 2), torch.ones(classes))
    target = torch.zeros(rows, classes) if soft else torch.full((rows,), -100)
    x, W, b = leaves
    loss = linear_cross_entropy(x, W, target, b, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    for gradient, leaf in zip(torch.autograd.grad(loss.sum(), leaves), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
