"""The Triton kernels beside the eager ones, in Triton's interpreter: all paths, layouts, edges."""

import dataclasses
import itertools
import sys

import pytest
import torch
from conftest import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import custom_ops
from custom_ops.kernels import Options, Problem, Rows, cpu, cuda, eager
from custom_ops.kernels.cuda.tiles import CHUNK, tiles
from custom_ops.row import Row

pytestmark = [
    pytest.mark.skipif(not cuda.interpreted, reason="TRITON_INTERPRET=1 is not set"),
    pytest.mark.skipif(cuda.library is None, reason=f"no Triton kernels: {cuda.missing}"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # numpy's, at 1e38
]

ops = torch.ops.custom_ops_cuda
INF, NAN = torch.inf, torch.nan
# The paths: several rows a tile, a row a tile, rows in chunks; and the same with an inner size.
SHAPES = {
    "one class": ((3, 1), 1),
    "two classes": ((5, 2), 1),
    "ten classes": ((140, 10), 1),
    "a thousand": ((3, 1000), 1),
    "a power of two": ((2, 1024), 1),
    "one more": ((2, 1025), 1),
    "in two tiles": ((5, 600), 1),
    "pixels in two tiles": ((2, 19, 5, 7), 1),
    "side by side in two tiles": ((2, 21, 4, 8), 1),
    "rows in steps": ((3, 1500), 1),
    "several steps": ((2, 4200), 1),
    "chunks": ((2, 20_000), 1),
    "between two vectors": ((5, 16_389), 1),
    "classes in the middle": ((2, 7, 3, 5), 1),
    "classes in the middle, in chunks": ((2, 300, 5), 1),
    "rows side by side": ((2, 7, 4, 6), 1),
    "rows side by side, in chunks": ((2, 300, 16), 1),
    "classes first": ((7, 4), 0),
    "a vector": ((5,), 0),
    "no row": ((0, 4), 1),
    "no class": ((3, 0), 1),
    "no pixel": ((2, 4, 0), 1),
}
PATHS = ("ten classes", "rows in steps", "several steps", "chunks", "between two vectors")
PATHS += ("rows side by side", "classes in the middle, in chunks")


@pytest.fixture(autouse=True)
def only_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", None)


@pytest.fixture(params=SHAPES)
def shape_dim(request):
    return SHAPES[request.param]


def assert_close(got, want) -> None:
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize(
    "path", ["a thousand", "in two tiles", "side by side in two tiles", "chunks"]
)
def test_wherever_the_largest_logit_lies_softmax_does_not_overflow(path):
    shape, dim = SHAPES[path]
    for at in (0, shape[1] // 2, shape[1] - 1):
        z = torch.randn(shape)
        z[:, at] = 3e4
        assert_close(cuda.kernels.softmax(z, dim), eager.softmax(z, dim))
        assert_close(cuda.kernels.log_softmax(z, dim), eager.log_softmax(z, dim))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_and_its_maps(shape_dim, dtype):
    shape, dim = shape_dim
    z, v = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    assert cuda.takes(z, v)
    for op in ("softmax", "log_softmax"):
        assert_close(getattr(cuda.kernels, op)(z, dim), getattr(eager, op)(z, dim))
    for op, p in (
        ("contract", eager.softmax(z, dim)),
        ("log_softmax_vjp", eager.log_softmax(z, dim)),
        ("log_softmax_jvp", eager.log_softmax(z, dim)),
    ):
        assert_close(getattr(cuda.kernels, op)(p, v, dim), getattr(eager, op)(p, v, dim))


DEFAULTS = {
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "logit_scale": 1.0,
    "softcap": None,
}
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "full smoothing": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.3},
    "cap": {"softcap": 2.0},
    "scale": {"logit_scale": -0.7},
    "all": {"label_smoothing": 0.2, "z_loss": 0.3, "softcap": 2.0, "logit_scale": 0.7},
    "an ignored class": {"ignore_index": 0},
}


def options(name: str, dim: int, dtype: torch.dtype) -> Options:
    numbers = {**DEFAULTS, **OPTIONS[name]}
    return Options(dim=dim, dtype=accumulator(dtype), stats=True, **numbers)


