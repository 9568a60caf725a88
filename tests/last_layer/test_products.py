"""The last layer's half-precision products as a GPU takes them: float32 sums, no float32 factor.

There is no such operator on the CPU, and no tensor of another device beside a torch without CUDA.
Meta tensors that pass for CUDA's show which calls are made, with what shapes and types; CPU
tensors, with the operator made of float64 ones, show what comes out.
"""

import pytest
import torch
from conftest import differentiable
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from custom_ops import kernels, linear_cross_entropy
from custom_ops.kernels import Options, Rows
from custom_ops.last_layer import by_classes, hessian, loop, products, whole
from custom_ops.last_layer.layer import Blocks, Layer, Products
from custom_ops.last_layer.plan import Plan, rows_at_a_time

WIDE = torch.ops.aten.addmm.dtype_out
N, D, C, ROWS = 50, 3, 30, 10
OPTIONS = Options(dim=1, dtype=torch.float32)


class Watching(TorchDispatchMode):
    """The calls made inside, and what was converted into another type."""

    def __init__(self) -> None:
        super().__init__()
        self.wide: list[tuple] = []
        self.converted: set[tuple] = set()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.names.add(func._schema.name)
        if func is WIDE:
            total, A, B, dtype = args
            assert kwargs["out"] is total  # else what was there would be copied first
            assert dtype == total.dtype == torch.float32
            assert A.dtype == B.dtype != torch.float32
            assert total.shape == (A.shape[0], B.shape[1])
            self.wide.append((tuple(total.shape), kwargs.get("beta", 1)))
        out = func(*args, **kwargs)
        if func._schema.name == "aten::_to_copy":
            self.converted.add((tuple(out.shape), out.dtype))
        return out


#: What asks for a number, or for as many numbers as are not 0: the host would wait for it.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero"}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def half(request):
    return request.param


@pytest.mark.parametrize(
    ("device", "hip", "capability", "wide"),
    [
        ("cuda", None, (8, 0), True),
        ("cuda", None, (12, 0), True),
        ("cuda", None, (7, 5), False),
        ("cuda", "7.0", (9, 4), False),
        ("cpu", None, None, False),
    ],
)
def test_whose_products_are_wide(half, monkeypatch, device, hip, capability, wide):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with FakeTensorMode():
        assert products.widens(torch.empty(2, 2, dtype=half, device=device)) == wide


@pytest.fixture
def fake(half, monkeypatch):
    """x, W, b and labels on a device that is not there."""
    if torch.__version__.startswith("2.11"):
        pytest.skip("torch 2.11 has no meta kernel of the operator")
    monkeypatch.setattr(products, "widens", lambda _: True)
    with torch.no_grad(), Watching() as watching:
        x, W, b = (torch.empty(s, dtype=half, device="meta") for s in ((N, D), (C, D), (C,)))
        yield watching, x, W, b, torch.empty(N, dtype=torch.int64, device="meta")


FLOAT32_FACTORS = {(shape, torch.float32) for shape in ((C, ROWS), (ROWS, D), (C, D))}


