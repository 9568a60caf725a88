"""linear_cross_entropy under torch.func, compile, export, checkpoint and on fake tensors."""

import pytest
import torch
import torch.nn.functional as F
from conftest import differentiable
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from custom_ops import LinearCrossEntropyLoss, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("backend")

D = torch.double
LABELS = torch.tensor([1, -100, 3, 0])
TRANSFORMS = {
    "grad": lambda f: grad(lambda s: f(s).sin().sum()),
    "vjp": lambda f: lambda s: (lambda y, pull: pull(torch.ones_like(y)))(*vjp(f, s)),
    "jvp": lambda f: lambda s: jvp(f, (s,), (s.cos(),)),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda f: hessian(lambda s: f(s).sin().sum()),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(lambda s: f(s).sin().sum())),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(lambda s: f(s).sin().sum())),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(lambda s: f(s).sin().sum())),
    "vmap": vmap,
    "vmap(grad)": lambda f: vmap(grad(lambda s: f(s).sin().sum())),
    "grad(vmap)": lambda f: grad(lambda s: vmap(f)(s).sin().sum()),
    "vmap(hessian)": lambda f: vmap(hessian(lambda s: f(s).sin().sum())),
    "jvp(vmap(grad))": lambda f: (
        lambda s: jvp(vmap(grad(lambda s: f(s).sin().sum())), (s,), (s.cos(),))
    ),
}


@pytest.fixture(params=["mean", "none"])
def reduction(request):
    return request.param


@pytest.fixture
def tensors():
    return torch.randn(4, 3, dtype=D), torch.randn(4, 3, dtype=D)


@pytest.mark.parametrize("of", ["input", "linear_weight"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_func_transforms_agree_with_the_builtin(tensors, transform, of, reduction):
    x, W = tensors

    def ours(s):
        pair = (s, W) if of == "input" else (x, s)
        return linear_cross_entropy(
            *pair, LABELS, label_smoothing=0.1, reduction=reduction, block_rows=3
        )

    def theirs(s):
        z = F.linear(s, W) if of == "input" else F.linear(x, s)
        return F.cross_entropy(z, LABELS, label_smoothing=0.1, reduction=reduction)

    at = torch.randn(2, 4, 3, dtype=D) if "vmap" in transform else torch.randn(4, 3, dtype=D)
    assert_close(TRANSFORMS[transform](ours)(at), TRANSFORMS[transform](theirs)(at))


@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (1, 2, 1)]
)
def test_vmap_over_any_subset_of_the_arguments(tensors, in_dims):
    def batched(t, d):
        return t if d is None else torch.stack([t, t.flip(0), t * 1]).movedim(0, d).contiguous()

    arguments = [batched(t, d) for t, d in zip((*tensors, LABELS), in_dims, strict=True)]
    samples = [
        [t if d is None else t.select(d, i) for t, d in zip(arguments, in_dims, strict=True)]
        for i in range(3)
    ]
    gradient = grad(lambda x, W, t: F.cross_entropy(F.linear(x, W), t))
    got = vmap(grad(linear_cross_entropy), in_dims)(*arguments)
    assert_close(got, torch.stack([gradient(*s) for s in samples]))


def test_per_sample_gradients_of_a_module():
    loss = LinearCrossEntropyLoss(3, 4, bias=True).double()
    parameters = dict(loss.named_parameters())
    x, t = torch.randn(5, 3, dtype=D), torch.randint(4, (5,))

    def one(parameters, x, t):
        return functional_call(loss, parameters, (x[None], t[None]))

    got = vmap(grad(one), in_dims=(None, 0, 0))(parameters, x, t)
    for i in range(5):
        W, b = differentiable(loss.linear.weight, loss.linear.bias)
        F.cross_entropy(F.linear(x[i : i + 1], W, b), t[i : i + 1]).backward()
        assert_close(got["linear.weight"][i], W.grad)
        assert_close(got["linear.bias"][i], b.grad)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_graph_is_whole_and_right(tensors, reduction, compiler):
    torch.compiler.reset()

    def f(x, W, b, t):
        return linear_cross_entropy(
            x, W, t, b, reduction=reduction, z_loss=0.1, return_stats=True, block_rows=3
        )

    b = torch.randn(4, dtype=D)
    ours, theirs = differentiable(*tensors, b), differentiable(*tensors, b)
    got, stats = torch.compile(f, fullgraph=True, backend=compiler)(*ours, LABELS)
    want, same = f(*theirs, LABELS)
    assert_close(got, want)
    assert_close(stats.lse, same.lse)
    for a, c in zip(
        torch.autograd.grad(got.sum() + stats.lse.sum(), ours),
        torch.autograd.grad(want.sum() + same.lse.sum(), theirs),
        strict=True,
    ):
        assert_close(a, c)


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "vmap(grad)"])
def test_func_inside_a_compiled_region(tensors, transform):
    torch.compiler.reset()
    x, W = tensors
    f = TRANSFORMS[transform](lambda s: linear_cross_entropy(s, W, LABELS, block_rows=3))
    if transform == "vmap(grad)":
        x = torch.stack([x, x + 1])
    assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_a_bad_label_in_a_compiled_region_is_the_same_index_error(tensors):
    torch.compiler.reset()
    f = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"target\[2\] is 4, out of range for 4 classes"):
        f(*tensors, torch.tensor([0, 1, 4, 2]))