def case(shape, dim, o: Options, dtype: torch.dtype, soft: bool, weighted: bool) -> tuple:
    """Logits, target and weights, the first of several rows ignored."""
    classes = shape[dim]
    rows = [size for d, size in enumerate(shape) if d != dim]
    x = torch.randn(shape).to(dtype)
    target = torch.rand(shape).to(dtype) if soft else torch.randint(max(classes, 1), rows)
    if not soft and target.numel() and (target.dim() or not classes):
        target.view(-1)[: 1 if classes else None] = o.ignore_index
    return x, target, torch.rand(classes, dtype=o.dtype) if weighted else None


def check_cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None, o: Options) -> None:
    """Both directions, with upstream gradients of every kind."""
    assert cuda.takes(x, target, weight)
    got, want = (k.cross_entropy(Problem(x, target, weight, o)) for k in (cuda.kernels, eager))
    assert_close(got, want)
    _, M, L, *_ = want
    g, h = torch.randn_like(M), torch.randn_like(M)
    one = torch.tensor(0.7, dtype=M.dtype).expand(M.shape)
    for upstream in ((g, None), (g, h), (one, None)):
        arguments = Problem(x, target, weight, o), Rows(*upstream, M, L)
        want = eager.cross_entropy_vjp(*arguments)
        assert_close(cuda.kernels.cross_entropy_vjp(*arguments), want)
    logits = x.clone()
    version = logits._version
    gradient = cuda.kernels.cross_entropy_vjp_(
        Problem(logits, target, weight, o), Rows(one, None, M, L)
    )
    assert_close(logits, want)
    assert gradient.data_ptr() == logits.data_ptr()
    assert logits._version > version


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_in_every_shape(shape_dim, soft, weighted):
    for name in ("plain", "all"):
        o = options(name, shape_dim[1], torch.float32)
        check_cross_entropy(*case(*shape_dim, o, torch.float32, soft, weighted), o)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy_with_every_option(name, path):
    for soft, weighted in itertools.product((False, True), repeat=2):
        o = options(name, 1, torch.float64)
        check_cross_entropy(*case(*SHAPES[path], o, torch.float64, soft, weighted), o)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_from_half_precision(dtype, path):
    for soft in (False, True):
        o = options("all", 1, dtype)
        check_cross_entropy(*case(*SHAPES[path], o, dtype, soft, True), o)


def test_the_computation_may_be_wider_or_narrower_than_the_logits():
    for dtype, acc in ((torch.bfloat16, torch.float64), (torch.float64, torch.float32)):
        o = options("all", 1, acc)
        check_cross_entropy(*case((4, 9), 1, o, dtype, False, True), o)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_cap_is_as_exact_as_torchs_tanh(dtype):
    """Of one class the maximum is the capped logit itself."""
    x = torch.cat([torch.logspace(-9, 2, 200), torch.linspace(0.5, 0.7, 100), torch.tensor([INF])])
    x = torch.cat([x, -x]).to(dtype).unsqueeze(1)
    o = Options(**{**DEFAULTS, "softcap": 1.0}, dim=1, dtype=dtype)
    _, M, *_ = cuda.kernels.cross_entropy(
        Problem(x, torch.zeros(len(x), dtype=torch.long), None, o)
    )
    few_roundings = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(M, x.squeeze(1).tanh(), rtol=few_roundings, atol=0)