def first_and_more(of_a_block: list[tuple]) -> list[tuple]:
    """The calls of all blocks: the first product of dW does not read what is there."""
    *rows, dW = of_a_block
    return [*rows, (dW[0], 0), *of_a_block * (N // ROWS - 1)]


def test_a_gpu_adds_up_dx_and_dw_in_float32_from_half_precision_factors(fake):
    watching, x, W, b, t = fake
    blocks = Blocks(True, (True, True, True), ROWS, keeps=True)
    found = loop.forward(Layer(x, W, b, t, None, OPTIONS, blocks))
    assert watching.wide == first_and_more([((ROWS, D), 0), ((C, D), 1)])
    assert all(p.dtype == torch.float32 and p.device.type == "meta" for p in found.products)
    assert not watching.converted & FLOAT32_FACTORS


def test_a_backward_of_its_own_does_the_same(fake):
    watching, x, W, b, t = fake
    rows = torch.empty(N, device="meta")
    blocks = Blocks(False, (True, True, False), ROWS)
    loop.backward(Layer(x, W, b, t, None, OPTIONS, blocks), Rows(rows, rows, rows, rows))
    assert watching.wide == first_and_more([((ROWS, D), 0), ((C, D), 1)])
    assert not watching.converted & FLOAT32_FACTORS


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_no_operator_of_the_loop_waits_for_a_gpu(fake, soft, weighted):
    watching, x, W, b, t = fake
    weight = torch.empty(C, device="meta") if weighted else None
    t = torch.empty(N, C, dtype=x.dtype, device="meta") if soft else t
    blocks = Blocks(True, (True, True, True), ROWS, keeps=True)
    layer = Layer(x, W, b, t, weight, OPTIONS, blocks)
    _, M, L, *_ = loop.forward(layer).found
    loop.backward(layer, Rows(M, None, M, L))
    assert not watching.names & WAITING


@pytest.mark.parametrize("order", ["classes", "whole"])
def test_no_operator_of_the_other_orders_waits_for_a_gpu(fake, order):
    """dx of slabs is added up in float32 from half-precision factors; nothing else is widened."""
    watching, x, W, b, t = fake
    layer = Layer(x, W, b, t, None, OPTIONS, Blocks(True, (True, True, True), keeps=True))
    plan = Plan("classes", 10, D + 1, 0, 0, 0)
    if order == "classes":
        (_, M, L, *_), kept = by_classes.forward(layer, plan)
        by_classes.backward(layer, Rows(M, None, M, L), kept, plan)
        assert watching.wide == [((N, D), 0), *[((N, D), 1)] * (C // 10 - 1)]
    else:
        (_, M, L, *_), kept = whole.forward(layer)
        whole.backward(layer, Rows(M, None, M, L), kept)
        assert watching.wide == []
    assert not watching.names & WAITING
    assert not watching.converted & {(shape, torch.float32) for shape in ((C, D), (N, D))}


def test_a_gpus_blocks_are_large_enough_for_its_matrix_units():
    def size(rows: int, features: int, classes: int, row_bytes: int, device: str) -> int:
        x, W = (
            torch.empty(n, features, dtype=torch.bfloat16, device=device) for n in (rows, classes)
        )
        return rows_at_a_time(Layer(x, W, None, x, None, OPTIONS, Blocks()), row_bytes)

    with FakeTensorMode():
        # blocks of half of the rows, in as much memory as the gradients take
        assert size(8192, 4096, 128_256, 128_256 * 2, "cuda") == 4096
        assert size(8192, 1, 10**6, 10**6 * 2, "cuda") == 265  # of 268, evenly
        assert size(8192, 1, 128_256, 128_256 * 2, "cpu") < 256


# What comes out


def on_a_cpu(total, A, B, _, *, beta=1, alpha=1, out):
    """The operator, which a CPU does not have."""
    sums = A.double() @ B.double()
    return out.copy_(sums + total if beta else sums)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(products, "widens", lambda _: True)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("addmm.dtype_out", on_a_cpu, "CPU")
        yield


@pytest.fixture
def tensors(half):
    x, W, b = torch.randn(N, D), torch.randn(C, D), torch.randn(C)
    t = torch.randint(C, (N,))
    t[3] = -100
    return *differentiable(*(s.to(half) for s in (x, W, b))), t


def exact(x: Tensor, W: Tensor, b: Tensor, t: Tensor) -> tuple[list[Tensor], Tensor]:
    leaves = [s.detach().double().requires_grad_() for s in (x, W, b)]
    z = torch.nn.functional.linear(*leaves)
    return leaves, torch.nn.functional.cross_entropy(z, t)


@pytest.fixture
def memory_full_of_nan(monkeypatch):
    """What `empty` returns holds NaN."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rows", [0, 3])
def test_the_first_product_finds_no_sum(memory_full_of_nan, rows):
    x, W = torch.randn(rows, D), torch.randn(C, D)
    leaves = differentiable(x, W)
    linear_cross_entropy(leaves[0], leaves[1], torch.ones(rows).long(), reduction="sum").backward()
    assert leaves[1].grad.isfinite().all()
    assert (leaves[1].grad != 0).any() == (rows > 0)


@pytest.mark.parametrize("block_rows", [None, 1, 7])
def test_the_gradients_are_those_of_float64(emulated, memory_full_of_nan, tensors, block_rows):
    *leaves, t = tensors
    x, W, b = leaves
    loss = linear_cross_entropy(x, W, t, b, block_rows=block_rows)
    wide, want = exact(x, W, b, t)
    torch.testing.assert_close(loss.double(), want, rtol=2e-2, atol=1e-3)
    for got, d in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(want, wide), strict=True
    ):
        torch.testing.assert_close(got.double(), d, rtol=2e-2, atol=1e-3)


def test_a_gradient_is_narrowed_as_it_is_scaled_and_the_sum_is_left(emulated, half):
    product, g = torch.randn(C, D), torch.tensor(0.3)
    before = product.clone()
    assert torch.equal(products.scaled(product, g, half, True), (before * g).to(half))
    assert torch.equal(product, before)


def test_dx_is_not_rounded_before_it_meets_the_upstream_gradient(emulated, half):
    dz, W = torch.randn(7, C).to(half), torch.randn(C, D).to(half)
    out = torch.full((7, D), torch.nan)
    products.put_product_(out, dz, W, 0)
    torch.testing.assert_close(out, (dz.double() @ W.double()).float(), rtol=1e-6, atol=1e-6)
    products.put_product_(out, dz, W, 1)
    torch.testing.assert_close(out, 2 * (dz.double() @ W.double()).float(), rtol=1e-6, atol=1e-6)


def test_a_hessian_product_takes_the_same_road(fake, monkeypatch):
    watching, x, W, b, t = fake
    monkeypatch.setattr(kernels, "cross_entropy_hvp_", lambda problem, u, rows: (rows.M, rows.L))
    rows = torch.empty(N, device="meta")
    v = Products(x, W, b)
    blocks = Blocks(False, (True, True, True), ROWS)
    layer = Layer(x, W, b, t, None, OPTIONS, blocks)
    hessian.hvp(layer, Rows(rows, None, rows, rows), v)
    of_a_block = [((ROWS, D), 0), ((ROWS, D), 1), ((C, D), 1)]
    assert watching.wide == first_and_more(of_a_block)
