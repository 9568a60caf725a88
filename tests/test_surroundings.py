"""torch's own samples of the four ops under everything that can surround a call.

The right value is torch's own answer: loss and gradients of the built-in, in float64. A surrounding
is a way to get a value and its gradients from a function of some leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import custom_ops

pytestmark = pytest.mark.usefixtures("backend")

OPS = {
    "softmax": (custom_ops.softmax, F.softmax),
    "log_softmax": (custom_ops.log_softmax, F.log_softmax),
    "nn.functional.cross_entropy": (custom_ops.cross_entropy, F.cross_entropy),
    "nn.functional.linear_cross_entropy": (
        custom_ops.linear_cross_entropy,
        F.linear_cross_entropy,
    ),
}
#: Every so many of the last layer's 119 samples; the others in the exhaustive run.
STRIDE = 7


class Sample(NamedTuple):
    """Both functions of the tensors that can be differentiated, and these."""

    ours: Callable[..., Tensor]
    builtin: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]

    def fresh(self) -> tuple[Tensor, ...]:
        return tuple(t.detach().clone().requires_grad_() for t in self.leaves)

    def expected(self) -> tuple[Tensor, ...]:
        return plain(self.builtin, self.fresh())


def samples(name: str, *, every: int = 1) -> Iterator[Sample]:
    found = [i for i in op_db if i.name == name and i.variant_test_name == ""]
    if not found:
        pytest.skip(f"this torch has no samples of {name}")
    (info,) = found
    for i, s in enumerate(info.sample_inputs("cpu", torch.double, requires_grad=True)):
        if i % every == 0:
            yield from sample(name, (s.input, *s.args), s.kwargs)


def sample(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Sample]:
    names = [*range(len(args)), *kwargs]
    values = [*args, *kwargs.values()]
    at = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad]

    def call(function: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        given = list(values)
        for i, leaf in zip(at, leaves, strict=True):
            given[i] = leaf
        n = len(args)
        return function(*given[:n], **dict(zip(names[n:], given[n:], strict=True)))

    ours, builtin = (partial(call, function) for function in OPS[name])
    yield Sample(ours, builtin, tuple(values[i] for i in at))


def weights_of(result: Tensor) -> Tensor:
    return torch.arange(1.0, result.numel() + 1, dtype=result.dtype).cos().reshape(result.shape)


def gradients(result: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((result * weights_of(result)).sum(), leaves)


def plain(function: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    result = function(*leaves)
    return result, *gradients(result, leaves)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def under(mode: Callable[[], Any]) -> Callable[..., tuple[Tensor, ...]]:
    def run(function: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with mode():
            return plain(function, leaves)

    return run


def recomputed(
    forward: Callable[[], Any], backward: Callable[[], Any], **how: Any
) -> Callable[..., tuple[Tensor, ...]]:
    """A checkpoint, whose recomputation has other surroundings than its forward."""

    def run(function: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with forward():
            result = checkpoint(lambda *a: function(*(t * 1 for t in a)), *leaves, **how)
        with backward():
            (result * weights_of(result)).sum().backward()
        return result, *(t.grad for t in leaves)

    return run


def traced(tracer: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """A graph made without gradients, run again with them."""

    def run(function: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            graph = tracer(function, *leaves)
        return plain(graph, leaves)

    return run


def traced_whole(function: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward and backward in one graph."""
    return make_fx(lambda *a: plain(function, a))(*leaves)(*leaves)


