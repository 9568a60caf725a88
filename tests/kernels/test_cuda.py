"""On a CUDA device: the same answers, no wait, captured graphs, sizes beyond 2³¹, bad labels."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, differentiable, oracle_cross_entropy
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import custom_ops
from custom_ops import cross_entropy, log_softmax, softmax
from custom_ops.kernels import cpu, cuda

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(cuda.interpreted, reason="TRITON_INTERPRET=1: nothing runs on a device"),
]

# A tile of several rows, one row, rows in chunks, few long rows; classes in the middle, and those
# in chunks.
SHAPES = [(128, 10), (7, 1), (33, 1000), (5, 1025), (4, 32768), (3, 50_257), (8, 1_000_000)]
SHAPES += [(2, 21, 17, 19), (2, 1000, 6, 6)]
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "all": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0, "logit_scale": 0.9},
}


def case(shape: tuple[int, ...], dtype: torch.dtype, kind: str = "labels") -> tuple[Tensor, Tensor]:
    """Drawn on the CPU, so that every device has the same."""
    x = (torch.randn(shape) * 3).to(dtype)
    if kind == "probabilities":
        return x, torch.rand(shape).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target.view(-1)[-1] = -100
    return x, target


def test_triton_answers():
    assert cuda.library is not None, cuda.missing
    assert f"Triton {cuda.version} on CUDA" in custom_ops.backend()
    assert cuda.takes(torch.randn(2, 3, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax_agrees_with_the_oracle(shape, dtype):
    x, v = (torch.randn(shape).to(dtype) for _ in range(2))
    for op, oracle in ((softmax, F.softmax), (log_softmax, F.log_softmax)):
        (leaf,), (exact,) = differentiable(x.cuda()), differentiable(x.double())
        y, want = op(leaf, 1), oracle(exact, 1)
        torch.testing.assert_close(y.cpu(), want.to(dtype))
        (d,) = torch.autograd.grad(y, leaf, v.cuda())
        # from the rounded result, as it was saved
        p = y.detach().cpu().double()
        u = v.double()
        by_hand = (
            p * (u - (p * u).sum(1, keepdim=True))
            if op is softmax
            else u - p.exp() * u.sum(1, keepdim=True)
        )
        torch.testing.assert_close(d.cpu(), by_hand.to(dtype))


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy_agrees_with_the_oracle(shape, dtype, options, kind):
    x, target = case(shape, dtype, kind)
    weight = (torch.rand(shape[1]) + 0.1).to(dtype)
    (leaf,), (exact,) = differentiable(x.cuda()), differentiable(x.double())
    loss, stats = cross_entropy(
        leaf, target.cuda(), weight.cuda(), return_stats=True, **OPTIONS[options]
    )
    want, lse = oracle_cross_entropy(exact, target, weight.double(), **OPTIONS[options])
    torch.testing.assert_close(loss.cpu(), want.to(dtype))
    torch.testing.assert_close(stats.lse.cpu(), lse.to(stats.lse.dtype))
    (d,), (want,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(want, exact)
    torch.testing.assert_close(d.cpu(), want.to(dtype))
    # in the logits' place: the same bits
    z = leaf * 1
    loss = cross_entropy(z, target.cuda(), weight.cuda(), inplace_backward=True, **OPTIONS[options])
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.equal(gradient, d)
    assert gradient.data_ptr() == z.data_ptr()


@pytest.mark.parametrize("classes", [10, 1500, 40_000])
def test_edges_are_those_of_the_cpu(classes):
    x = torch.randn(8, classes)
    x[0], x[1, : classes // 2], x[2, 1:] = -torch.inf, -torch.inf, -torch.inf
    x[3, -1], x[4, 0], x[5] = torch.nan, torch.inf, torch.nan
    target = torch.tensor([0, classes - 1, 0, 1, 2, -100, -100, 3])
    results = []
    for device in ("cpu", "cuda"):
        (leaf,) = differentiable(x.to(device))
        loss, stats = cross_entropy(
            leaf, target.to(device), reduction="none", return_stats=True, label_smoothing=0.1
        )
        (d,) = torch.autograd.grad(loss.sum(), leaf)
        p = softmax(leaf.detach(), 1)
        results.append([t.detach().cpu() for t in (loss, *stats, d, p)])
    torch.testing.assert_close(*results, equal_nan=True)


LAYOUTS = {
    "transposed": lambda: torch.randn(50, 40).T,
    "rows apart": lambda: torch.randn(40, 64)[:, :50],
    "channels last": lambda: torch.randn(2, 50, 9, 8).contiguous(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(1, 50, 1).expand(3, 50, 4),
    "off by one number": lambda: torch.randn(40 * 50 + 1)[1:].view(40, 50),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout):
    x = LAYOUTS[layout]()
    target = torch.randint(50, x.select(1, 0).shape)
    results = []
    for leaf in (x.cuda().requires_grad_(), x.contiguous().cuda().requires_grad_()):
        loss = cross_entropy(leaf, target.cuda(), reduction="none")
        (d,) = torch.autograd.grad(loss.sum(), leaf)
        results.append((loss, d, softmax(leaf, 1)))
    torch.testing.assert_close(*results)


def step(leaf: Tensor, target: Tensor, weight: Tensor | None, **options) -> list[Tensor]:
    loss, stats = cross_entropy(leaf, target, weight, return_stats=True, **options)
    (d,) = torch.autograd.grad(loss, leaf)
    alone = cross_entropy(leaf, target, weight, **options)  # by the C++ node, if it is there
    results = [loss, *stats, d, alone, *torch.autograd.grad(alone, leaf)]
    p, y = softmax(leaf, 1), log_softmax(leaf, 1)
    return [*results, *torch.autograd.grad(p.sum() + y.sum(), leaf)]


@pytest.mark.parametrize("shape", [(128, 10), (8, 100_000), (2, 21, 16, 16)], ids=str)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_nothing_waits_for_the_device(shape, kind):
    x, target = case(shape, torch.float32, kind)
    (leaf,) = differentiable(x.cuda())
    target, weight = target.cuda(), torch.rand(shape[1]).cuda()
    arguments = [
        (None, {}),
        (weight, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 20.0}),
    ]
    for w, options in arguments:  # compiles and loads the kernels, which may wait
        step(leaf, target, w, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for w, options in arguments:
            step(leaf, target, w, **options)
            z = leaf * 1
            torch.autograd.grad(cross_entropy(z, target, w, inplace_backward=True, **options), leaf)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(128, 10), (8, 100_000)], ids=str)
def test_a_graph_captures_forward_and_backward(shape):
    x, target = (t.cuda() for t in case(shape, torch.float32))
    (leaf,) = differentiable(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(leaf, target, None)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaf, target, None)
    for _ in range(2):
        with torch.no_grad():
            leaf.copy_(torch.randn(shape))
        target.copy_(torch.randint(shape[1], (shape[0],)))
        graph.replay()
        want = step(leaf, target, None)
        assert all(map(torch.equal, captured, want))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_keeps_the_kernels(dynamic):
    torch._dynamo.reset()
    x, target = (t.cuda() for t in case((33, 1000), torch.float32))
    (a,), (b,) = differentiable(x), differentiable(x)
    ours = torch.compile(cross_entropy, fullgraph=True, dynamic=dynamic)
    got, code = run_and_get_code(ours, a, target)
    want = F.cross_entropy(b, target)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, a), torch.autograd.grad(want, b))
    assert any("custom_ops_cuda.cross_entropy" in text for text in code)


@pytest.mark.parametrize("bad", [False, True])
def test_the_first_call_of_a_process_may_be_captured(bad):
    """What the package keeps for itself must not lie in the memory of the graphs."""
    program = f"""
