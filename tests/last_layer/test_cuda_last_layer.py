"""The last layer on a CUDA device: the same answers and derivatives, no wait, graphs, memory."""

import pytest
import torch
from conftest import DTYPES, differentiable, oracle_cross_entropy
from torch import Tensor

from custom_ops import LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy
from custom_ops.kernels import cuda
from custom_ops.last_layer.plan import Sizes, default_memory, plan_of

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(cuda.interpreted, reason="TRITON_INTERPRET=1: nothing runs on a device"),
]

DEVICE = torch.device("cuda")
N, D, C = 50, 24, 1000
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "all": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0, "logit_scale": 0.9},
}
# Of results that are sums of rounded products, with M, L and the logits rounded as well.
TOLERANCES = {
    torch.float64: {},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
}


def case(dtype: torch.dtype, kind: str = "labels", rows: int = N, classes: int = C) -> list[Tensor]:
    """x, W, b, target and class weights, drawn on the CPU."""
    x, W, b = torch.randn(rows, D), torch.randn(classes, D) / D**0.5, torch.randn(classes)
    w = torch.rand(classes) + 0.1
    t = torch.randint(classes, (rows,))
    t[1] = -100
    if kind == "probabilities":
        t = torch.rand(rows, classes).to(dtype)
    return [*(s.to(dtype) for s in (x, W, b)), t, w.to(dtype)]


def ours(x, W, b, t, w=None, **options):
    return linear_cross_entropy(x, W, t, b, weight=w, **options)


