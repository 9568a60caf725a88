"""The last layer within the memory that is named: every order by its numbers, and around it."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from conftest import differentiable
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from custom_ops import LinearCrossEntropyLoss, linear_cross_entropy
from custom_ops.kernels import Options, Rows
from custom_ops.last_layer import by_classes, loop, products, whole
from custom_ops.last_layer.layer import Blocks, Layer
from custom_ops.last_layer.plan import DEVICES, Plan, Sizes, plan_of

pytestmark = pytest.mark.usefixtures("backend")

N, D, C = 23, 7, 300
# for float64 logits of the rows that count: a row; a slab; a slab and some rows; all
MEMORY = {"rows": 2400, "classes": 20_000, "classes and more": 35_000, "whole": 60_000}
OPTIONS = {
    "plain": {},
    "z-loss": {"z_loss": 0.1},
    "cap": {"softcap": 3.0, "logit_scale": 0.7, "z_loss": 0.1},
    "smoothed": {"label_smoothing": 0.1},
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Take the orders by a GPU's costs, calls left out: sizes as small as these go by rows else."""
    monkeypatch.setitem(DEVICES, "cpu", DEVICES["cuda"]._replace(call=0))
    plan_of.cache_clear()
    yield
    plan_of.cache_clear()


@pytest.fixture(params=MEMORY, ids=MEMORY)
def memory(request):
    return MEMORY[request.param]


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, b and labels, some of them ignored."""
    t = torch.randint(C, (N,))
    t[::5] = -100
    return *(torch.randn(s, dtype=dtype) for s in ((N, D), (C, D), (C,))), t


def in_one_piece(x, W, b, t, w=None, q=None, reduction="mean", z_loss=0.0, **options):
    """Loss and lse by float64 formulas of logits that exist."""
    alpha, cap, eps = (options.get(k) for k in ("logit_scale", "softcap", "label_smoothing"))
    z = (x @ W.T + (0 if b is None else b)) * (alpha or 1.0)
    z = z if cap is None else cap * torch.tanh(z / cap)
    lse = z.logsumexp(1)
    loss = torch.nn.functional.cross_entropy(
        z, t, w, reduction="none", label_smoothing=eps or 0.0
    ) + torch.where(t == -100, 0.0, z_loss * lse**2)
    if reduction == "none":
        return loss
    counted = t != -100
    n = counted.sum() if w is None else w[t[counted]].sum()
    return loss.sum() / (n if reduction == "mean" else 1)


def orders_of(memory: int, **given) -> str:
    s = Sizes(N - 5, D, C, 8, "cpu", **given)
    return plan_of(s, memory).order


def test_the_amounts_of_memory_lead_to_every_order():
    orders = [orders_of(memory) for memory in MEMORY.values()]
    assert orders == ["rows", "classes", "classes", "whole"]
    s = Sizes(N - 5, D, C, 8, "cpu")
    assert plan_of(s, MEMORY["classes"]).kept < plan_of(s, MEMORY["classes and more"]).kept < N - 5


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_are_the_oracles(memory, reduction, options):
    for bias, weighted in itertools.product((False, True), repeat=2):
        x, W, b, t = tensors()
        leaves, wide = ([*differentiable(x, W, *[b] * bias)] for _ in range(2))
        w = torch.rand(C, dtype=torch.float64) + 0.5 if weighted else None
        given = {"reduction": reduction, **OPTIONS[options]}
        loss = linear_cross_entropy(
            *leaves[:2], t, leaves[2] if bias else None, weight=w, memory=memory, **given
        )
        want = in_one_piece(*wide[:2], wide[2] if bias else None, t, w, **given)
        torch.testing.assert_close(loss, want)
        g = torch.randn_like(want)
        for got, d in zip(
            torch.autograd.grad(loss, leaves, g), torch.autograd.grad(want, wide, g), strict=True
        ):
            torch.testing.assert_close(got, d)


@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product((0, 1), repeat=3) if any(w)], ids=str
)
def test_any_of_the_gradients_alone(memory, wanted):
    x, W, b, t = tensors()
    given = [s.requires_grad_(bool(w)) for s, w in zip((x, W, b), wanted, strict=True)]
    leaves = [s for s in given if s.requires_grad]
    loss = linear_cross_entropy(x, W, t, b, memory=memory)
    want = torch.autograd.grad(in_one_piece(x, W, b, t), leaves)
    for leaf, d in zip(leaves, want, strict=True):  # asked for one by one
        again = linear_cross_entropy(x, W, t, b, memory=memory)
        torch.testing.assert_close(torch.autograd.grad(again, leaf)[0], d)
    for got, d in zip(torch.autograd.grad(loss, leaves), want, strict=True):
        torch.testing.assert_close(got, d)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_and_their_gradients_within_the_memory(memory, reduction):
    x, W, b, t = tensors()
    leaves = differentiable(x, W, b)
    loss, stats = linear_cross_entropy(
        *leaves[:2], t, leaves[2], reduction=reduction, memory=memory, return_stats=True
    )
    z = torch.nn.functional.linear(*leaves)
    lse = z.logsumexp(1).where(t != -100, 0.0)
    torch.testing.assert_close(stats.lse, lse)
    q, e = torch.randn_like(lse), torch.randn_like(lse)
    H = -(z.softmax(1) * z.log_softmax(1)).sum(1).where(t != -100, 0.0)
    want = in_one_piece(*leaves, t, reduction=reduction)
    total = loss.sum() + (stats.lse * q).sum() + (stats.entropy * e).sum()
    other = want.sum() + (lse * q).sum() + (H * e).sum()
    for got, d in zip(
        torch.autograd.grad(total, leaves), torch.autograd.grad(other, leaves), strict=True
    ):
        torch.testing.assert_close(got, d)


def test_gradcheck_and_gradgradcheck(memory):
    x, W, b, t = tensors()
    x, W, b, t = x[:7], W[:5] * 0.3, b[:5], t[:7] % 5
    leaves = differentiable(x, W, b)
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "memory": memory // 60}

        def f(x, W, b, options=options):
            return linear_cross_entropy(x, W, t, b, **options)

        gradcheck(f, leaves, check_forward_ad=True)
        gradgradcheck(f, leaves)


def gradients(loss: Tensor, leaves, **options) -> list[Tensor]:
    return list(torch.autograd.grad(loss.sum(), leaves, **options))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_graph_that_is_retained_answers_again(memory, reduction):
    x, W, b, t = tensors()
    leaves = differentiable(x, W, b)
    loss = linear_cross_entropy(*leaves[:2], t, leaves[2], reduction=reduction, memory=memory)
    first = gradients(loss, leaves, retain_graph=True)
    second = gradients(loss, leaves, create_graph=True)
    third = gradients(loss, leaves)  # in the kept logits' memory
    for one, two, three in zip(first, second, third, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, three)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, leaves)


def test_nothing_given_is_changed(memory):
    x, W, b, t = tensors()
    before = [s.clone() for s in (x, W, b, t)]
    leaves = differentiable(x, W, b)
    linear_cross_entropy(*leaves[:2], t, leaves[2], memory=memory).backward()
    assert all(torch.equal(s, was) for s, was in zip((*leaves, t), before, strict=True))


def test_a_factor_that_was_changed_before_the_backward_is_told(memory):
    x, W, b, t = tensors()
    leaves = differentiable(x, W, b)
    loss = linear_cross_entropy(*leaves[:2], t, leaves[2], memory=memory)
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def same_gradients(f, memory: int) -> None:
    """The gradients of f(x, W, b, t, memory) are the oracle's."""
    x, W, b, t = tensors()
    leaves = differentiable(x, W, b)
    want = gradients(in_one_piece(*leaves, t), leaves)
    f(*leaves, t, memory).backward()
    for leaf, d in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, d)


