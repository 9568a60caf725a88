"""The order of the last layer, beside what an H200 took; and classes outermost, by numbers."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from custom_ops.kernels import Options, Rows
from custom_ops.last_layer import by_classes
from custom_ops.last_layer.by_classes import Memory, Slabs
from custom_ops.last_layer.layer import Blocks, Layer
from custom_ops.last_layer.plan import Sizes, _floors, default_memory, plan_of

LARGE, LARGER, SMALL = (
    Sizes(8192, 4096, 128_256, 2),
    Sizes(16_384, 2048, 248_320, 2),
    Sizes(8192, 4096, 32_000, 2),
)
MIB = 1 << 20


@pytest.mark.parametrize(
    ("sizes", "one_block", "kept", "again", "rows", "blocks"),
    [
        (LARGE, 1.04, 1.10, 1.46, 1.14, 4),
        (LARGER, 1.14, 1.15, 1.48, 1.36, 16),
        (SMALL, 1.04, 1.10, 1.47, 1.12, 1),
    ],
)
def test_the_estimate_is_within_four_hundredths_of_what_was_measured(
    sizes, one_block, kept, again, rows, blocks
):
    N, D, C, _ = sizes
    slabs = -(-C // 8192) * 8 * N * D
    assert _floors(sizes, 3, 0) == pytest.approx(one_block, abs=0.04)
    assert _floors(sizes, 3, slabs) == pytest.approx(kept, abs=0.04)
    assert _floors(sizes, 4, slabs) == pytest.approx(again, abs=0.04)
    assert _floors(sizes, 3, blocks * 8 * C * D) == pytest.approx(rows, abs=0.04)


@pytest.mark.parametrize("sizes", [LARGE, LARGER, SMALL, Sizes(10**6, 512, 32_000, 2)])
def test_more_memory_is_never_slower_and_never_exceeded(sizes):
    before = float("inf")
    for memory in (2**k for k in range(27, 40)):
        plan = plan_of(sizes, memory)
        fits = plan.bytes <= memory
        assert fits or plan.bytes == min(plan_of(sizes, 0).bytes, plan.bytes)
        if fits:
            assert plan.floors <= before
            before = plan.floors
    assert plan.order == "one block"


def test_the_products_are_those_of_the_formula():
    for sizes, memory in itertools.product((LARGE, LARGER), (600 * MIB, 1024 * MIB, 1800 * MIB)):
        N, D, C, e = sizes
        plan = plan_of(sizes, memory)
        assert plan.order == "classes"
        extra = max(0, plan.kept - D) * C * e
        want = 3 + max(0, 1 - min(1, D / N) - extra / (N * C * e))
        assert plan.products == pytest.approx(want)


def test_what_is_planned_for_the_head_of_a_large_model():
    default = plan_of(LARGE, default_memory(LARGE))
    assert default_memory(LARGE) == LARGE.gradient_bytes
    assert (default.order, default.products < 3.1) == ("classes", True)
    assert plan_of(LARGE, 320 * MIB).floors <= 1.5
    assert plan_of(LARGE, 1 << 40).order == "one block"
    # with very many rows, dW in float32 costs less than logits that are computed again
    assert plan_of(Sizes(2**20, 512, 32_000, 2), 1 << 30).order == "rows"


# Classes outermost.

N, D, C = 23, 7, 41


class Counting(TorchDispatchMode):
    """Multiplications of the products made inside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm"):
            A, B = args[-2:]
            self.count += A.shape[0] * A.shape[1] * B.shape[1]
        return func(*args, **(kwargs or {}))


def layer_of(options: dict, bias: bool, weighted: bool, dtype: torch.dtype) -> Layer:
    x, W = torch.randn(N, D, dtype=dtype), torch.randn(C, D, dtype=dtype)
    target = torch.randint(C, (N,))
    target[::5] = -100
    b = torch.randn(C, dtype=dtype) if bias else None
    weight = torch.rand(C, dtype=torch.float64) + 0.5 if weighted else None
    o = Options(dim=1, dtype=torch.float64 if dtype == torch.float64 else torch.float32, **options)
    weight = None if weight is None else weight.to(o.dtype)
    return Layer(x, W, b, target, weight, o, Blocks())