def edge_rows(classes: int) -> Tensor:
    """Rows of −inf, NaN and +inf in every place, and of equal logits."""
    x = torch.randn(12, classes)
    x[0] = -INF
    x[1, : classes // 2] = -INF
    x[2, 1:] = -INF
    x[3, -1] = NAN
    x[4, classes // 2] = INF
    x[5, 0], x[5, -1] = NAN, INF
    x[6, :-1] = -INF
    x[7] = NAN
    x[8] = 1.0
    x[9, 0], x[9, -1] = 1e38, -1e38
    x[10] = INF
    return x


@pytest.mark.parametrize("classes", [2, 10, 1500, 40_000])
def test_rows_of_infinities_and_nan(classes):
    x, v = edge_rows(classes), torch.randn(12, classes)
    assert_close(cuda.kernels.softmax(x, 1), eager.softmax(x, 1))
    assert_close(cuda.kernels.log_softmax(x, 1), eager.log_softmax(x, 1))
    assert_close(cuda.kernels.softmax(x.T, 0), eager.softmax(x.T, 0))
    for op, p in (("contract", eager.softmax(x, 1)), ("log_softmax_vjp", eager.log_softmax(x, 1))):
        assert_close(getattr(cuda.kernels, op)(p, v, 1), getattr(eager, op)(p, v, 1))
    even = torch.zeros(12, classes)
    even[:, -1] = 1
    for name in ("plain", "smoothing", "z-loss", "cap")[: 4 if classes < 100 else 2]:
        o = options(name, 1, torch.float32)
        for target in (torch.arange(12) % classes, even, torch.full((12,), classes - 1)):
            got, want = (
                (loss, M + L, prediction, entropy)  # of a row with NaN, M may be any number
                for k in (cuda.kernels, eager)
                for loss, M, L, prediction, entropy in [
                    k.cross_entropy(Problem(x, target, None, o))
                ]
            )
            assert_close(got, want)
            for k in (cuda.kernels, eager):
                _, M, L, *_ = k.cross_entropy(Problem(x, target, None, o))
                rows = Rows(torch.ones(12), None, M, L)
                d = k.cross_entropy_vjp(Problem(x, target, None, o), rows)
                got, want = want, d
            assert_close(got, want)


@pytest.mark.parametrize("classes", [9, 40_000])
def test_the_prediction_is_torchs_first_arg_max(classes):
    x = edge_rows(classes)
    x[11, 3] = x[11, -2] = 100.0
    x[8, 5] = x[8, 7] = NAN
    o = options("plain", 1, torch.float32)
    _, _, _, prediction, _ = cuda.kernels.cross_entropy(
        Problem(x, torch.zeros(12, dtype=torch.long), None, o)
    )
    assert torch.equal(prediction, x.argmax(1))
    assert prediction.dtype == torch.int64


@pytest.mark.parametrize("path", PATHS)
def test_an_ignored_row_is_not_looked_at(path):
    shape, _ = SHAPES[path]
    for name in ("plain", "all"):
        o = options(name, 1, torch.float32)
        x, target, weight = case(shape, 1, o, torch.float32, False, True)
        x.movedim(1, -1)[target == o.ignore_index] = NAN
        M, L = torch.zeros(target.shape), torch.zeros(target.shape)
        loss, got_M, got_L, prediction, _ = cuda.kernels.cross_entropy(
            Problem(x, target, weight, o)
        )
        g = torch.where(target == o.ignore_index, NAN, 1.0)
        d = cuda.kernels.cross_entropy_vjp(Problem(x, target, weight, o), Rows(g, g, M, L))
        ignored = target == o.ignore_index
        assert ignored.any()
        for row in (loss, got_M, got_L, d.movedim(1, -1)):
            assert (row[ignored] == 0).all()
            assert row[~ignored].isfinite().all()
        assert (prediction[ignored] == -1).all()


def test_no_weight_meets_an_ignored_row():
    o = options("smoothing", 1, torch.float32)
    x, target, weight = torch.randn(3, 4), torch.tensor([-100, 1, -100]), torch.ones(4)
    weight[2], ones = INF, torch.ones(3)
    loss, M, L, *_ = cuda.kernels.cross_entropy(Problem(x, target, weight, o))
    d = cuda.kernels.cross_entropy_vjp(Problem(x, target, weight, o), Rows(ones, None, M, L))
    assert (d[::2] == 0).all()
    assert (loss[::2] == 0).all()


@pytest.mark.parametrize("name", ["plain", "smoothing", "z-loss", "cap"])
@pytest.mark.parametrize("shape", [(3, 4), (2, 7, 4, 4), (1, 300, 16), (2, 20_000)], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_ignored_row_may_hold_anything(shape, name, value):
    """Also where it is read, among rows side by side."""
    o = options(name, 1, torch.float32)
    x, target = torch.randn(shape), torch.randint(4, (shape[0], *shape[2:]))
    target.view(-1)[1::3] = -100
    ignored = target == -100
    bad = x.masked_fill(ignored.unsqueeze(1), value)
    for weight in (None, torch.rand(shape[1])):
        results = []
        for z in (x, bad):
            problem = Problem(z, target, weight, o)
            loss, M, L, *_ = cuda.kernels.cross_entropy(problem)
            rows = Rows(torch.ones_like(loss), None, M, L)
            results.append([loss, cuda.kernels.cross_entropy_vjp(problem, rows)])
        assert all(map(torch.equal, *results))
        assert (results[0][0][ignored] == 0).all()


@pytest.mark.parametrize("soft", [False, True])
def test_a_class_without_weight_adds_nothing_at_minus_infinity(soft):
    x, w = torch.randn(4, 10), torch.ones(10)
    x[:, 3], w[3] = -INF, 0
    target = torch.rand(4, 10) if soft else torch.tensor([3, 1, 3, 2])
    for name in ("plain", "smoothing", "full smoothing"):
        o = options(name, 1, torch.float32)
        got, want = (k.cross_entropy(Problem(x, target, w, o)) for k in (cuda.kernels, eager))
        assert_close(got, want)
        assert got[0].isfinite().all()


@pytest.mark.parametrize(
    "integer", ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"]
)
def test_labels_of_every_integer_dtype(integer):
    x, o = torch.randn(3, 5), options("plain", 1, torch.float32)
    target = torch.tensor([0, 4, 2]).to(getattr(torch, integer))
    assert_close(
        cuda.kernels.cross_entropy(Problem(x, target, None, o)),
        eager.cross_entropy(Problem(x, target, None, o)),
    )


LAYOUTS = {
    "rows apart": lambda: torch.randn(6, 12)[:, :9],
    "every other row": lambda: torch.randn(6, 9)[::2],
    "transposed": lambda: torch.randn(9, 6).T,
    "channels last": lambda: torch.randn(2, 9, 3, 4).contiguous(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(1, 9, 1).expand(3, 9, 4),
    "strided": lambda: torch.randn(6, 18, 8)[::2, ::2, ::4],
    "off by one number": lambda: torch.randn(6 * 9 + 1)[1:].view(6, 9),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    x = LAYOUTS[layout]()
    v, o = torch.randn(x.shape), options("all", 1, torch.float32)
    assert_close(cuda.kernels.softmax(x, 1), eager.softmax(x, 1))
    assert_close(cuda.kernels.contract(x, v, 1), eager.contract(x, v, 1))
    assert_close(cuda.kernels.contract(v, x, -1), eager.contract(v, x, -1))
    for target in (torch.rand(x.shape), torch.randint(9, x.select(1, 0).shape)):
        check_cross_entropy(x, target, torch.rand(9), o)
        if layout != "expanded":  # whose entries share memory
            place = torch.empty_strided(x.shape, x.stride()).copy_(x)
            _, M, L, *_ = eager.cross_entropy(Problem(x, target, None, o))
            cuda.kernels.cross_entropy_vjp_(Problem(place, target, None, o), Rows(M, None, M, L))
            assert_close(
                place,
                eager.cross_entropy_vjp(Problem(x, target, None, o), Rows(M, None, M, L)),
            )


def test_a_rows_neighbours_in_memory_are_not_written():
    whole = torch.randn(6, 12)
    before, o = whole.clone(), options("plain", 1, torch.float32)
    x, target = whole[:, :9], torch.randint(9, (6,))
    _, M, L, *_ = cuda.kernels.cross_entropy(Problem(x, target, None, o))
    cuda.kernels.cross_entropy_vjp_(Problem(x, target, None, o), Rows(M, None, M, L))
    assert torch.equal(whole[:, 9:], before[:, 9:])
    assert not torch.equal(whole[:, :9], before[:, :9])


@pytest.mark.parametrize("width", [4, 37, 40])
@pytest.mark.parametrize("classes", [4, 1504, 16_389])
def test_a_gradient_is_written_into_memory_of_any_stride(classes, width):
    o = options("plain", 1, torch.float32)
    x, target = torch.randn(3, classes), torch.randint(classes, (3,))
    _, M, L, *_ = eager.cross_entropy(Problem(x, target, None, o))
    problem, rows = Problem(x, target, None, o), Rows(torch.ones(3), None, M, L)
    memory = torch.full((3, classes + width), 7.0)
    cuda.kernels.cross_entropy_vjp_out(problem, rows, memory[:, :classes])
    assert_close(memory[:, :classes], eager.cross_entropy_vjp(problem, rows))
    assert (memory[:, classes:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [16_385, 16_390, 24_575])
def test_of_rows_that_begin_between_two_vectors_every_number_is_written_once(classes, dtype):
    """Whole vectors and a row's ends: beside the rows before and behind, which stay as they are."""
    rows, edge = 19, 3  # of every remainder of a vector of eight
    memory = torch.randn((rows + 2) * classes).to(dtype)
    before, o = memory.clone(), options("plain", 1, dtype)
    x = memory[classes:-classes].view(rows, classes)
    x[edge, -1] = NAN  # which the next row's first vector has in it
    target = torch.randint(classes, (rows,))
    _, M, L, *_ = eager.cross_entropy(Problem(x, target, None, o))
    problem, given = Problem(x, target, None, o), Rows(torch.ones_like(M), None, M, L)
    want = eager.cross_entropy_vjp(problem, given)
    assert want.isnan().any(1).nonzero().flatten().tolist() == [edge]
    assert_close(cuda.kernels.cross_entropy_vjp(problem, given), want)
    cuda.kernels.cross_entropy_vjp_(problem, given)
    assert_close(x, want)
    assert torch.equal(memory[:classes], before[:classes])
    assert torch.equal(memory[-classes:], before[-classes:])


@pytest.mark.parametrize("path", [*PATHS, "in two tiles", "side by side in two tiles"])
def test_a_rows_bits_are_the_same_in_every_batch_and_every_run(path):
    (outer, *rest), o = SHAPES[path][0], options("all", 1, torch.float32)
    x, target, weight = case((outer, *rest), 1, o, torch.float32, False, True)

    def results(x: Tensor, target: Tensor) -> list[Tensor]:
        loss, M, L, prediction, entropy = cuda.kernels.cross_entropy(Problem(x, target, weight, o))
        d = cuda.kernels.cross_entropy_vjp(Problem(x, target, weight, o), Rows(loss, None, M, L))
        p = cuda.kernels.softmax(x, 1)
        return [loss, M, L, prediction, entropy, d, p, cuda.kernels.contract(p, x, 1)]

    together = results(x, target)
    assert all(map(torch.equal, together, results(x, target)))
    for row in range(min(outer, 5)):
        alone = results(x[row : row + 1], target[row : row + 1])
        assert all(map(torch.equal, alone, (r[row : row + 1] for r in together)))


IN_CHUNKS = {
    "rows": ((5, 40_000), 1),
    "odd rows": ((4, 20_001), 1),
    "rows side by side": ((2, 300, 48), 1),
}


@pytest.mark.parametrize("name", IN_CHUNKS)
def test_long_rows_in_turns(monkeypatch, name):
    """Whether a chunk is mapped soon after its sums or late, no bit is another.

    Every program draws a number, and every chunk's sums are announced once.
    """
    from custom_ops.kernels.cuda import contract, softmax, turns

    counted: list[tuple[Tensor, int]] = []

    def counters(like, t, rows) -> Tensor:
        counted.append((turns.counters(like, t, rows), t.chunks))
        return counted[-1][0]

    for module in (contract, softmax):
        monkeypatch.setattr(module, "counters", counters)

    shape, dim = IN_CHUNKS[name]
    z, v = torch.randn(shape), torch.randn(shape)
    p = eager.softmax(z, dim)
    wants = [p, eager.log_softmax(z, dim), eager.contract(p, v, dim)]
    found = []
    for ahead in (0, 200_000, 2**40):
        monkeypatch.setattr(turns, "AHEAD", ahead)
        k = cuda.kernels
        found.append([k.softmax(z, dim), k.log_softmax(z, dim), k.contract(p, v, dim)])
        assert all(map(torch.equal, found[0], found[-1]))
    for counts, chunks in counted:
        assert counts[0] > chunks * (len(counts) - 1)
        assert counts[1:].tolist() == [chunks] * (len(counts) - 1)
    for got, want in zip(found[0], wants, strict=True):
        assert_close(got, want)


@given(
    rows=st.integers(1, 500),
    classes=st.integers(40_000, 300_000),
    inner=st.sampled_from([1, 7, 64]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    op=st.sampled_from([(1, CHUNK), (2, CHUNK // 2)]),
    ahead=st.integers(0, 2**25),
)
def test_a_program_waits_for_programs_before_it_alone(rows, classes, inner, dtype, op, ahead):
    """And every chunk is mapped once."""
    from custom_ops.kernels.cuda import turns

    t = tiles(classes, inner, dtype, *op)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "AHEAD", ahead)
        lead = turns.lead(t, rows, dtype, op[0])
    chunks = t.programs(rows)
    assert 0 < lead <= chunks
    for number in {lead, (lead + chunks) // 2, chunks + lead - 1}:
        group = (number - lead) // t.chunks
        assert group * t.rows < rows
        assert (group + 1) * t.chunks - 1 < min(number, chunks)


# The Hessian product of the last layer.

HVP_OPTIONS = ("plain", "smoothing", "full smoothing", "z-loss")


def check_hvp(z: Tensor, target: Tensor, weight: Tensor | None, with_q: bool, o: Options) -> None:
    """Beside autograd through the float64 formulas of a row."""
    assert cuda.takes(z, target, weight)
    _, M, L, *_ = eager.cross_entropy(Problem(z, target, weight, o))
    u, g = torch.randn_like(z), torch.randn_like(M)
    q = torch.randn_like(M) if with_q else None
    ignored = torch.zeros_like(M, dtype=torch.bool)
    if not target.is_floating_point():
        ignored = target == o.ignore_index
    exact = [t.double().requires_grad_() for t in (z, g, M if q is None else q)]
    of_row = dataclasses.replace(o, dtype=torch.float64)
    soft = target.double() if target.is_floating_point() else target
    r = Row.of(exact[0], soft, None if weight is None else weight.double(), of_row)
    dz = r.gradient(r.upstream(exact[1], exact[2] if with_q else None, None))
    wants = torch.autograd.grad(dz, exact, u.double(), allow_unused=True)
    place, change = z.clone(), u.clone()
    place[ignored] = change[ignored] = NAN  # which nobody looks at
    versions = place._version, change._version
    d_g, d_h = cuda.kernels.cross_entropy_hvp_(
        Problem(place, target, weight, o), change, Rows(g, q, M, L)
    )
    assert (place._version, change._version) > versions
    # results of several terms, each with the rounding of M, L or of a logit
    half = z.dtype == torch.bfloat16
    tolerance = {"rtol": 1.6e-2, "atol": 1e-2} if half else {"rtol": 1e-5, "atol": 1e-5}
    pairs = zip((place, change, d_g, d_h), (dz, *wants), strict=True)
    for got, want in pairs:
        if want is not None:
            torch.testing.assert_close(got.double(), want.detach().double(), **tolerance)
    for nothing in (place, change, d_g, d_h):
        assert (nothing[ignored] == 0).all()


@pytest.mark.parametrize("path", ["ten classes", "a thousand", "chunks"])
@pytest.mark.parametrize("name", HVP_OPTIONS)
def test_the_hessian_product_is_the_derivative_of_the_gradient(name, path):
    shape, o = SHAPES[path][0], options(name, 1, torch.float32)
    for soft, weighted, h in itertools.product((False, True), repeat=3):
        check_hvp(*case(shape, 1, o, torch.float32, soft, weighted), h, o)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("path", ["ten classes", "chunks"])
def test_the_hessian_product_in_every_dtype(path, dtype):
    for soft in (False, True):
        o = dataclasses.replace(options("z-loss", 1, dtype), label_smoothing=0.2)
        check_hvp(*case(SHAPES[path][0], 1, o, dtype, soft, True), True, o)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_the_hessian_product_of_nothing(shape):
    o, z = options("plain", 1, torch.float32), torch.empty(shape)
    rows = torch.ones(shape[0])
    target = torch.full(shape[:1], o.ignore_index)
    found = cuda.kernels.cross_entropy_hvp_(
        Problem(z, target, None, o), z.clone(), Rows(rows, None, rows, rows)
    )
    assert all((t == 0).all() for t in found)


@pytest.mark.parametrize("path", ["ten classes", "chunks"])
def test_a_bad_labels_hessian_product_is_nan_and_reads_nothing_outside(path):
    shape, o = SHAPES[path][0], options("plain", 1, torch.float32)
    z, _, weight = case(shape, 1, o, torch.float32, False, True)
    target = torch.zeros(shape[0], dtype=torch.int64)
    target[1] = 2**40
    ones = torch.ones(shape[0])
    place, change = z.clone(), torch.randn(shape)
    cuda.kernels.cross_entropy_hvp_(
        Problem(place, target, weight, o), change, Rows(ones, None, ones, ones)
    )
    for written in (place, change):
        assert written.isnan().all(1).nonzero().flatten().tolist() == [1]
        assert written.isnan().any(1).nonzero().flatten().tolist() == [1]


# Registration.


def operator_arguments(shape, dim, dtype, soft) -> dict[str, tuple]:
    o = options("all", dim, dtype)
    x, target, weight = case(shape, dim, o, dtype, soft, True)
    _, M, L, *_ = eager.cross_entropy(Problem(x, target, weight, o))
    vjp = (x, target, weight, torch.randn_like(M), torch.randn_like(M), M, L, *o.flat())
    plain = dataclasses.replace(o, softcap=None, logit_scale=1.0)
    hvp = (x, target, weight, x.cos(), M.cos(), M.sin(), M, L, *plain.flat())
    return {
        "softmax": (x, dim, True),
        "total": (M,),
        **dict.fromkeys(("contract", "log_softmax_vjp", "log_softmax_jvp"), (x, x.cos(), dim)),
        "cross_entropy": (x, target, weight, *o.flat(), True),
        "cross_entropy_vjp": vjp,
        "cross_entropy_vjp_": vjp,
        **({"cross_entropy_hvp_": hvp} if x.dim() == 2 and dim == 1 else {}),
    }


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["ten classes", "classes in the middle", "classes first"])
def test_opcheck(shape, dtype, soft):
    for name, arguments in operator_arguments(*SHAPES[shape], dtype, soft).items():
        opcheck(getattr(ops, name).default, arguments)


def test_every_operator_is_checked():
    schemas = {str(s.name) for s in torch._C._jit_get_all_schemas()}
    registered = {s.partition("::")[2] for s in schemas if s.startswith("custom_ops_cuda::")}
    assert registered == set(operator_arguments((3, 4), 1, torch.float32, False))


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def step(x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    loss = custom_ops.cross_entropy(x, target)
    return loss, *torch.autograd.grad(loss, x)


def test_who_watches_the_operators_sees_them():
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with Watching() as mode:
        seen = step(x, target)
    names = {f"custom_ops_cuda.{name}.default" for name in ("cross_entropy", "cross_entropy_vjp")}
    assert names <= set(mode.seen)
    assert_close(seen, step(x, target))
    graph = make_fx(step)(x, target)
    assert names <= {str(node.target) for node in graph.graph.nodes}


def test_compile_keeps_the_operators():
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(module.code)
        return module

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    compiler = aot_autograd(fw_compiler=lambda m, i: make_boxed_func(backend(m, i)))
    x, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    loss = torch.compile(custom_ops.cross_entropy, fullgraph=True, backend=compiler)(x, target)
    (d,) = torch.autograd.grad(loss, x)
    assert_close((loss.detach(), d), tuple(t.detach() for t in step(x, target)))
    assert [("custom_ops_cuda.cross_entropy" in code) for code in graphs] == [True, True]


# Bad labels: the device cannot raise, so the next call does.


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel on another device gets: labels that nobody has looked at."""
    from custom_ops.kernels.cuda import cross_entropy, record

    monkeypatch.setattr(cross_entropy, "checked_labels", lambda target, *_: target)
    monkeypatch.setattr(record, "_records", {})


LABELS = torch.tensor([0, 10**12, -7, -100])


@pytest.mark.parametrize("classes", [5, 40_000])
def test_a_bad_label_makes_its_row_nan_and_reads_nothing_outside(unchecked, classes):
    x, w, o = torch.randn(4, classes), torch.rand(classes), options("all", 1, torch.float32)
    loss, M, L, *_ = cuda.kernels.cross_entropy(Problem(x, LABELS, w, o))
    assert loss.isnan().tolist() == [False, True, True, False]
    d = cuda.kernels.cross_entropy_vjp(Problem(x, LABELS, w, o), Rows(torch.ones(4), None, M, L))
    assert d.isnan().all(1).tolist() == [False, True, True, False]
    assert d.isnan().any(1).tolist() == [False, True, True, False]
    assert (d[3] == 0).all()


@pytest.mark.parametrize("classes", [5, 40_000])
def test_the_next_call_raises_and_the_one_after_does_not(unchecked, classes):
    x, good = torch.randn(4, classes), torch.tensor([0, 1, 2, -100])
    o = options("plain", 1, torch.float32)
    cuda.kernels.cross_entropy(Problem(x, LABELS, None, o))
    says = (
        rf"target\[1\] is 1000000000000, out of range for {classes} classes "
        rf"\(0 to {classes - 1}, or ignore_index=-100\), in an earlier call of cross_entropy"
    )
    with pytest.raises(IndexError, match=says):
        cuda.kernels.cross_entropy(Problem(x, good, None, o))
    loss, *_ = cuda.kernels.cross_entropy(Problem(x, good, None, o))
    assert loss.isfinite().all()
    cuda.kernels.cross_entropy(Problem(x, LABELS, None, o))  # and the record is good for another
    with pytest.raises(IndexError, match=says):
        cuda.kernels.cross_entropy(Problem(x, good, None, o))


def test_good_and_ignored_labels_leave_no_record(unchecked):
    o = options("plain", 1, torch.float32)
    for target in (torch.tensor([0, 4, -100, -100]), torch.full((4,), -100)):
        for _ in range(2):
            cuda.kernels.cross_entropy(Problem(torch.randn(4, 5), target, None, o))


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ((8, 1000, 1, 1000), (8, 1, False)),
        ((8, 1000, 1, 1004), (4, 1, False)),
        ((8, 50_257, 1, 50_257), (1, 1, False)),
        ((8, 128_256, 1, 128_256), (16, 1, False)),
        ((2 * 49, 10, 49, 490), (1, 1, False)),
        ((2 * 196, 10, 196, 1960), (1, 4, False)),
        ((2**31 - 2048, 3, 1, 3), (1, 1, False)),
        ((2**31 - 2047, 3, 1, 3), (1, 1, True)),
    ],
)
def test_what_sizes_are_multiples_of(sizes, want):
    from custom_ops.kernels.cuda.layout import units

    assert units(*sizes) == want


def test_only_the_first_bad_label_is_kept_and_pixels_are_counted_through(unchecked):
    x, target = torch.randn(300, 5, 2), torch.zeros(300, 2, dtype=torch.int32)
    target[70, 1], target[200, 0] = 5, -1
    o = options("plain", 1, torch.float32)
    cuda.kernels.cross_entropy(Problem(x, target, None, o))
    with pytest.raises(IndexError, match=r"target.flatten\(\)\[141\] is 5, out of range"):
        cuda.kernels.cross_entropy(Problem(x, target.zero_(), None, o))


@pytest.mark.parametrize("length", [1, 3000])
def test_labels_that_are_taken_in_blocks_are_named_by_their_place_among_all(unchecked, length):
    from custom_ops.kernels.cuda.labels import report

    target = torch.full((length, 2), -100)
    report(target, 7, -100)
    report(target, 7, -100)  # nothing was wrong
    target[-1, 1] = 7
    report(target, 7, -100)
    o, position = options("plain", 1, torch.float32), 2 * length - 1
    with pytest.raises(IndexError, match=rf"target.flatten\(\)\[{position}\] is 7, out of range"):
        cuda.kernels.cross_entropy(
            Problem(torch.randn(1, 7), torch.zeros(1, dtype=torch.int64), None, o)
        )


@pytest.mark.parametrize("rows", [None, 2])
def test_the_last_layer_tells_a_bad_label_once_and_by_its_place(unchecked, monkeypatch, rows):
    from custom_ops.kernels.cuda import labels

    def looked_at(target: Tensor, *numbers: int) -> Tensor:
        labels.report(target, *numbers)  # and on the CPU would raise at once
        return target

    monkeypatch.setattr(sys.modules["custom_ops.linear_cross_entropy"], "checked_labels", looked_at)
    x, W = torch.randn(7, 3), torch.randn(5, 3, requires_grad=True)
    good = torch.tensor([0, 1, 2, 3, 4, 0, 0])
    bad = good.index_fill(0, torch.tensor([5, 6]), 9)
    assert custom_ops.linear_cross_entropy(x, W, bad, block_rows=rows).isnan()
    with pytest.raises(IndexError, match=r"target\[5\] is 9, out of range for 5 classes"):
        custom_ops.linear_cross_entropy(x, W, good, block_rows=rows)
    assert custom_ops.linear_cross_entropy(x, W, good, block_rows=rows).isfinite()


def test_a_record_that_is_not_whole_yet_is_not_read():
    from custom_ops.kernels.cuda.record import LABEL, READY, Record

    record = Record(torch.device("cpu"))
    record.memory.host[LABEL] = 7
    record.check()
    record.memory.host[READY] = 1
    with pytest.raises(IndexError, match=r"target is 7"):
        record.check()
    record.check()