def plain(x, W, b, t, memory):
    return linear_cross_entropy(x, W, t, b, memory=memory)


class Looking(TorchDispatchMode):
    """Sees every operator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_it_again(memory, reentrant):
    same_gradients(lambda *a: checkpoint(plain, *a, use_reentrant=reentrant), memory)


@pytest.mark.parametrize("before", [False, True])
def test_a_checkpoint_may_be_recomputed_in_other_surroundings(memory, before):
    """It compares what was saved: with a mode around the one and not around the other."""
    looks_on = [not before, before]

    def f(*args):
        with Looking() if looks_on.pop() else nullcontext():
            return plain(*args)

    same_gradients(lambda *a: checkpoint(f, *a, use_reentrant=False), memory)


def test_where_hooks_save_no_logits_are_kept(memory):
    x, W, b, t = tensors()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda s: saved.append(s.shape) or s, lambda s: s
    ):
        plain(*differentiable(x, W, b), t, memory)
    assert all(shape != (N - 5, C) and shape != (0, C) for shape in saved)


def test_saved_tensors_may_wait_elsewhere(memory):
    def packed(*args):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda s: (s.numpy().tobytes(), s.shape, s.dtype),
            lambda p: torch.frombuffer(bytearray(p[0] or b"\0" * 8), dtype=p[2])[
                : p[1].numel()
            ].view(p[1]),
        ):
            return plain(*args)

    same_gradients(packed, memory)


def test_one_that_looks_on_takes_the_rows(memory):
    def watched(*args):
        with Looking():
            return plain(*args)

    same_gradients(watched, memory)
    x, W, b, t = tensors()
    leaves = differentiable(x, W, b)
    loss = plain(*leaves, t, memory)
    want = gradients(loss, leaves, retain_graph=True)
    with Looking():
        for got, d in zip(gradients(loss, leaves, retain_graph=True), want, strict=True):
            torch.testing.assert_close(got, d)


def test_a_batch_of_upstream_gradients(memory):
    x, W, b, t = tensors()
    leaves = differentiable(x, W, b)
    loss = linear_cross_entropy(*leaves[:2], t, leaves[2], reduction="none", memory=memory)
    rows = torch.eye(N, dtype=torch.float64)
    together = torch.autograd.grad(loss, leaves, rows, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(loss, leaves, g, retain_graph=True) for g in rows[:3]]
    for d, *each in zip(together, *alone, strict=True):
        torch.testing.assert_close(d[:3], torch.stack(each))


def test_functional_transforms(memory):
    x, W, b, t = tensors()
    want = torch.func.grad(lambda *a: in_one_piece(*a, t), (0, 1, 2))(x, W, b)
    got = torch.func.grad(lambda *a: plain(*a, t, memory), (0, 1, 2))(x, W, b)
    for g, d in zip(got, want, strict=True):
        torch.testing.assert_close(g, d)
    rows = torch.func.vmap(torch.func.grad(lambda x, t: plain(x[None], W, b, t[None], memory)))
    of_rows = torch.func.vmap(
        torch.func.grad(lambda x, t: in_one_piece(x[None], W, b, t[None])), randomness="error"
    )
    counted = t != -100
    torch.testing.assert_close(rows(x[counted], t[counted]), of_rows(x[counted], t[counted]))


def test_the_module_passes_it_on(memory):
    x, _, _, t = tensors()
    loss = LinearCrossEntropyLoss(D, C, bias=True, dtype=torch.float64, memory=memory)
    assert f"memory={memory}" in repr(loss)
    value = loss(x, t)
    value.backward()
    layer = loss.linear
    want = in_one_piece(x, layer.weight, layer.bias, t)
    got = [layer.weight.grad, layer.bias.grad]
    for g, d in zip(got, torch.autograd.grad(want, (layer.weight, layer.bias)), strict=True):
        torch.testing.assert_close(g, d)


@pytest.mark.parametrize("every", [False, True])
def test_no_row_and_no_row_that_counts(memory, every):
    x, W, b, t = tensors()
    x, t = (x, torch.full_like(t, -100)) if every else (x[:0], t[:0])
    leaves = differentiable(x, W, b)
    loss = linear_cross_entropy(*leaves[:2], t, leaves[2], reduction="sum", memory=memory)
    assert loss == 0
    assert all((g == 0).all() for g in gradients(loss, leaves))


def test_an_ignored_row_may_hold_anything(memory):
    x, W, b, t = tensors()
    x[t == -100] = torch.nan
    leaves = differentiable(x, W, b)
    loss = linear_cross_entropy(*leaves[:2], t, leaves[2], memory=memory)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(loss, leaves))


# The orders themselves, called as a device calls them: no row is cut out.


class Counting(TorchDispatchMode):
    """Multiplications of the products made inside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm"):
            A, B = args[-2:]
            self.count += A.shape[0] * A.shape[1] * B.shape[1]
        return func(*args, **(kwargs or {}))