def compiled_autograd(
    function: Callable[..., Tensor], leaves: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    torch.compiler.reset()
    result = function(*leaves)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        (result * weights_of(result)).sum().backward()
    return result, *(t.grad for t in leaves)


save_all = partial(
    create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.MUST_SAVE
)
SURROUNDINGS = {
    "a dispatch mode": under(Watching),
    "a function mode": under(BaseTorchFunctionMode),
    "a flop counter": under(lambda: FlopCounterMode(display=False)),
    "saved tensors on the CPU": under(torch.autograd.graph.save_on_cpu),
    "anomaly mode": under(torch.autograd.detect_anomaly),
    "autocast": under(lambda: torch.autocast("cpu", torch.bfloat16)),  # float64 is left alone
    "checkpoint": recomputed(nullcontext, nullcontext, use_reentrant=False),
    "reentrant checkpoint": recomputed(nullcontext, nullcontext, use_reentrant=True),
    "checkpoint, forward in a function mode": recomputed(
        BaseTorchFunctionMode, nullcontext, use_reentrant=False
    ),
    "checkpoint, backward in a function mode": recomputed(
        nullcontext, BaseTorchFunctionMode, use_reentrant=False
    ),
    "checkpoint, forward in a dispatch mode": recomputed(
        Watching, nullcontext, use_reentrant=False
    ),
    "checkpoint, backward in a dispatch mode": recomputed(
        nullcontext, Watching, use_reentrant=False
    ),
    "a checkpoint that saves everything": recomputed(
        nullcontext, nullcontext, use_reentrant=False, context_fn=save_all
    ),
    "make_fx, run again": traced(lambda f, *a: make_fx(f)(*a)),
    "make_fx with fake tensors, run again": traced(
        lambda f, *a: make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(*a)
    ),
    "jit.trace, run again": traced(
        lambda f, *a: torch.jit.trace(lambda *b: f(*b), a, check_trace=False)
    ),
    "make_fx of forward and backward": traced_whole,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("name", OPS)
def test_torchs_samples_agree(name: str, surrounding: str):
    run = SURROUNDINGS[surrounding]
    for s in samples(name, every=STRIDE if "linear" in name else 1):
        assert_close(run(s.ours, s.fresh()), s.expected(), equal_nan=True)


LABELS = torch.tensor([0, 4, 1, 2])


def with_statistics(found: tuple[Tensor, custom_ops.CrossEntropyStats]) -> Tensor:
    loss, stats = found
    return loss + (stats.lse * stats.entropy).sum()


def statistics_of(z: Tensor) -> Tensor:
    entropy = torch.special.entr(z.softmax(1)).sum(1)
    return F.cross_entropy(z, LABELS) + (z.logsumexp(1) * entropy).sum()


STATISTICS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...]]] = {
    "cross_entropy": (
        lambda z: with_statistics(custom_ops.cross_entropy(z, LABELS, return_stats=True)),
        statistics_of,
        (5,),
    ),
    "labels of int32": (
        lambda z: with_statistics(custom_ops.cross_entropy(z, LABELS.int(), return_stats=True)),
        statistics_of,
        (5,),
    ),
    "linear_cross_entropy": (
        lambda x, W: with_statistics(
            custom_ops.linear_cross_entropy(x, W, LABELS, return_stats=True, block_rows=3)
        ),
        lambda x, W: statistics_of(x @ W.t()),
        (3, 3),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("surrounding", [*SURROUNDINGS, "compiled autograd"])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_agree(name: str, surrounding: str):
    ours, builtin, columns = STATISTICS[name]
    run = SURROUNDINGS.get(surrounding, compiled_autograd)
    rows = (4, 5) if len(columns) > 1 else (4,)
    leaves = tuple(
        torch.randn(n, c, dtype=torch.double) for n, c in zip(rows, columns, strict=True)
    )
    fresh = [tuple(t.clone().requires_grad_() for t in leaves) for _ in range(2)]
    assert_close(run(ours, fresh[0]), plain(builtin, fresh[1]))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_all_of_torchs_samples_of_the_last_layer_agree(surrounding: str):
    for s in samples("nn.functional.linear_cross_entropy"):
        got = SURROUNDINGS[surrounding](s.ours, s.fresh())
        assert_close(got, s.expected(), equal_nan=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPS)
def test_compiled_autograd_agrees(name: str):
    for s in samples(name, every=60 if "linear" in name else 7):
        assert_close(compiled_autograd(s.ours, s.fresh()), s.expected(), equal_nan=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPS)
def test_linearize_agrees(name: str):
    for s in samples(name, every=20 if "linear" in name else 3):
        tangents = tuple(t.detach().cos() for t in s.leaves)
        inputs = tuple(t.detach() for t in s.leaves)
        (a, push_a), (b, push_b) = (torch.func.linearize(f, *inputs) for f in (s.ours, s.builtin))
        assert_close((a, push_a(*tangents)), (b, push_b(*tangents)), equal_nan=True)


def twice(t: Tensor) -> TwoTensor:
    return TwoTensor(t.detach(), 2 * t.detach()).requires_grad_()


def halves(t: Tensor) -> tuple[Tensor, Tensor]:
    return (t.a, t.b) if isinstance(t, TwoTensor) else (t, t)


@pytest.mark.parametrize("name", OPS)
def test_a_subclass_in_any_place_agrees(name: str):
    """The halves of the answer are the answers for the halves."""
    for s in samples(name, every=STRIDE if "linear" in name else 1):
        for i in range(len(s.leaves)):
            leaves = s.fresh()
            leaves = (*leaves[:i], twice(leaves[i]), *leaves[i + 1 :])
            got = plain(s.ours, leaves)
            assert isinstance(got[0], TwoTensor)
            for half in (0, 1):
                alone = tuple(halves(t)[half].detach().requires_grad_() for t in leaves)
                want = plain(s.builtin, alone)
                assert_close(halves(got[0])[half], want[0], equal_nan=True)
                assert_close(halves(got[1 + i])[half], want[1 + i], equal_nan=True)


@pytest.mark.parametrize("of", ["target", "weight"])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_a_subclass_that_is_not_differentiated_agrees(op: str, of: str):
    x, W = torch.randn(4, 3).double(), torch.randn(5, 3).double()
    target, weight = torch.tensor([1, -100, 4, 0]), torch.rand(5).double()
    lead = (x @ W.T,) if op == "cross_entropy" else (x, W)
    wrapped = {"target": target, "weight": weight}
    other = {"target": target.roll(1), "weight": 3 * weight}[of]
    wrapped[of] = TwoTensor(wrapped[of], other)
    got = getattr(custom_ops, op)(*lead, wrapped["target"], weight=wrapped["weight"])
    for half in (0, 1):
        t, w = (halves(wrapped[key])[half] for key in ("target", "weight"))
        assert_close(halves(got)[half], F.cross_entropy(x @ W.T, t, w))


def test_a_class_without_arithmetic_of_its_own_is_taken_by_its_linear():
    """As a quantised weight: nothing but F.linear knows what its numbers mean."""

    class Int8(Tensor):
        @staticmethod
        def __new__(cls, q: Tensor, scale: float) -> Int8:
            return Tensor._make_wrapper_subclass(cls, q.shape, dtype=torch.float32)

        def __init__(self, q: Tensor, scale: float) -> None:
            self.q, self.scale = q, scale

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError(f"{func} of an Int8")

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is F.linear:
                x, W, *b = args
                return F.linear(x, W.q.float() * W.scale, *b)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    W = Int8(torch.randint(-9, 9, (5, 3), dtype=torch.int8), 0.1)
    x, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 3, -100, 1])
    got, want = (
        custom_ops.linear_cross_entropy(x, W, target),
        F.cross_entropy(F.linear(x, W), target),
    )
    assert_close((got, *torch.autograd.grad(got, x)), (want, *torch.autograd.grad(want, x)))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_weight_of_the_last_layer_has_torchs_gradient(layout: torch.layout):
    x, target = torch.randn(4, 3), torch.tensor([0, 3, -100, 1])
    W = torch.randn(5, 3).relu().to_sparse(layout=layout)
    results = []
    for f in (
        custom_ops.linear_cross_entropy,
        lambda x, W, t: F.cross_entropy(F.linear(x, W), t),
    ):
        a, S = x.clone().requires_grad_(), W.clone().requires_grad_()
        loss = f(a, S, target)
        loss.backward()
        results.append((loss, a.grad, S.grad.to_dense()))
    assert_close(*results)