import torch
from custom_ops import cross_entropy
f = torch.compile(cross_entropy, fullgraph=True, mode="reduce-overhead")
x, t = torch.randn(64, 10, device="cuda", requires_grad=True), torch.randint(10, (64,)).cuda()
for i in range(4):
    torch.compiler.cudagraph_mark_step_begin()
    f(x, t).backward()
want = torch.nn.functional.cross_entropy(x, t)
torch.testing.assert_close(f(x, t), want)
if {bad}:
    t[3] = 10
    assert f(x, t).isnan()
    torch.cuda.synchronize()
    try:
        cross_entropy(x, t.zero_())
    except IndexError as error:
        assert "target[3] is 10" in str(error), error
    else:
        raise SystemExit("nothing was raised")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(cpu.library is None, reason=f"no C++ node: {cpu.missing}")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_node_and_the_function_give_the_same_bits(monkeypatch, weighted, kind, reduction):
    x, target = (t.cuda() for t in case((300, 10), torch.float32, kind))
    weight = torch.rand(10).cuda() if weighted else None
    results = []
    for library in (cpu.library, None):
        monkeypatch.setattr(cpu, "library", library)
        (leaf,) = differentiable(x)
        loss = cross_entropy(leaf, target, weight, reduction=reduction, label_smoothing=0.1)
        assert ("custom_ops::CrossEntropy" in loss.grad_fn.name()) == (library is not None)
        g = torch.linspace(-1, 2, loss.numel()).cuda().view(loss.shape)
        (once,) = torch.autograd.grad(loss, leaf, g, retain_graph=True)
        (again,) = torch.autograd.grad(loss, leaf, g, create_graph=True)
        (second,) = torch.autograd.grad(again, leaf, x)
        results.append([loss, once, again, second])
    if reduction == "none" or (reduction == "sum" and not weighted):
        assert torch.equal(results[0][1], results[1][1])
    # the node adds the sums of its programs up, the Function the rows
    torch.testing.assert_close(*results)


