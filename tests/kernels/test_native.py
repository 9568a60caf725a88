"""The C++ kernels: registered right, the same bits by every way to them, and torch's precision."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import custom_ops
from custom_ops import cross_entropy, log_softmax, softmax
from custom_ops.kernels import Options, Problem, Rows, built, cpu, eager
from custom_ops.last_layer import products
from custom_ops.row import Row

pytestmark = pytest.mark.skipif(cpu.library is None, reason=f"C++ kernels: {cpu.missing}")

ops = torch.ops.custom_ops
NUMBERS = (-100, [0.1, 0.01, 1.5, 4.0])
LAYOUTS = {
    "rows": ((5, 40), 1),
    "few classes": ((5, 7), 1),
    "classes in the middle": ((2, 7, 3, 5), 1),
    "runs of classes in the middle": ((2, 70, 3), 1),
    "classes first": ((7, 3), 0),
    "a vector": ((7,), 0),
    "no row": ((0, 7), 1),
}


def inputs(shape: tuple[int, ...], dim: int, *, dtype: torch.dtype, soft: bool) -> tuple:
    x = torch.randn(shape, dtype=dtype)
    rows = [size for d, size in enumerate(shape) if d != dim]
    target = torch.rand(shape, dtype=dtype) if soft else torch.randint(shape[dim], rows)
    weight = torch.rand(shape[dim], dtype=native_dtype(dtype))
    g, h = (torch.randn(rows, dtype=native_dtype(dtype)) for _ in range(2))
    return x, target, weight, g, h


def native_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "dim"), LAYOUTS.values(), ids=list(LAYOUTS))
def test_opcheck(shape: tuple[int, ...], dim: int, dtype: torch.dtype):
    x, v = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    for log in (False, True):
        opcheck(ops.softmax.default, (x, dim, log))
        opcheck(ops.softmax.default, (x.T if x.dim() == 2 else x, dim, log))
    p = ops.softmax(x, dim, False)
    for op in (ops.contract, ops.log_softmax_vjp, ops.log_softmax_jvp):
        opcheck(op.default, (p, v, dim))
    if dtype != torch.bfloat16:  # sums are of float32 or float64
        opcheck(ops.total.default, (x,))
    for soft in (False, True):
        x, target, weight, g, q = inputs(shape, dim, dtype=dtype, soft=soft)
        for stats in (False, True):
            args = (x, target, weight, dim, native_dtype(dtype), *NUMBERS, stats)
            opcheck(ops.cross_entropy.default, args)
        _, M, L, *_ = ops.cross_entropy(*args)
        args = (x, target, weight, g, q, M, L, dim, M.dtype, *NUMBERS)
        opcheck(ops.cross_entropy_vjp.default, args)
        opcheck(ops.cross_entropy_vjp_.default, args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft", [False, True])
def test_classes_that_come_in_runs_have_one_maximum_and_one_sum(soft: bool, dtype: torch.dtype):
    """70 classes in the middle are three runs; what is extreme lies in one of them or in all."""
    x, target, weight, g, q = inputs((2, 70, 131), 1, dtype=dtype, soft=soft)
    x[:, :32, 0] = x[:, 32:64, 1] = x[:, 64:, 2] = x[:, :, 3] = -torch.inf
    x[:, 40, 4], x[:, 69, 5], x[:, 40, 6] = 60.0, torch.inf, torch.nan
    if not soft:
        target[:, 7] = -100
    o = Options.of(1, torch.float64, *NUMBERS, stats=True)
    exact = Problem(x.double(), target.double() if soft else target, weight.double(), o)
    loss, M, L, prediction, entropy = eager.cross_entropy(exact)
    want = eager.cross_entropy_vjp(exact, Rows(g.double(), q.double(), M, L))
    args = x, target, weight
    found = ops.cross_entropy(*args, 1, native_dtype(dtype), *NUMBERS, True)
    close = partial(torch.testing.assert_close, equal_nan=True, rtol=1e-5, atol=1e-5)
    close(found[0].double(), loss)
    close((found[1] + found[2]).double(), M + L)
    assert torch.equal(found[3], prediction)
    close(found[4].double(), entropy)
    dx = ops.cross_entropy_vjp(*args, g, q, *found[1:3], 1, native_dtype(dtype), *NUMBERS)
    rounding = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    close(dx.double(), want, **rounding)
    for log in (False, True):
        y = ops.softmax(x, 1, log).double()
        oracle = F.log_softmax if log else F.softmax
        close(y, oracle(x.double(), 1), **({"rtol": 1e-2} if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("soft", [False, True])
def test_opcheck_of_the_hessian_product(soft: bool):
    z, target, weight, g, q = inputs((6, 40), 1, dtype=torch.float32, soft=soft)
    flat = (1, torch.float32, -100, [0.1, 0.2, 1.0, 0.0])
    _, M, L, *_ = ops.cross_entropy(z, target, weight, *flat, False)
    args = (z, target, weight, torch.randn(6, 40), g, q, M, L, *flat)
    opcheck(ops.cross_entropy_hvp_.default, args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (9, 40), (3, 3000)])
def test_the_hessian_product_is_the_derivative_of_the_gradient(shape, soft, dtype):
    """Beside autograd through the float64 formulas of a row."""
    z, target, weight, g, q = inputs(shape, 1, dtype=dtype, soft=soft)
    u = torch.randn(shape).to(dtype)
    flat = (1, native_dtype(dtype), -100, [0.1, 0.2, 1.0, 0.0])
    _, M, L, *_ = ops.cross_entropy(z, target, weight, *flat, False)
    exact = [t.double().clone().requires_grad_() for t in (z, g, q)]
    o = Options(1, torch.float64, label_smoothing=0.1, z_loss=0.2)
    r = Row.of(exact[0], target.double() if soft else target, weight.double(), o)
    dz = r.gradient(r.upstream(*exact[1:]))
    wants = torch.autograd.grad(dz, exact, u.double())
    place, change = z.clone(), u.clone()
    d_g, d_q = ops.cross_entropy_hvp_(place, target, weight, change, g, q, M, L, *flat)
    # results of several terms, each with the rounding of M, L or of a logit
    half = dtype == torch.bfloat16
    tolerance = {"rtol": 1.6e-2, "atol": 1e-2} if half else {"rtol": 1e-5, "atol": 1e-5}
    for got, want in zip((place, change, d_g, d_q), (dz, *wants), strict=True):
        torch.testing.assert_close(got.double(), want.detach().double(), **tolerance)


@pytest.mark.parametrize(
    ("rows", "classes", "features"),
    [(1, 1, 1), (3, 5, 7), (7, 37, 65), (9, 4, 48), (31, 64, 33), (64, 32, 32), (130, 100, 130)],
)
def test_products_of_bfloat16_are_added_up_in_float32(rows: int, classes: int, features: int):
    """By matrix units where the processor has them, and by vectors."""
    if not cpu.library.has_bf16_products:
        pytest.skip("this processor multiplies no bfloat16")
    dz, x = torch.randn(rows, classes).bfloat16(), torch.randn(rows, features).bfloat16()
    total = torch.randn(classes, features)
    want = total.double() + dz.double().T @ x.double()
    by_vectors = total.clone()
    assert products._add_product_of_bf16_(total, dz, x)
    cpu.library.add_product_by_vectors(by_vectors, dz, x)
    for sums in (total, by_vectors):
        torch.testing.assert_close(sums.double(), want, rtol=1e-5, atol=1e-5)


def test_products_of_bfloat16_are_the_same_for_any_number_of_threads():
    dz, x = torch.randn(70, 300).bfloat16(), torch.randn(70, 40).bfloat16()
    found = []
    for n in (1, 2):
        torch.set_num_threads(n)
        try:
            total = torch.zeros(300, 40)
            products.add_product_(total, dz, x)
        finally:
            torch.set_num_threads(1)
        found.append(total)
    assert torch.equal(*found)


def test_every_operator_is_checked():
    registered = {str(s.name) for s in torch._C._jit_get_all_schemas() if "custom_ops::" in s.name}
    assert registered == {
        f"custom_ops::{name}"
        for name in (
            "checked_labels",  # by the tests of the eager kernels
            "contract",
            "cross_entropy",
            "cross_entropy_hvp_",
            "cross_entropy_vjp",
            "cross_entropy_vjp_",
            "linear_cross_entropy",  # by last_layer/test_last_layer_transforms.py
            "linear_cross_entropy_vjp",
            "log_softmax_jvp",
            "log_softmax_vjp",
            "softmax",
            "total",
        )
    }


LABELS = torch.tensor([3, 0, 2, 8, 8, 1])
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss and cap": {"z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5},
    "weights": {"weight": torch.rand(9) + 0.5, "label_smoothing": 0.2},
    "normalizer": {"normalizer": 3.5},
    "ignore a class": {"ignore_index": 8},
    "wide": {"dtype": torch.float32},
}


def through_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cross_entropy", "softmax"):
        monkeypatch.setattr(sys.modules[f"custom_ops.{module}"], "node", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", ["labels", "labels of int32", "probabilities"])
def test_the_node_and_the_function_give_the_same_bits(
    monkeypatch, kind: str, options: dict, reduction: str, dtype: torch.dtype
):
    """And the second derivatives too, which the node leaves to the Function's formulas."""
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    if dtype == torch.float64:
        options.pop("dtype", None)
    if reduction != "mean":
        options.pop("normalizer", None)
    target = LABELS.int() if kind == "labels of int32" else LABELS
    if kind == "probabilities":
        options.pop("ignore_index", None)
        target = torch.rand(6, 9, dtype=dtype)
    x, u = torch.randn(6, 9, dtype=dtype), torch.randn(6, 9, dtype=dtype)

    def run() -> tuple[list[Tensor], str]:
        leaf = x.clone().requires_grad_()
        loss = cross_entropy(leaf, target, reduction=reduction, **options)
        g = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        (once,) = torch.autograd.grad(loss, leaf, g, retain_graph=True)
        (again,) = torch.autograd.grad(loss, leaf, g, create_graph=True)
        (second,) = torch.autograd.grad(again, leaf, u)
        return [loss, once, again, second], loss.grad_fn.name()

    by_node, name = run()
    assert "custom_ops::CrossEntropy" in name
    through_the_function(monkeypatch)
    by_function, name = run()
    assert "custom_ops::CrossEntropy" not in name
    for a, b in zip(by_node, by_function, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("of", ["loss", "lse", "entropy", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_node_gives_the_same_statistics_and_their_derivatives(
    monkeypatch, reduction, kind, dtype, of
):
    target = LABELS if kind == "labels" else torch.rand(6, 9, dtype=dtype)
    x, u = torch.randn(6, 9, dtype=dtype), torch.randn(6, 9, dtype=dtype)
    ignore = {"ignore_index": 8} if kind == "labels" else {}

    def run() -> tuple[list[Tensor], str]:
        leaf = x.clone().requires_grad_()
        loss, stats = cross_entropy(
            leaf, target, reduction=reduction, z_loss=0.1, return_stats=True, **ignore
        )
        parts = {"loss": loss.sum(), "lse": stats.lse.sum(), "entropy": stats.entropy.sum()}
        total = sum(parts.values()) if of == "all" else parts[of]
        (once,) = torch.autograd.grad(total, leaf, retain_graph=True)
        (again,) = torch.autograd.grad(total, leaf, create_graph=True)
        (second,) = torch.autograd.grad(again, leaf, u)
        assert not stats.prediction.requires_grad
        return [loss, *stats, once, again, second], loss.grad_fn.name()

    by_node, name = run()
    assert "custom_ops::CrossEntropy" in name
    through_the_function(monkeypatch)
    by_function, name = run()
    assert "custom_ops::CrossEntropy" not in name
    for a, b in zip(by_node, by_function, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


X, T = torch.randn(3, 5), torch.tensor([0, 4, 1])
ARGUMENTS = {  # in the node's order
    "input": X,
    "target": T,
    "weight": None,
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "softcap": None,
    "logit_scale": 1.0,
    "normalizer": None,
    "dtype": None,
    "inplace_backward": False,
    "return_stats": False,
}
LEFT_TO_PYTHON = [
    *(("input", x) for x in (None, X.tolist(), X.long(), torch.randn(()), torch.randn(0, 5))),
    *(("target", t) for t in (None, T[:2], T.to(torch.uint16), T.float(), X.double(), X.long())),
    *(("weight", w) for w in (1.0, torch.rand(4), torch.rand(5, 1), torch.rand(5).double())),
    *(("ignore_index", i) for i in (None, -100.0, True, 2**70)),
    *(("reduction", r) for r in (None, "average", "Mean", b"mean")),
    *(("label_smoothing", e) for e in (None, "0", True, -0.1, 1.1, torch.nan, torch.tensor(0.1))),
    *(("z_loss", z) for z in (None, -1e-9, torch.inf, torch.nan, 10**309)),
    *(("softcap", s) for s in (0.0, -1.0, torch.inf, torch.nan, False)),
    *(("logit_scale", a) for a in (None, torch.inf, torch.nan, 10**309, torch.tensor(1.0))),
    *(("normalizer", n) for n in (0, -1.0, torch.inf, torch.tensor(3.0))),
    *(("dtype", d) for d in (torch.int64, torch.complex64, "float32", float)),
    *((name, b) for name in ("inplace_backward", "return_stats") for b in (None, 1, "yes")),
]


@pytest.mark.parametrize(("name", "value"), LEFT_TO_PYTHON)
def test_the_node_leaves_what_is_wrong_or_rare_to_python(name, value):
    assert cpu.library.cross_entropy(*ARGUMENTS.values()) is not None
    assert cpu.library.cross_entropy(*(ARGUMENTS | {name: value}).values()) is None


def test_the_node_leaves_what_does_not_go_together_to_python():
    leaf = X.clone().requires_grad_()
    for together in (
        {"reduction": "sum", "normalizer": 2.0},
        {"input": leaf, "inplace_backward": True},
        {"input": leaf * 1, "target": torch.rand(3, 5), "ignore_index": 1},
        {"target": torch.rand(3, 5).requires_grad_()},
        {"weight": torch.rand(5).requires_grad_()},
    ):
        assert cpu.library.cross_entropy(*(ARGUMENTS | together).values()) is None
    with torch.autocast("cpu"):  # the logits count as float32, and these are yet to be widened
        half = {"input": X.bfloat16(), "target": torch.rand(3, 5).bfloat16()}
        assert cpu.library.cross_entropy(*(ARGUMENTS | half).values()) is None
        half = {"input": X.bfloat16(), "weight": torch.rand(5).bfloat16()}
        assert cpu.library.cross_entropy(*(ARGUMENTS | half).values()) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [None, torch.rand(5) + 0.5])
def test_the_node_sees_autocast_as_the_function_does(monkeypatch, dtype, weight):
    leaf = X.to(dtype).requires_grad_()
    weight = weight if weight is None or dtype != torch.float64 else weight.double()

    def run() -> tuple[Tensor, Tensor, str]:
        with torch.autocast("cpu"):
            loss = cross_entropy(leaf, T, weight, label_smoothing=0.1)
        return loss, *torch.autograd.grad(loss, leaf), loss.grad_fn.name()

    *by_node, name = run()
    assert "custom_ops::CrossEntropy" in name
    through_the_function(monkeypatch)
    *by_function, name = run()
    assert "custom_ops::CrossEntropy" not in name
    for a, b in zip(by_node, by_function, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", [softmax, log_softmax])
def test_the_softmax_nodes_give_the_same_bits(monkeypatch, op):
    x, v, u = (torch.randn(4, 9) for _ in range(3))

    def run() -> tuple[list[Tensor], str]:
        leaf = x.clone().requires_grad_()
        y = op(leaf, 1)
        (once,) = torch.autograd.grad(y, leaf, v, retain_graph=True)
        (again,) = torch.autograd.grad(y, leaf, v, create_graph=True)
        (second,) = torch.autograd.grad(again, leaf, u)
        return [y, once, second], y.grad_fn.name()

    by_node, name = run()
    assert "custom_ops::Softmax" in name
    through_the_function(monkeypatch)
    by_function, name = run()
    assert "custom_ops::Softmax" not in name
    for a, b in zip(by_node, by_function, strict=True):
        assert torch.equal(a, b)


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators():
    x = torch.randn(4, 50, requires_grad=True)
    with Watching() as mode:
        cross_entropy(x, torch.tensor([0, 1, 2, 3])).backward()
        softmax(x, 1)
    assert "custom_ops.cross_entropy.default" in mode.seen
    assert "custom_ops.cross_entropy_vjp.default" in mode.seen
    assert "custom_ops.softmax.default" in mode.seen


def test_a_function_mode_and_a_subclass_are_not_passed_by():
    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    with Counting() as mode:
        softmax(torch.randn(3, 4, requires_grad=True), 1)
    assert mode.calls > 0
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    pair = softmax(TwoTensor(a, b), 1)
    assert isinstance(pair, TwoTensor)
    torch.testing.assert_close(pair.a, F.softmax(a, 1))
    torch.testing.assert_close(pair.b, F.softmax(b, 1))


def test_forward_mode_is_not_passed_by():
    x, v = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    with forward_ad.dual_level():
        y = softmax(forward_ad.make_dual(x, v), 1)
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, custom_ops.contract(y.detach(), v))


@pytest.mark.parametrize("shape", [(70_000, 5), (600, 300), (3, 200_000), (2, 21, 64, 65)])
def test_the_bits_do_not_depend_on_the_number_of_threads(shape: tuple[int, ...]):
    x = torch.randn(shape, requires_grad=True)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    weight, v = torch.rand(shape[1]), torch.randn(shape)

    def run() -> list[Tensor]:
        results = []
        for options in ({}, {"weight": weight, "label_smoothing": 0.1, "z_loss": 0.01}):
            loss = cross_entropy(x, target, **options)
            results += [loss, *torch.autograd.grad(loss, x)]
        for op in (softmax, log_softmax):
            y = op(x, 1)
            results += [y, *torch.autograd.grad(y, x, v)]
        return results

    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            runs.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("shape", [(2, 21, 13, 17), (2, 70, 9, 5), (300, 7), (200, 40)], ids=str)
def test_a_rows_bits_do_not_depend_on_which_of_its_neighbours_are_ignored(shape, options, dtype):
    """Where none is, a block of rows takes a shorter way."""
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    ignored = torch.rand(target.shape) < 0.3
    found = []
    for labels in (target, target.masked_fill(ignored, -100)):
        loss = cross_entropy(x, labels, reduction="none", **options)
        (d,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        found.append((loss.detach(), d.movedim(1, -1)))
    for whole, some in zip(*found, strict=True):
        assert torch.equal(whole[~ignored], some[~ignored])
        assert (some[ignored] == 0).all()


PIXEL_OPTIONS = {
    "plain": {},
    "weights, z-loss": {"weight": True, "z_loss": 0.1},
    "weights, smoothing": {"weight": True, "label_smoothing": 0.1},
    "cap, z-loss": {"softcap": 5.0, "z_loss": 0.1},
    "all": {"weight": True, "z_loss": 0.1, "label_smoothing": 0.1, "softcap": 5.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("options", PIXEL_OPTIONS.values(), ids=PIXEL_OPTIONS)
@pytest.mark.parametrize("classes", [2, 21, 40])
def test_a_pixels_bits_do_not_depend_on_its_place(classes, options, soft, dtype):
    x = torch.randn(1, classes, 150, dtype=dtype, requires_grad=True)
    target = torch.randint(classes, (1, 150))
    if soft:
        target = torch.softmax(torch.randn(1, classes, 150, dtype=dtype), 1)
    if "weight" in options:
        options = options | {"weight": torch.rand(classes, dtype=dtype) + 0.5}

    def run(x: Tensor, target: Tensor) -> list[Tensor]:
        loss = cross_entropy(x, target, reduction="none", **options)
        p = softmax(x, 1)
        grads = [torch.autograd.grad(r, x, torch.ones_like(r))[0] for r in (loss, p)]
        return [loss[:, None], p, *grads]

    whole = run(x, target)
    for first in (0, 1, 15, 120, 127, 148):
        at = slice(first, first + 2)
        pixels = x.detach()[:, :, at].contiguous().requires_grad_()
        few = run(pixels, target[..., at].contiguous())
        assert all(torch.equal(w[:, :, at], f) for w, f in zip(whole, few, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("numbers", [(0.0, 0.0, 1.0, 0.0), NUMBERS[1]], ids=str)
@pytest.mark.parametrize("shape", [(2, 21, 13, 17), (2, 70, 9, 5)], ids=str)
def test_the_gradient_of_pixels_has_the_same_bits_in_place(shape, numbers, soft, dtype):
    x, target, weight, g, q = inputs(shape, 1, dtype=dtype, soft=soft)
    acc = native_dtype(dtype)
    flat = (1, acc, -100, list(numbers))
    _, M, L, *_ = ops.cross_entropy(x, target, weight, *flat, False)
    want = ops.cross_entropy_vjp(x, target, weight, g, q, M, L, *flat)
    ops.cross_entropy_vjp_(x, target, weight, g, q, M, L, *flat)
    assert torch.equal(x, want)


@pytest.mark.parametrize("spread", [1.0, 10.0])
@pytest.mark.parametrize("offset", [0.0, 4096.0])
@pytest.mark.parametrize("shape", [(512, 10), (1024, 1000), (32, 32_000), (2, 1_000_000)])
def test_as_exact_as_torch(shape: tuple[int, int], offset: float, spread: float):
    """The root mean square error is torch's at most, but for chance, or that of one rounding."""
    x = (torch.randn(shape) * spread + offset).requires_grad_()
    target, v = torch.randint(shape[1], shape[:1]), torch.randn(shape)
    wide = x.detach().double().requires_grad_()

    def all_results(x: Tensor, v: Tensor, ce, sm, lsm) -> list[Tensor]:
        loss = ce(x, target, reduction="none")
        p, y = sm(x, 1), lsm(x, 1)
        gradients = (torch.autograd.grad(r, x, g)[0] for r, g in ((p, v), (y, v)))
        return [loss, *torch.autograd.grad(loss.sum(), x), p, y, *gradients]

    exact = all_results(wide, v.double(), F.cross_entropy, F.softmax, F.log_softmax)
    torchs = all_results(x, v, F.cross_entropy, F.softmax, F.log_softmax)
    ours = all_results(x, v, cross_entropy, softmax, log_softmax)
    for e, t, o in zip(exact, torchs, ours, strict=True):
        rounding = torch.finfo(torch.float32).eps * e.square().mean().sqrt()
        bound = torch.maximum(1.1 * (t - e).square().mean().sqrt(), rounding)
        assert (o - e).square().mean().sqrt() <= bound


def test_the_gradient_of_softmax_sums_to_nothing_over_many_classes():
    x, v = torch.randn(2, 200_000, requires_grad=True), torch.randn(2, 200_000)

    def off(op) -> float:
        (gradient,) = torch.autograd.grad(op(x, 1), x, v)
        return gradient.double().sum(1).abs().max().item()

    assert off(softmax) <= max(off(F.softmax), 1e-9)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_vector_set_of_an_older_processor(capability: str):
    """torch's own switch plays the older processor; the other tests of the kernels run there."""
    if missing := built.find(built.read(), torch.__version__, capability.upper()).missing:
        pytest.skip(missing)
    report = [sys.executable, "-c", "import custom_ops; print(custom_ops.backend())"]
    files = ["tests/kernels/test_native.py", "tests/test_inplace.py"]
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    tests += ["-k", "not older_processor and not opcheck"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    for command, says in (
        (report, f"C++ ({capability.upper()}) on the CPU"),
        (tests, " passed"),
    ):
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert says in result.stdout


def test_without_the_library_the_report_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "library", None)
    monkeypatch.setattr(cpu, "missing", "they were not built")
    assert custom_ops.backend() == (
        "eager: plain ATen operators, on every device; no C++ kernels: they were not built"
    )
    assert softmax(torch.zeros(2, requires_grad=True), 0).tolist() == [0.5, 0.5]


def test_lse_has_its_gradient_where_the_mean_divides_by_nothing():
    """Weights of 0 make the mean 0/0; nothing of the loss may reach the gradient of lse."""
    x, zero = torch.randn(2, 3, requires_grad=True), torch.tensor([0.0, 1.0, 1.0])
    _, stats = cross_entropy(x, torch.tensor([0, 0]), zero, return_stats=True)
    assert "custom_ops::CrossEntropy" in stats.lse.grad_fn.name()
    torch.testing.assert_close(torch.autograd.grad(stats.lse.sum(), x)[0], x.detach().softmax(1))