def memory_of(layer: Layer, more: int) -> Memory:
    return Memory(torch.empty_like(layer.W), layer.x.new_empty(more, C))


def in_one_piece(layer: Layer, g: Tensor, q: Tensor | None) -> tuple[Tensor, ...]:
    """ℓ, lse and the gradients, by autograd through float64 formulas."""
    tensors = [t.double().requires_grad_() for t in layer.tensors[:3] if t is not None]
    x, W, *b = tensors
    o, z = layer.options, x @ W.T + (b[0] if b else 0)
    z = o.logit_scale * z
    if o.softcap is not None:
        z = o.softcap * torch.tanh(z / o.softcap)
    lse = z.logsumexp(1)
    counts = layer.target != -100
    t = layer.target.masked_fill(~counts, 0)
    w = 1.0 if layer.weight is None else layer.weight.double()[t]
    loss = w * (lse - z.gather(1, t[:, None])[:, 0]) + o.z_loss * lse**2
    loss, lse = torch.where(counts, loss, 0.0), torch.where(counts, lse, 0.0)
    total = (loss * g.double()).sum() + (0.0 if q is None else (lse * q.double()).sum())
    return loss.detach(), lse.detach(), *torch.autograd.grad(total, tensors)


OPTIONS = ({}, {"z_loss": 0.1}, {"softcap": 3.0, "logit_scale": 0.7, "z_loss": 0.1})


@pytest.mark.parametrize("size", [1, 10, 41, 100])
@pytest.mark.parametrize("more", [0, 5, N])
def test_classes_outermost_find_loss_and_gradients(more, size):
    for options, bias, with_q in itertools.product(OPTIONS, (False, True), (False, True)):
        layer = layer_of(options, bias, not bias, torch.float64)
        slabs = Slabs(layer, size, memory_of(layer, more))
        g = torch.randn(N, dtype=torch.float64)
        q = torch.randn(N, dtype=torch.float64) if with_q else None
        found = by_classes.forward(slabs)
        dx, dW, db = by_classes.backward(slabs, Rows(g, q, found.M, found.L))
        loss, lse, *gradients = in_one_piece(layer, g, q)
        torch.testing.assert_close(found.loss, loss)
        torch.testing.assert_close(found.M + found.L, lse)
        torch.testing.assert_close([dx, dW] + ([db] if bias else []), gradients)
        assert dW.data_ptr() == slabs.memory.dW.data_ptr()


@pytest.mark.parametrize("more", [0, 5, N])
def test_only_what_is_not_kept_is_computed_again(more):
    layer = layer_of({}, False, False, torch.float64)
    slabs = Slabs(layer, 10, memory_of(layer, more))
    with Counting() as counting:
        found = by_classes.forward(slabs)
        by_classes.backward(slabs, Rows(found.L, None, found.M, found.L))
    products = counting.count / (N * D * C)
    assert products == pytest.approx(3 + max(0, 1 - min(1, D / N) - more / N))


def test_dw_is_rounded_once_whatever_the_slab():
    layer = layer_of({}, False, False, torch.bfloat16)
    found = []
    for size in (3, C):
        slabs = Slabs(layer, size, memory_of(layer, N))
        rows = by_classes.forward(slabs)
        found.append(by_classes.backward(slabs, Rows(torch.ones(N), None, rows.M, rows.L)))
    torch.testing.assert_close(found[0].W, found[1].W)
    torch.testing.assert_close(found[0].x, found[1].x, rtol=1e-2, atol=1e-2)


def test_a_bad_label_makes_its_row_nan():
    layer = layer_of({}, False, True, torch.float64)
    layer.target[3] = C
    found = by_classes.forward(Slabs(layer, 10, memory_of(layer, 0)))
    assert found.loss.isnan().nonzero().flatten().tolist() == [3]


def test_classes_at_minus_infinity_in_a_whole_slab_add_nothing():
    layer = layer_of({}, True, False, torch.float64)
    layer.b[:10] = -torch.inf
    layer.target[layer.target < 10] = 20
    found = by_classes.forward(Slabs(layer, 10, memory_of(layer, 0)))
    loss, lse, *_ = in_one_piece(layer, torch.ones(N), None)
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.M + found.L, lse)