def layer_of(dtype: torch.dtype, bias: bool = False, weighted: bool = False, **options) -> Layer:
    x, W, b, t = tensors(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(C, dtype=acc) + 0.5 if weighted else None
    blocks = Blocks(False, (True, True, bias), keeps=True)
    return Layer(x, W, b if bias else None, t, weight, Options(1, acc, **options), blocks)


def classes_plan(size: int, kept: int) -> Plan:
    return Plan("classes", size, kept, 0, 0, 0)


def unread(monkeypatch):
    """Labels cannot be looked at, as on a device."""
    monkeypatch.setattr("custom_ops.last_layer.readable.can_be_read", lambda _: False)


@pytest.mark.parametrize("size", [1, 10, 41, 300, 1000])
@pytest.mark.parametrize("kept", [D, D + 5, N])
def test_slabs_of_any_size_find_loss_and_gradients(monkeypatch, kept, size):
    unread(monkeypatch)
    for options, bias, with_q in itertools.product(("plain", "cap"), (False, True), (False, True)):
        given = OPTIONS[options]
        layer = layer_of(torch.float64, bias, not bias, **given)
        layer.x[0] = torch.nan  # an ignored row
        plan = classes_plan(size, kept)
        found, memory = by_classes.forward(layer, plan)
        g = torch.randn(N, dtype=torch.float64)
        q = torch.randn(N, dtype=torch.float64) if with_q else None
        got = by_classes.backward(layer, Rows(g, q, found.M, found.L), memory, plan)
        x, W, *b = (s.requires_grad_() for s in differentiable(*layer.tensors[: 2 + bias]))
        clean = x.where(layer.target[:, None] != -100, 0.0)
        b = b[0] if bias else None
        loss = in_one_piece(clean, W, b, layer.target, layer.weight, reduction="none", **given)
        torch.testing.assert_close(found.loss, loss)
        total = (loss * g).sum()
        if q is not None:
            z = (clean @ W.T + (0 if b is None else b)) * given.get("logit_scale", 1.0)
            cap = given.get("softcap")
            lse = (z if cap is None else cap * torch.tanh(z / cap)).logsumexp(1)
            total = total + (lse * q).where(layer.target != -100, 0.0).sum()
        want = torch.autograd.grad(total, [s for s in (x, W, b) if s is not None])
        for d, w in zip([s for s in got if s is not None], want, strict=True):
            torch.testing.assert_close(d, w)
        assert got.W.data_ptr() == memory.dW.data_ptr()


@pytest.mark.parametrize("wants_x", [False, True])
def test_all_logits_at_once_beside_a_row_that_is_not_cut_out(monkeypatch, wants_x):
    unread(monkeypatch)
    layer = layer_of(torch.float64, bias=True)
    layer = layer._replace(blocks=Blocks(False, (wants_x, True, True), keeps=True))
    layer.x[0] = torch.nan  # an ignored row
    found, kept = whole.forward(layer)
    g = torch.randn(N, dtype=torch.float64)
    dx, dW, db = whole.backward(layer, Rows(g, None, found.M, found.L), kept)
    x, W, b = differentiable(*layer.tensors[:3])
    clean = x.where(layer.target[:, None] != -100, 0.0)
    loss = in_one_piece(clean, W, b, layer.target, reduction="none")
    torch.testing.assert_close(found.loss, loss)
    want = torch.autograd.grad((loss * g).sum(), (x, W, b))
    assert (dx is not None) == wants_x
    for got, d in zip((dx, dW, db), want, strict=True):
        assert got is None or torch.allclose(got, d)


@pytest.mark.parametrize("kept", [D, D + 5, N])
def test_only_what_is_not_kept_is_computed_again(kept):
    layer = layer_of(torch.float64)
    plan = classes_plan(10, kept)
    with Counting() as counting:
        found, memory = by_classes.forward(layer, plan)
        by_classes.backward(layer, Rows(found.L, None, found.M, found.L), memory, plan)
    assert counting.count / (N * D * C) == pytest.approx(3 + max(0, 1 - kept / N))


@pytest.mark.parametrize("order", ["classes", "whole"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_dw_is_rounded_once_whatever_the_order(order, half, monkeypatch):
    """float64 products of the same rounded dz, rounded once: what the order may differ by is dz."""
    monkeypatch.setattr(products, "widens", lambda _: False)
    layer = layer_of(half)
    plan = classes_plan(37, D + 2)
    run = (
        (lambda: whole.forward(layer), lambda *a: whole.backward(layer, *a))
        if order == "whole"
        else (
            lambda: by_classes.forward(layer, plan),
            lambda *a: by_classes.backward(layer, *a, plan),
        )
    )
    found, memory = run[0]()
    dx, dW, _ = run[1](Rows(torch.ones(N), None, found.M, found.L), memory)
    x, W = (s.detach().double().requires_grad_() for s in layer[:2])
    want = torch.autograd.grad(in_one_piece(x, W, None, layer.target, reduction="sum"), (x, W))
    eps = torch.finfo(half).eps
    for got, d in zip((dx, dW), want, strict=True):
        assert got.dtype == half
        # the rounding of the logits, of dz, and one of the result
        assert (got.double() - d).abs().max() <= 4 * eps * d.abs().max()


def test_a_bad_label_makes_its_row_nan(monkeypatch):
    unread(monkeypatch)
    layer = layer_of(torch.float64)
    layer.target[3] = C
    plan = classes_plan(10, D)
    found, memory = by_classes.forward(layer, plan)
    assert found.loss.isnan().nonzero().flatten().tolist() == [3]
    got = by_classes.backward(
        layer, Rows(torch.ones_like(found.L), None, *found[1:3]), memory, plan
    )
    assert got.x[3].isnan().all()
    assert got.x[:3].isfinite().all()


def test_classes_at_minus_infinity_in_a_whole_slab_add_nothing():
    layer = layer_of(torch.float64, bias=True)
    layer.b[:10] = -torch.inf
    layer.target[(layer.target < 10) & (layer.target >= 0)] = 20
    found, _ = by_classes.forward(layer, classes_plan(10, D))
    want = in_one_piece(layer.x, layer.W, layer.b, layer.target, reduction="none")
    torch.testing.assert_close(found.loss, want)


# What is allocated.


def peak(work) -> int:
    """The most bytes of tensors that exist at a time beyond those before, to the byte."""
    with profile(profile_memory=True) as found:
        kept = work()
    del kept
    events = found.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(n for _, n in changes))


def test_of_several_layers_nothing_is_kept(memory, monkeypatch):
    """Else what is kept would add up over the positions."""
    orders = []

    def planned(layer: Layer, *, by_classes: bool) -> Plan:
        plan = real(layer, by_classes=by_classes)
        orders.append(plan.order)
        return plan

    real = loop.planned
    monkeypatch.setattr(loop, "planned", planned)
    x, _, _, _ = tensors()
    W = torch.randn(C, 3, D, dtype=torch.float64)
    leaves = differentiable(x, W)
    t = torch.randint(C, (N, 3))
    loss = linear_cross_entropy(*leaves, t, memory=memory)
    z = torch.einsum("nd,cpd->ncp", *leaves)
    want = torch.nn.functional.cross_entropy(z, t)
    for got, d in zip(gradients(loss, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(got, d)
    assert orders == ["rows"] * 3


OF_ROWS = 100  # bytes of what there is one of for each row: loss, M, L, g, labels


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mib", [0.2, 1, 2, 3, 4.2, 100])
def test_the_memory_is_what_was_named(mib, reduction, backend):
    if backend != "cpp":
        pytest.skip("plain ATen operators, and Triton's interpreter, have temporaries of their own")
    rows, features, classes, memory = 512, 128, 2048, int(mib * 2**20)
    x, W = differentiable(torch.randn(rows, features), torch.randn(classes, features))
    t = torch.randint(classes, (rows,))

    def step():
        loss = linear_cross_entropy(x, W, t, reduction=reduction, memory=memory)
        return torch.autograd.grad(loss, (x, W), torch.ones_like(loss))

    plan = plan_of(Sizes(rows, features, classes, 4, "cpu", reduction == "mean"), memory)
    gradients = (rows + classes) * features * 4
    taken = peak(step) - gradients
    assert plan.bytes <= memory
    # dx is not there yet while the logits of whole rows are
    assert plan.bytes - rows * features * 4 <= taken <= plan.bytes + OF_ROWS * rows
