"""cross_entropy beside the float64 oracle, torch's built-in and the literal last layer."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, differentiable, oracle_cross_entropy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db

from custom_ops import cross_entropy, jacobian

pytestmark = pytest.mark.usefixtures("backend")

D = torch.double
INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
# Each option alone, and all of them at once.
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "full smoothing": {"label_smoothing": 1.0},
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
SHAPES = [(4,), (3, 4), (2, 4, 3), (2, 4, 2, 3)]


@pytest.fixture(params=OPTIONS)
def options(request):
    return dict(OPTIONS[request.param])


@pytest.fixture(params=["labels", "probabilities"])
def kind(request):
    return request.param


@pytest.fixture(params=["unweighted", "weighted"])
def weighted(request):
    return request.param == "weighted"


def case(shape, kind, options, weighted=True, dtype=D):
    """Logits, target and class weights; one label in three is ignored where there are several."""
    dim = 1 if len(shape) > 1 else 0
    C = shape[dim]
    input = torch.randn(shape, dtype=D).to(dtype)
    weight = (torch.rand(C, dtype=D) + 0.1).to(dtype) if weighted else None
    if kind == "probabilities":
        options.pop("ignore_index", None)
        return input, torch.rand(shape, dtype=D).to(dtype), weight
    target = torch.randint(C, (*shape[:dim], *shape[dim + 1 :]))
    if target.dim():
        target.view(-1)[1] = options.get("ignore_index", -100)
    elif target == options.get("ignore_index", -100):
        target = target + 1  # of one row, that row is counted; all ignored is an edge below
    return input, target, weight


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_gradient_and_lse_agree_with_the_oracle(shape, kind, options, weighted, reduction):
    if reduction != "mean":
        options.pop("normalizer", None)
    input, target, weight = case(shape, kind, options, weighted)
    (x, *w), (x0, *w0) = differentiable(input, weight), differentiable(input, weight)
    soft = target.is_floating_point()
    t, t0 = (differentiable(target)[0] if soft else target for _ in range(2))
    got, stats = cross_entropy(
        x, t, *(w or [None]), reduction=reduction, return_stats=True, **options
    )
    want, lse = oracle_cross_entropy(x0, t0, *(w0 or [None]), reduction=reduction, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(stats.lse, lse)
    v, u = torch.randn_like(want), torch.randn_like(lse)
    leaves = [(x, x0), *zip(w, w0, strict=True), *([(t, t0)] if soft else [])]
    for a, b in zip(
        torch.autograd.grad((got, stats.lse), [a for a, _ in leaves], (v, u)),
        torch.autograd.grad((want, lse), [b for _, b in leaves], (v, u)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_right_to_its_rounding(dtype, kind, options):
    input, target, weight = case((6, 9), kind, options, True, dtype)
    (x, w), (x0, w0) = differentiable(input, weight), differentiable(input.double(), weight)
    got = cross_entropy(x, target, w, **options)
    want, _ = oracle_cross_entropy(x0, target, w0.double(), **options)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype))
    for a, b in zip(
        torch.autograd.grad(got, (x, w)), torch.autograd.grad(want, (x0, w0)), strict=True
    ):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype))


def test_torchs_own_samples_agree():
    (info,) = (i for i in op_db if i.name == "nn.functional.cross_entropy")
    count = 0
    for sample in info.sample_inputs("cpu", torch.float32, requires_grad=True):
        got = cross_entropy(sample.input, *sample.args, **sample.kwargs)
        want = info.op(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(got, want, equal_nan=True)
        v = torch.randn_like(want)
        torch.testing.assert_close(
            torch.autograd.grad(got, sample.input, v),
            torch.autograd.grad(want, sample.input, v),
            equal_nan=True,
        )
        count += 1
    assert count > 20


def test_gradcheck_in_every_mode(kind, options, weighted):
    input, target, weight = case((3, 4), kind, options, weighted)
    soft = target.is_floating_point()
    leaves = differentiable(input, target if soft else None, weight)

    def f(input, *rest):
        t = rest[0] if soft else target
        loss, stats = cross_entropy(
            input, t, rest[-1] if weighted else None, return_stats=True, **options
        )
        return loss, stats.lse

    modes = {"check_batched_grad": True, "check_undefined_grad": True}
    assert gradcheck(f, leaves, check_forward_ad=True, check_batched_forward_grad=True, **modes)
    assert gradgradcheck(f, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, **modes)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_gradcheck_with_an_upstream_gradient_a_row(reduction, kind):
    input, target, weight = case((2, 4, 3), kind, {})
    leaves = differentiable(input, weight)

    def f(input, weight):
        return cross_entropy(input, target, weight, reduction=reduction, z_loss=0.1)

    assert gradcheck(f, leaves, check_forward_ad=True)
    assert gradgradcheck(f, leaves, check_fwd_over_rev=True)


def test_third_derivative_agrees(kind, options):
    input, target, weight = case((2, 3), kind, options)

    def third(f):
        d = torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(f)))
        return d(input)

    torch.testing.assert_close(
        third(lambda x: cross_entropy(x, target, weight, **options)),
        third(lambda x: oracle_cross_entropy(x, target, weight, **options)[0]),
    )


def test_last_layer_gradient_and_hvp_are_the_literal_ones():
    """∂C/∂W_ij = Σ_k Σ_s ∂C/∂a_k · J_ks · ∂z_s/∂W_ij, and its derivative along a direction."""
    x, W, b = (torch.randn(s, dtype=D) for s in ((5, 3), (4, 3), (4,)))
    y = torch.rand(5, 4, dtype=D)
    V = tuple(torch.randn_like(t) for t in (x, W, b))
    gradient = torch.func.grad(
        lambda x, W, b: cross_entropy(x @ W.T + b, y, reduction="sum"), argnums=(0, 1, 2)
    )
    (d_x, d_W, d_b), (H_x, H_W, H_b) = torch.func.jvp(gradient, (x, W, b), V)
    g = jacobian.last_layer_gradient(x, W, b, y)
    H = jacobian.last_layer_hvp(x, W, b, y, *V)
    torch.testing.assert_close((d_x, d_W, d_b), (g.dC_dx, g.dC_dW.sum(0), g.dC_db.sum(0)))
    torch.testing.assert_close((H_x, H_W, H_b), (H.x, H.W.sum(0), H.b.sum(0)))


@pytest.mark.parametrize("integer", INTEGERS)
def test_labels_of_every_integer_dtype(integer):
    x = torch.randn(4, 5, requires_grad=True)
    target = torch.tensor([0, 4, 2, 3]).to(getattr(torch, integer))
    torch.testing.assert_close(cross_entropy(x, target), F.cross_entropy(x, target.long()))


def test_uint8_label_maps_ignore_255():
    x = torch.randn(1, 5, 2, 2, requires_grad=True)
    target = torch.tensor([[[0, 255], [4, 2]]], dtype=torch.uint8)
    got = cross_entropy(x, target, ignore_index=255)
    want = F.cross_entropy(x, target.long(), ignore_index=255)  # torch: int64 for images
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y, x) for y in (got, want)))


def test_one_label_in_a_row_for_logits_without_a_batch():
    """torch takes target (1) for input (C) in the forward, and fails in its backward."""
    x = torch.randn(4, requires_grad=True)
    loss = cross_entropy(x, torch.tensor([2]), reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(x, torch.tensor([2]), reduction="none"))
    want = torch.autograd.grad(F.cross_entropy(x, torch.tensor(2)), x)
    torch.testing.assert_close(torch.autograd.grad(loss, x), want)


EDGES = {
    "one class": (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)),
    "no rows": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    "no rows, probabilities": (torch.zeros(0, 4), torch.zeros(0, 4)),
    "no pixels": (torch.zeros(2, 4, 0), torch.zeros(2, 0, dtype=torch.long)),
    "no pixels, probabilities": (torch.zeros(2, 4, 0), torch.zeros(2, 4, 0)),
    "no classes, no rows": (torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)),
    "no classes, ignored": (torch.zeros(2, 0), torch.full((2,), -100)),
    "no classes, probabilities": (torch.zeros(2, 0), torch.zeros(2, 0)),
    "all ignored": (torch.randn(3, 4), torch.full((3,), -100)),
    "one ignored, no batch": (torch.randn(4), torch.tensor(-100)),
    "-inf": (torch.tensor([[-torch.inf, 0.0, 1.0]]), torch.tensor([1])),
    "-inf at the label": (torch.tensor([[-torch.inf, 0.0, 1.0]]), torch.tensor([0])),
    "all -inf": (torch.full((1, 3), -torch.inf), torch.tensor([0])),
    "+inf": (torch.tensor([[torch.inf, 0.0, 1.0]]), torch.tensor([1])),
    "NaN in one row": (torch.tensor([[torch.nan, 0.0], [1.0, 2.0]]), torch.tensor([1, 0])),
    "1e38": (torch.tensor([[1e38, -1e38, 0.0]]), torch.tensor([0])),
    "3e38 apart": (torch.tensor([[1e38, -1e38, 0.0]]), torch.tensor([1])),
    "10000 classes": (torch.randn(2, 10_000), torch.tensor([0, 9_999])),
}


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("edge", EDGES)
def test_edges_are_those_of_torch(edge, reduction):
    input, target = EDGES[edge]
    got, want = (
        (y.detach(), *torch.autograd.grad(y.sum(), x))
        for f in (cross_entropy, F.cross_entropy)
        for x in differentiable(input)
        for y in [f(x, target, reduction=reduction)]
    )
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("offset", [0.0, 4096.0, -4096.0, 1e6])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_a_shared_offset_loses_no_digit(kind, offset):
    """M and L apart; one float32 lse = M + L would be off by 1e-5 to 2e-4 at 4096."""
    x = torch.randn(64, 100)
    x = ((x * 64).round() / 64 + offset).float()  # the offset itself rounds nothing away
    target = torch.randint(100, (64,)) if kind == "labels" else torch.rand(64, 100).softmax(1)
    leaf, exact = differentiable(x, x.double())
    got = cross_entropy(leaf, target, reduction="none")
    want = F.cross_entropy(exact, target.double() if kind != "labels" else target, reduction="none")
    torch.testing.assert_close(got, want.float(), rtol=2e-6, atol=1e-6)
    (got,) = torch.autograd.grad(got.sum(), leaf)
    (want,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(got, want.float(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("C", [10, 1000, 32_000, 1_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_less_accurate_than_the_builtin(dtype, C):
    x, target = torch.randn(4, C).to(dtype), torch.randint(C, (4,))
    leaves = differentiable(x, x, x.double())
    losses = [
        f(leaf, target, reduction="none")
        for f, leaf in zip((cross_entropy, F.cross_entropy, F.cross_entropy), leaves, strict=True)
    ]
    grads = [torch.autograd.grad(y.sum(), a)[0] for y, a in zip(losses, leaves, strict=True)]
    for ours, theirs, exact in (losses, grads):
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + rounding


LAYOUTS = {
    "transposed": lambda: torch.randn(5, 4).T,
    "channels last": lambda: torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(1, 5, 1).expand(3, 5, 4),
    "strided": lambda: torch.randn(6, 10, 8)[::2, ::2, ::4],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout, kind):
    x = LAYOUTS[layout]()
    target = torch.randint(5, x.select(1, 0).shape) if kind == "labels" else torch.rand(x.shape)
    results = []
    for leaf in (x.detach().requires_grad_(), x.contiguous().requires_grad_()):
        loss = cross_entropy(leaf, target, reduction="none")
        v = torch.arange(1.0, 2.0).expand(loss.shape)
        results.append((loss, torch.autograd.grad(loss, leaf, v)[0]))
    torch.testing.assert_close(*results)


def test_prediction_is_the_arg_max_and_no_gradient_meets_it():
    x = torch.randn(4, 5, 3, requires_grad=True)
    target = torch.randint(5, (4, 3))
    target[0, 0] = -100
    _, stats = cross_entropy(x, target, return_stats=True)
    want = x.argmax(1)
    want[0, 0] = -1
    assert torch.equal(stats.prediction, want)
    assert stats.prediction.dtype == torch.int64
    assert not stats.prediction.requires_grad
    assert stats.lse.requires_grad
    assert stats.lse[0, 0] == 0


def test_stats_are_in_float32_from_half_logits():
    _, stats = cross_entropy(torch.randn(2, 3).half(), torch.tensor([0, 1]), return_stats=True)
    assert stats.lse.dtype == torch.float32


def test_dtype_gives_the_loss_before_rounding():
    x = torch.randn(4, 50).bfloat16().requires_grad_()
    target = torch.randint(50, (4,))
    got = cross_entropy(x, target, dtype=torch.float32)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, F.cross_entropy(x.float(), target))
    assert torch.autograd.grad(got, x)[0].dtype == torch.bfloat16
    exact = cross_entropy(x, target, dtype=torch.float64)
    torch.testing.assert_close(exact, F.cross_entropy(x.double(), target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast_gives_float32_as_in_torch(dtype, kind):
    input, target, weight = case((3, 4), kind, {}, True, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (
            (y.detach(), *torch.autograd.grad(y, x))
            for f in (cross_entropy, F.cross_entropy)
            for x in differentiable(input)
            for y in [f(x, target, weight)]
        )
    assert [t.dtype for t in got] == [t.dtype for t in want]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.float64, torch.float32, torch.float16])
def test_probabilities_of_another_dtype_promote_as_in_torch(logits, other):
    x, y = torch.randn(3, 4).to(logits), torch.rand(3, 4).to(other)
    assert cross_entropy(x, y).dtype == F.cross_entropy(x, y).dtype


def test_micro_batches_with_a_normalizer_add_up_to_the_batch():
    x, target = torch.randn(6, 4, dtype=D), torch.tensor([0, -100, 2, -100, -100, 3])
    (whole,), (parts,) = differentiable(x), differentiable(x)
    cross_entropy(whole, target).backward()
    count = (target != -100).sum()
    for rows in (slice(0, 3), slice(3, 5), slice(5, 6)):  # the second is all ignored
        cross_entropy(parts[rows], target[rows], normalizer=count).backward()
    torch.testing.assert_close(parts.grad, whole.grad)


def test_gradient_flows_to_a_normalizer_that_wants_it():
    x, target = torch.randn(2, 3, dtype=D), torch.tensor([0, 1])
    n = torch.tensor(3.0, dtype=D, requires_grad=True)
    assert gradcheck(lambda n: cross_entropy(x, target, normalizer=n), n)


def test_backward_saves_the_inputs_and_two_numbers_a_row():
    x, target = torch.randn(64, 1000, requires_grad=True), torch.randint(1000, (64,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy(x, target, torch.rand(1000), label_smoothing=0.1, z_loss=0.1, softcap=30.0)
    large = [t for t in saved if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
    assert sorted(t.numel() for t in saved if t.numel() < x.numel())[-4:] == [64, 64, 64, 1000]


@pytest.mark.parametrize(
    ("z_loss", "softcap", "reduction"),
    list(itertools.product([0.0, 0.1], [None, 5.0], ["mean", "sum"])),
)
@given(
    rows=st.integers(1, 5),
    C=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
)
@settings(deadline=None, max_examples=25)
def test_any_case_agrees_with_the_oracle(
    z_loss, softcap, reduction, rows, C, seed, scale, smoothing
):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, C, generator=g, dtype=D) * scale
    target = torch.randint(C, (rows,), generator=g)
    target[1:][torch.rand(rows - 1, generator=g) < 0.2] = -100
    w = torch.rand(C, generator=g, dtype=D)
    options = {
        "reduction": reduction,
        "label_smoothing": smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
    }
    (a,), (b,) = differentiable(x), differentiable(x)
    got, (want, _) = (
        cross_entropy(a, target, w, **options),
        oracle_cross_entropy(b, target, w, **options),
    )
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(
        torch.autograd.grad(got, a), torch.autograd.grad(want, b), equal_nan=True
    )


@given(shift=st.floats(-1e3, 1e3), seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_shift_changes_neither_loss_nor_gradient(shift, seed):
    g = torch.Generator().manual_seed(seed)
    x, target = torch.randn(3, 5, generator=g, dtype=D), torch.randint(5, (3,), generator=g)
    (a,), (b,) = differentiable(x), differentiable(x + shift)
    got, want = cross_entropy(a, target), cross_entropy(b, target)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(got, a), torch.autograd.grad(want, b), rtol=1e-9, atol=1e-9
    )


@given(seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_permutation_of_the_classes_permutes_the_gradient(seed):
    g = torch.Generator().manual_seed(seed)
    x, order = torch.randn(3, 5, generator=g, dtype=D), torch.randperm(5, generator=g)
    target = torch.randint(5, (3,), generator=g)
    (a,), (b,) = differentiable(x), differentiable(x[:, order])
    got, want = cross_entropy(a, target), cross_entropy(b, order.argsort()[target])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, a)[0][:, order], torch.autograd.grad(want, b)[0]
    )


def test_a_batch_equals_its_rows_bit_for_bit():
    x, target = torch.randn(7, 33), torch.randint(33, (7,))
    rows = torch.stack([cross_entropy(r, t) for r, t in zip(x, target, strict=True)])
    torch.testing.assert_close(cross_entropy(x, target, reduction="none"), rows, rtol=0, atol=0)


@given(seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_gradient_rows_sum_to_zero(seed):
    """Σ_s ∂C/∂z_s = 0, the rows of J summing to 0; with no class weight and no z-loss."""
    g = torch.Generator().manual_seed(seed)
    (x,) = differentiable(torch.randn(3, 5, generator=g, dtype=D))
    target = torch.randint(5, (3,), generator=g)
    (d,) = torch.autograd.grad(cross_entropy(x, target, label_smoothing=0.1), x)
    torch.testing.assert_close(d.sum(1), torch.zeros(3, dtype=D), rtol=0, atol=1e-15)


def test_inputs_are_left_alone(kind, options):
    input, target, weight = case((3, 4), kind, options)
    (x,) = differentiable(input)
    before = [t.clone() for t in (x, target, weight)]
    cross_entropy(x, target, weight, **options).backward()
    for a, b in zip((x, target, weight), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("integer", "label", "ignore_index"),
    [("uint8", 156, -100), ("uint8", 255, -1), ("uint8", 5, 261), ("int8", 5, 261),
     ("int16", 5, 65541), ("uint16", 65436, -100)],
)  # fmt: skip
def test_a_narrow_label_is_not_taken_for_the_ignore_index(integer, label, ignore_index):
    """In uint8, −100 wraps to 156: the rows are compared in int64, in every derivative."""
    x = torch.randn(1, label + 1, dtype=D)
    target = torch.tensor([label]).to(getattr(torch, integer))
    for f in (
        lambda x, t: torch.func.grad(cross_entropy)(x, t, ignore_index=ignore_index),
        lambda x, t: torch.func.jvp(
            lambda x: cross_entropy(x, t, ignore_index=ignore_index), (x,), (x,)
        )[1],
        lambda x, t: torch.func.jvp(
            torch.func.grad(lambda x: cross_entropy(x, t, ignore_index=ignore_index)), (x,), (x,)
        )[1],
    ):
        torch.testing.assert_close(f(x, target), f(x, target.long()))
        assert (f(x, target) != 0).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_weight_of_a_class_that_no_label_names_is_not_read(value):
    x, target = torch.randn(2, 3, dtype=D), torch.tensor([0, 2])
    w, finite = torch.tensor([1.0, value, 2.0]).double(), torch.tensor([1.0, 1.0, 2.0]).double()
    for transform in (torch.func.grad, torch.func.hessian, lambda f: torch.func.jacfwd(f)):
        got, want = (transform(lambda x, w=w: cross_entropy(x, target, w))(x) for w in (w, finite))
        torch.testing.assert_close(got, want)


def test_an_unreduced_loss_may_be_changed_in_place(kind):
    input, target, _ = case((3, 4), kind, {})
    (x,) = differentiable(input)
    loss = cross_entropy(x, target, reduction="none")
    want = torch.autograd.grad(loss.sum(), x, retain_graph=True)[0]
    loss.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), x)[0], 2 * want)


def test_lse_alone_sends_nothing_to_target_and_weight():
    x, y, w = differentiable(torch.tensor([[0.0, -torch.inf]]), torch.eye(2)[:1], torch.ones(2))
    _, stats = cross_entropy(x, y, w, return_stats=True)
    d = torch.autograd.grad(stats.lse.sum(), (x, y, w), allow_unused=True)
    assert torch.equal(d[0], torch.tensor([[1.0, 0.0]]))
    assert d[1:] == (None, None)


def test_autocast_widens_weight_and_probabilities_too():
    x, target, w = torch.randn(4, 5), torch.tensor([0, 2, 1, 4]), torch.rand(5).bfloat16()
    y = torch.rand(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for arguments in ((x, target, w), (x.bfloat16(), y.double()), (x.bfloat16(), y.half(), w)):
            got, want = cross_entropy(*arguments), F.cross_entropy(*arguments)
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want)