def test_a_subclass_keeps_its_class():
    class Named(Tensor):
        pass

    z = torch.randn(3, 4).as_subclass(Named)
    target = torch.tensor([0, 1, 2])
    assert type(custom_ops.softmax(z, 1)) is Named
    assert type(custom_ops.cross_entropy(z, target)) is Named
    assert type(custom_ops.linear_cross_entropy(z, torch.randn(5, 4), target)) is Named


def test_a_flop_counter_counts_the_last_layers_products():
    counts = []
    for f in (
        custom_ops.linear_cross_entropy,
        lambda x, W, t: F.cross_entropy(F.linear(x, W), t),
    ):
        x, W = torch.randn(8, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            f(x, W, torch.zeros(8, dtype=torch.int64)).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 8 * 3 * 5


DUALS = {
    "softmax": lambda x: custom_ops.softmax(x, 1),
    "log_softmax": lambda x: custom_ops.log_softmax(x, 1),
    "contract": lambda x: custom_ops.contract(x, x.sin()),
    "cross_entropy": lambda x: custom_ops.cross_entropy(x, torch.arange(3), label_smoothing=0.1),
    "linear_cross_entropy": lambda x: custom_ops.linear_cross_entropy(
        x, torch.ones(5, 4).cumsum(0).double().sin(), torch.arange(3)
    ),
}


@pytest.mark.parametrize("op", DUALS)
def test_forward_mode_opened_inside_a_compiled_function_has_its_tangent(op: str):
    def tangent(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, v)
            return torch.autograd.forward_ad.unpack_dual(f(dual)).tangent

    torch.compiler.reset()
    x, v = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    got = torch.compile(partial(tangent, DUALS[op]), backend="aot_eager")(x, v)
    assert_close(got, torch.func.jvp(DUALS[op], (x,), (v,))[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_every_road_saves_the_same_tensors(reduction: str, weighted: bool, soft: bool):
    """A checkpoint compares what forward and recomputation saved, by shape and type."""
    x = torch.randn(4, 5, requires_grad=True)
    target = torch.rand(4, 5) if soft else torch.tensor([1, -100, 4, 0])
    weight = torch.rand(5) if weighted else None
    lists = []
    for mode in (nullcontext, BaseTorchFunctionMode, Watching):
        saved: list[tuple[torch.Size, torch.dtype]] = []

        def note(t: Tensor, saved: list = saved) -> Tensor:
            saved.append((t.shape, t.dtype))
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), mode():
            custom_ops.cross_entropy(x, target, weight, reduction=reduction)
            if reduction == "mean":
                custom_ops.cross_entropy(x, target, weight, normalizer=3.0)
            custom_ops.softmax(x, 1), custom_ops.log_softmax(x, 1)
            W = torch.ones(3, 5, requires_grad=True)
            custom_ops.linear_cross_entropy(x, W, torch.tensor([0, 1, -100, 2]))
        lists.append(saved)
    assert lists[0] == lists[1] == lists[2]


@pytest.mark.parametrize("backward_dtype", [torch.bfloat16, None])
def test_a_backward_under_another_autocast_is_exact(backward_dtype: torch.dtype | None):
    """Products of the backward take their tensors as the forward left them."""

    def run(dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        leaves = [torch.randn(4, 3), torch.randn(5, 3), torch.rand(5), torch.rand(4, 5)]
        x, W, weight, y = (t.requires_grad_() for t in leaves)
        loss = custom_ops.linear_cross_entropy(x, W, y, weight=weight)
        rows = custom_ops.linear_cross_entropy(
            x, W, torch.tensor([0, 1, -100, 2]), reduction="none"
        )
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            first = torch.autograd.grad(loss + rows.sum(), leaves, retain_graph=True)
            (d,) = torch.autograd.grad(rows.square().sum(), W, create_graph=True)
            return *first, *torch.autograd.grad(d.square().sum(), (x, W))

    for got, want in zip(run(backward_dtype), run(None), strict=True):
        assert torch.equal(got, want)