def test_a_double_backward_through_a_compiled_region_is_refused(tensors):
    torch.compiler.reset()
    x, W = differentiable(*tensors)
    loss = torch.compile(linear_cross_entropy, backend="aot_eager")(x, W, LABELS)
    (g,) = torch.autograd.grad(loss, W, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), W)


def test_an_exported_program_takes_any_batch_and_trains():
    module = LinearCrossEntropyLoss(3, 4, bias=True)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        module, (torch.randn(4, 3), LABELS), dynamic_shapes=({0: batch}, {0: batch})
    )
    exported, x, t = program.module(), torch.randn(9, 3), torch.randint(4, (9,))
    got, want = exported(x, t), module(x, t)
    assert_close(got, want)
    got.backward()
    want.backward()
    for a, c in zip(exported.parameters(), module.parameters(), strict=True):
        assert_close(a.grad, c.grad)
    assert not any("addmm" in str(n.target) or "linear.d" in str(n.target)
                   for n in program.graph.nodes)  # fmt: skip


def test_checkpoint_and_saved_tensors_hooks(tensors):
    ours, theirs = differentiable(*tensors), differentiable(*tensors)
    loss = checkpoint(linear_cross_entropy, *ours, LABELS, use_reentrant=False)
    want = F.cross_entropy(F.linear(*theirs), LABELS)
    gradients = torch.autograd.grad(want, theirs)
    for a, c in zip(torch.autograd.grad(loss, ours), gradients, strict=True):
        assert_close(a, c)
    with torch.autograd.graph.save_on_cpu():
        loss = linear_cross_entropy(*ours, LABELS)
    for a, c in zip(torch.autograd.grad(loss, ours), gradients, strict=True):
        assert_close(a, c)


def test_fake_and_meta_tensors_have_the_shapes():
    with FakeTensorMode():
        x, W = torch.randn(6, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
        loss, stats = linear_cross_entropy(
            x, W, torch.zeros(6, dtype=torch.int64), return_stats=True
        )
        assert loss.shape == ()
        assert stats.prediction.shape == (6,)
        assert [g.shape for g in torch.autograd.grad(loss, (x, W))] == [(6, 3), (5, 3)]
    x, W = (torch.randn(s, 3, device="meta", requires_grad=True) for s in (6, 5))
    loss = linear_cross_entropy(x, W, torch.zeros(6, dtype=torch.int64, device="meta"))
    assert [g.shape for g in torch.autograd.grad(loss, (x, W))] == [(6, 3), (5, 3)]


def test_a_custom_operator_passes_torchs_opcheck(tensors):
    x, W = (s.float() for s in tensors)
    flat = 1, torch.float32, -100, [0.1, 0.2, 1.0, 0.0]
    op = torch.ops.custom_ops.linear_cross_entropy
    for wanted in ([False] * 3, [True] * 3):
        torch.library.opcheck(
            op, (x, W, torch.randn(4), LABELS, None, *flat, True, True, wanted, 3)
        )
    leaves = differentiable(x, W)
    torch.library.opcheck(op, (*leaves, None, LABELS, None, *flat, False, True, [False] * 3, None))
    rows = [torch.randn(4) for _ in range(5)]
    torch.library.opcheck(
        torch.ops.custom_ops.linear_cross_entropy_vjp,
        (x, W, None, LABELS, None, *rows, *flat, False, [True, True, False], None, 100),
    )