def test_a_graph_captures_softmax_over_long_rows():
    """With the clearing of the counters on which its programs wait."""
    x, v = (torch.randn(40, 70_001, device="cuda") for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        custom_ops.contract(softmax(x, 1), v)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        p = softmax(x, 1)
        captured = [p, custom_ops.contract(p, v)]
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        p = softmax(x, 1)
        assert all(map(torch.equal, captured, [p, custom_ops.contract(p, v)]))


@pytest.mark.parametrize("shape", [(1, 5_000_000), (3, 1000, 31, 33), (2, 1000, 64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_long_rows_however_they_lie(shape, dtype):
    x, v = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    p, exact = softmax(x, 1), F.softmax(x.double(), 1)
    torch.testing.assert_close(p, exact.to(dtype))
    p64, v64 = p.double(), v.double()
    want = p64 * (v64 - (p64 * v64).sum(1, keepdim=True))
    torch.testing.assert_close(custom_ops.contract(p, v, 1), want.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_on_several_streams_at_once(dtype):
    """Programs wait for one another there, whatever else the device has under way."""
    x, v = (torch.randn(1500, 65_537, device="cuda").to(dtype) for _ in range(2))
    p = F.softmax(x, 1)
    wants = [p, torch.autograd.functional.vjp(lambda z: F.softmax(z, 1), x, v)[1]]
    streams = [torch.cuda.Stream(priority=n) for n in (0, -1, 0)]
    torch.cuda.synchronize()
    found = []
    for _ in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append([softmax(x, 1), custom_ops.contract(p, v)])
    torch.cuda.synchronize()
    for got in found:
        assert all(map(torch.equal, got, found[0]))
    for got, want in zip(found[0], wants, strict=True):
        torch.testing.assert_close(got, want)
    few = [softmax(x[70:72], 1), custom_ops.contract(p[70:72], v[70:72])]
    assert all(torch.equal(a, b[70:72]) for a, b in zip(few, found[0], strict=True))


def test_every_run_gives_the_same_bits():
    for shape, kind in itertools.product(
        [(4096, 10), (8, 1_000_000), (2, 21, 64, 64)], ["labels", "probabilities"]
    ):
        x, target = (t.cuda() for t in case(shape, torch.float32, kind))
        (leaf,) = differentiable(x)
        weight = torch.rand(shape[1]).cuda()
        first = step(leaf, target, weight, label_smoothing=0.1)
        for _ in range(3):
            assert all(map(torch.equal, first, step(leaf, target, weight, label_smoothing=0.1)))


@pytest.mark.parametrize(
    "shape", [(2**31 // 128_256 + 2, 128_256), (2**28 + 3, 8), (1, 8, 2**28 + 3)], ids=str
)
def test_more_than_two_to_the_31_numbers(shape):
    """The last rows, whose offsets need 64 bits, are those of the rows alone."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of device memory are free")
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    rows = (shape[0], *shape[2:])
    target = torch.randint(shape[1], rows, device="cuda")

    def last(t: Tensor) -> Tensor:
        return t[-2:] if len(shape) == 2 else t[..., -2:]

    ends = last(x).contiguous()
    want = F.cross_entropy(ends.float(), last(target), reduction="none")
    p = last(softmax(x, 1)).clone()
    torch.testing.assert_close(p, F.softmax(ends.float(), 1).bfloat16())
    z = x.requires_grad_().view_as(x)
    loss = cross_entropy(z, target, reduction="none", dtype=torch.float32)
    torch.testing.assert_close(last(loss.detach()), want)
    (d,) = torch.autograd.grad(loss, z, torch.ones_like(loss))
    (exact,) = differentiable(ends.float())
    total = F.cross_entropy(exact, last(target), reduction="sum")
    torch.testing.assert_close(last(d), torch.autograd.grad(total, exact)[0].bfloat16())


def test_rows_just_below_two_to_the_31():
    """The last tile's rows that are not there have numbers of 64 bits."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("less than 12 GiB of device memory are free")
    x = torch.zeros(2**31 - 5, 1, dtype=torch.bfloat16, device="cuda")
    p = softmax(x, 1)
    assert p.min() == p.max() == 1


def forget_bad_labels() -> None:
    """Let a record that another test left behind raise here."""
    torch.cuda.synchronize()
    try:
        cross_entropy(torch.zeros(1, 2, device="cuda"), torch.zeros(1, dtype=torch.long).cuda())
    except IndexError:
        torch.cuda.synchronize()


@pytest.mark.parametrize("classes", [10, 50_000])
@pytest.mark.parametrize("label", [-1, 2**40, -(2**40)])
def test_a_bad_label_is_an_error_at_the_next_call_and_the_device_lives_on(classes, label):
    forget_bad_labels()
    x, target = torch.randn(64, classes, device="cuda"), torch.randint(classes, (64,)).cuda()
    bad = target.clone()
    bad[17] = label
    (leaf,) = differentiable(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = cross_entropy(leaf, bad, reduction="none")
        (d,) = torch.autograd.grad(loss.sum(), leaf)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    nan = loss.isnan().nonzero().flatten().tolist()
    assert nan == [17]
    assert d.isnan().any(1).nonzero().flatten().tolist() == [17]
    says = rf"target\[17\] is {label}, out of range for {classes} classes .* earlier call"
    with pytest.raises(IndexError, match=says):
        cross_entropy(x, target)
    torch.testing.assert_close(cross_entropy(x, target), F.cross_entropy(x, target))


def test_a_bad_label_in_a_replayed_graph_is_an_error_at_the_next_call():
    forget_bad_labels()
    x, target = torch.randn(64, 10, device="cuda"), torch.randint(10, (64,)).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        cross_entropy(x, target)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = cross_entropy(x, target)
    target[5] = 10
    graph.replay()
    torch.cuda.synchronize()
    assert loss.isnan()
    with pytest.raises(IndexError, match=r"target\[5\] is 10"):
        cross_entropy(x, target)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_the_device_of_the_tensors_is_used_whichever_is_current():
    x, target = case((33, 1000), torch.float32)
    with torch.cuda.device(0):
        got = cross_entropy(x.to("cuda:1"), target.to("cuda:1"))
    assert got.device.index == 1
    torch.testing.assert_close(got.cpu(), F.cross_entropy(x, target))