def exact(x, W, b, t, w=None, **options):
    """The float64 oracle of the same numbers."""
    z = torch.nn.functional.linear(x, W, b)
    loss, _ = oracle_cross_entropy(z, t, None if w is None else w.double(), **options)
    return loss


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [s.to(DEVICE) for s in tensors]


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest entry: gradients of a mean are small numbers."""
    scale = want.detach().abs().max().clamp_min(1e-30)
    torch.testing.assert_close(
        got.detach().cpu().double() / scale, want.detach().double() / scale, **TOLERANCES[dtype]
    )


@pytest.mark.parametrize("block_rows", [None, 16])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients_agree_with_the_oracle(dtype, options, kind, block_rows):
    x, W, b, t, w = case(dtype, kind)
    leaves = differentiable(*on_device(x, W, b))
    wide = [s.double().requires_grad_() for s in (x, W, b)]
    t_here, w_here = on_device(t, w)
    loss = ours(*leaves, t_here, w_here, block_rows=block_rows, **OPTIONS[options])
    want = exact(*wide, t, w, **OPTIONS[options])
    assert_close(loss, want, dtype)
    gradients = torch.autograd.grad(loss, leaves), torch.autograd.grad(want, wide)
    for got, d in zip(*gradients, strict=True):
        assert got.dtype == dtype
        assert_close(got, d, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_for_every_row_and_for_lse(dtype):
    x, W, b, t, _ = case(dtype)
    leaves = differentiable(*on_device(x, W, b))
    wide = [s.double().requires_grad_() for s in (x, W, b)]
    v, h = torch.randn(N).to(dtype), torch.randn(N)
    loss, stats = ours(*leaves, *on_device(t), reduction="none", block_rows=16, return_stats=True)
    z = torch.nn.functional.linear(*wide)
    want, lse = oracle_cross_entropy(z, t, reduction="none")
    upstream = [v.to(DEVICE, loss.dtype), h.to(DEVICE, stats.lse.dtype)]
    found = torch.autograd.grad((loss, stats.lse), leaves, upstream)
    wanted = torch.autograd.grad((want, lse), wide, (v.double(), h.double()))
    for got, d in zip(found, wanted, strict=True):
        assert_close(got, d, dtype)


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hessian_products_agree_with_the_oracle(dtype, options):
    """With a cap in plain algebra, without one in the kernel of the Hessian product."""
    x, W, b, t, _ = case(dtype, classes=300)
    directions = [torch.randn_like(s) for s in (x, W, b)]
    leaves = differentiable(*on_device(x, W, b))
    wide = [s.double().requires_grad_() for s in (x, W, b)]
    loss = ours(*leaves, *on_device(t), block_rows=16, **OPTIONS[options])
    want = exact(*wide, t, **OPTIONS[options])
    products = []
    for value, inputs, v in (
        (loss, leaves, on_device(*directions)),
        (want, wide, [s.double() for s in directions]),
    ):
        g = torch.autograd.grad(value, inputs, create_graph=True)
        products.append(torch.autograd.grad(g, inputs, v))
    for got, d in zip(*products, strict=True):
        assert_close(got, d, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_mode_agrees_with_the_oracle(dtype):
    x, W, b, t, _ = case(dtype)
    tangents = tuple(torch.randn_like(s) for s in (x, W, b))
    (t_here,) = on_device(t)
    _, got = torch.func.jvp(
        lambda *s: ours(*s, t_here, block_rows=16),
        tuple(on_device(x, W, b)),
        tuple(on_device(*tangents)),
    )
    wide, directions = ([s.double() for s in group] for group in ((x, W, b), tangents))
    _, want = torch.func.jvp(lambda *s: exact(*s, t), tuple(wide), tuple(directions))
    assert_close(got, want, dtype)


def everything(x, W, b, t, w) -> list[Tensor]:
    """Loss, statistics, gradients and a Hessian product, with and without options."""
    results = []
    for options in OPTIONS.values():
        loss, stats = ours(x, W, b, t, w, block_rows=16, return_stats=True, **options)
        g = torch.autograd.grad(loss, (x, W, b), retain_graph=True)
        rows = ours(x, W, b, t, w, block_rows=16, reduction="none", **options)
        h = torch.autograd.grad(rows.sum(), (x, W, b))
        results += [loss.detach(), *(s.detach() for s in stats), *g, *h]
    loss = ours(x, W, b, t, block_rows=16)
    g = torch.autograd.grad(loss, (x, W, b), create_graph=True)
    return results + list(torch.autograd.grad(g, (x, W, b), [torch.ones_like(s) for s in g]))


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_device(dtype, kind):
    x, W, b, t, w = case(dtype, kind)
    leaves, t, w = differentiable(*on_device(x, W, b)), *on_device(t, w)
    everything(*leaves, t, w)  # compiles and loads the kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(*leaves, t, w)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_captures_forward_and_backward(dtype):
    x, W, b, t, _ = case(dtype)
    leaves, t = differentiable(*on_device(x, W, b)), t.to(DEVICE)

    def step() -> list[Tensor]:
        loss = ours(*leaves, t, block_rows=16)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            leaves[0].copy_(torch.randn(N, D))
        t.copy_(torch.randint(C, (N,)))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_takes_the_whole_graph(dynamic):
    torch._dynamo.reset()
    x, W, b, t, _ = case(torch.float32)
    ones, twos = (differentiable(*on_device(x, W, b)) for _ in range(2))
    t = t.to(DEVICE)
    got = torch.compile(ours, fullgraph=True, dynamic=dynamic)(*ones, t)
    want = ours(*twos, t)
    torch.testing.assert_close(got, want)
    for a, c in zip(torch.autograd.grad(got, ones), torch.autograd.grad(want, twos), strict=True):
        torch.testing.assert_close(a, c)


def test_a_module_under_autocast():
    x, _, _, t, _ = case(torch.float32)
    head = torch.nn.Linear(D, C).to(DEVICE)
    loss_of = LinearCrossEntropyLoss.from_linear(head)
    (leaf,) = differentiable(*on_device(x))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = loss_of(leaf, t.to(DEVICE))
    assert loss.dtype == torch.float32
    loss.backward()
    with torch.no_grad():
        W, b = (p.cpu().double() for p in (head.weight, head.bias))
        z = torch.nn.functional.linear(x.double(), W, b)
    assert_close(loss, oracle_cross_entropy(z, t)[0], torch.bfloat16)
    assert head.weight.grad.dtype == torch.float32


def test_every_run_gives_the_same_bits():
    x, W, b, t, w = case(torch.bfloat16)
    leaves, t, w = differentiable(*on_device(x, W, b)), *on_device(t, w)
    first = everything(*leaves, t, w)
    for _ in range(3):
        assert all(map(torch.equal, first, everything(*leaves, t, w)))


def forget_bad_labels() -> None:
    """Let a record that another test left behind raise here."""
    torch.cuda.synchronize()
    try:
        cross_entropy(torch.zeros(1, 2, device=DEVICE), torch.zeros(1, dtype=torch.long).cuda())
    except IndexError:
        torch.cuda.synchronize()


@pytest.mark.parametrize("label", [-1, C, 2**40])
def test_a_bad_label_is_named_by_its_place_among_all_and_the_device_lives_on(label):
    x, W, b, t, _ = case(torch.float32)
    x, W, b, t = on_device(x, W, b, t.masked_fill(t < 0, 0))
    ours(x, W, b, t, block_rows=16)
    forget_bad_labels()
    bad = t.clone()
    bad[37] = label
    says = rf"target\[37\] is {label}, out of range for {C} classes"
    torch.cuda._sleep(10**8)  # a busy device has said nothing before the call is over
    loss = ours(x, W, b, bad, block_rows=16, reduction="none")
    torch.cuda.synchronize()
    assert loss.isnan().nonzero().flatten().tolist() == [37]
    with pytest.raises(IndexError, match=says):
        ours(x, W, b, t, block_rows=16)
    assert ours(x, W, b, t).isfinite()


def peak(work) -> int:
    work()  # code, workspaces and handles take memory once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = work()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mib", [None, 64, 320, 10_000])
def test_the_memory_is_what_was_named(dtype, mib):
    rows, features, classes = 4096, 512, 128_256  # whose logits are 1 or 2 GB
    x = torch.randn(rows, features, device=DEVICE, dtype=dtype).requires_grad_()
    W = torch.randn(classes, features, device=DEVICE, dtype=dtype).requires_grad_()
    t = torch.randint(classes, (rows,), device=DEVICE)
    sizes = Sizes(rows, features, classes, dtype.itemsize)
    memory = default_memory(sizes) if mib is None else mib << 20
    plan = plan_of(sizes, memory)
    gradients, slack = (rows + classes) * features * dtype.itemsize, 16 << 20

    def step():
        loss = linear_cross_entropy(x, W, t, memory=None if mib is None else memory)
        return torch.autograd.grad(loss, (x, W))

    copy_of_x = rows * features * dtype.itemsize if dtype == torch.float32 else 0
    assert peak(step) <= gradients + plan.bytes + copy_of_x + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hessian_product_takes_a_block_and_the_float32_sums(dtype):
    rows, features, classes = 4096, 512, 128_256
    x = torch.randn(rows, features, device=DEVICE, dtype=dtype).requires_grad_()
    W = torch.randn(classes, features, device=DEVICE, dtype=dtype).requires_grad_()
    t = torch.randint(classes, (rows,), device=DEVICE)
    numbers = (rows + classes) * features
    gradients = numbers * dtype.itemsize
    sums = 0 if dtype == torch.float32 else 4 * numbers
    block = default_memory(Sizes(rows, features, classes, dtype.itemsize))
    copies_of_x, slack = 3 * rows * features * dtype.itemsize, 16 << 20
    g = torch.autograd.grad(linear_cross_entropy(x, W, t), (x, W), create_graph=True)
    v = [torch.randn_like(s) for s in g]
    product = peak(lambda: torch.autograd.grad(g, (x, W), v, retain_graph=True))
    assert product <= gradients + sums + block + copies_of_x + slack


@pytest.mark.parametrize("memory", [0, 700_000, 1_000_000, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_slabs_of_classes_agree_with_the_oracle(dtype, memory, reduction):
    rows, features, classes = 512, 256, 4001
    x, W, b = torch.randn(rows, features), torch.randn(classes, features) / 16, torch.randn(classes)
    t = torch.randint(classes, (rows,))
    t[1] = -100
    tensors = [s.to(dtype) for s in (x, W, b)]
    leaves, wide = (
        differentiable(*on_device(*tensors)),
        differentiable(*(s.double() for s in tensors)),
    )
    if memory:
        assert plan_of(Sizes(rows, features, classes, dtype.itemsize), memory).order == "classes"
    loss = ours(*leaves, *on_device(t), reduction=reduction, memory=memory)
    want = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(*wide), t, reduction=reduction
    )
    g = torch.rand_like(want)
    torch.testing.assert_close(loss.cpu().double(), want, **TOLERANCES[dtype], check_dtype=False)
    for got, d in zip(
        torch.autograd.grad(loss, leaves, g.to(loss)),
        torch.autograd.grad(want, wide, g),
        strict=True,
    ):
        torch.testing.assert_close(got.cpu().double(), d, **TOLERANCES[dtype])


@pytest.mark.parametrize("memory", [0, 1 << 20, None])
def test_the_error_of_dw_in_bfloat16_is_not_above_the_plain_forms(memory):
    x, W, _, t, _ = case(torch.bfloat16, rows=2048)
    wide = W.double().requires_grad_()
    (want,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x.double() @ wide.T, t), wide)
    x, t = on_device(x, t)
    errors = []
    for loss_of in (
        lambda W: torch.nn.functional.cross_entropy(x @ W.T, t),
        lambda W: linear_cross_entropy(x, W, t, memory=memory),
    ):
        (leaf,) = differentiable(*on_device(W))
        (dW,) = torch.autograd.grad(loss_of(leaf), leaf)
        errors.append((dW.cpu().double() - want).norm() / want.norm())
    plain, blocked = errors
    assert blocked <= 1.1 * plain  # a tenth for chance: dz is rounded before or after 1/N


def test_more_than_two_to_the_31_logits_in_one_block():
    """8 GB of logits in blocks are nothing; a block of them has offsets beyond 32 bits."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of device memory are free")
    classes = 128_256
    rows = 2**31 // classes + 2
    x = torch.randn(rows, 16, device=DEVICE, dtype=torch.bfloat16)
    W = torch.randn(classes, 16, device=DEVICE, dtype=torch.bfloat16)
    t = torch.randint(classes, (rows,), device=DEVICE)
    together = linear_cross_entropy(x, W, t, reduction="none", block_rows=rows)
    alone = linear_cross_entropy(x[-2:], W, t[-2:], reduction="none")
    torch.testing.assert_close(together[-2:], alone)
