"""inplace_backward=True: the gradient in the logits' place, and an error where they are missed."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from custom_ops import CrossEntropyLoss, cross_entropy
from training.measurement import peak_bytes

pytestmark = pytest.mark.usefixtures("backend")

N, C = 6, 40
TARGET = torch.randint(C, (N,), generator=torch.Generator().manual_seed(0))
RUNS_OVER = "modified by an inplace operation"


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A leaf, and logits that were computed from it."""
    leaf = torch.randn(*(shape or (N, C)), dtype=dtype, requires_grad=True)
    return leaf, leaf * 1


OPTIONS = {
    "plain": {},
    "none": {"reduction": "none"},
    "weights, smoothing": {"label_smoothing": 0.1, "weight": torch.rand(C)},
    "everything": {
        "z_loss": 0.1,
        "softcap": 3.0,
        "logit_scale": 2.0,
        "ignore_index": int(TARGET[1]),
    },
    "dtype": {"dtype": torch.float64},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_the_gradient_is_the_same_and_lies_in_the_logits(options, dtype: torch.dtype):
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    leaf, z = logits(dtype=dtype)
    g = torch.rand(N) if options.get("reduction") == "none" else torch.tensor(1.0)
    loss = cross_entropy(z, TARGET, **options)
    (expected,) = torch.autograd.grad(loss, leaf, g.to(loss.dtype))
    loss = cross_entropy(z, TARGET, **options, inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, z, g.to(loss.dtype))
    assert torch.equal(gradient, expected)
    assert gradient.data_ptr() == z.data_ptr()
    assert not gradient.requires_grad


@pytest.mark.parametrize(
    "cut",
    [
        lambda z: z[:, : C - 3],
        lambda z: z.T.contiguous().T,
        lambda z: z.reshape(2, C, 3),
        lambda z: z.reshape(1, 2, 3, C).permute(0, 3, 1, 2),
        lambda z: z[::2],
        lambda z: z[0],
    ],
    ids=["columns", "transposed", "classes in the middle", "channels last", "rows", "one row"],
)
def test_every_layout(cut):
    _, z = logits()
    z, whole = cut(z), z
    target = torch.randint(C - 3, (*z.shape[:1], *z.shape[2:]) if z.dim() > 1 else ())
    target = target % z.shape[1 if z.dim() > 1 else 0]
    (expected,) = torch.autograd.grad(cross_entropy(z, target), z, retain_graph=True)
    outside = whole.detach().clone()
    (gradient,) = torch.autograd.grad(cross_entropy(z, target, inplace_backward=True), z)
    assert torch.equal(gradient, expected)
    assert gradient.data_ptr() == z.data_ptr()
    assert torch.equal(z, expected)
    if z.shape == (N, C - 3):
        assert torch.equal(whole[:, C - 3 :], outside[:, C - 3 :])


def test_through_a_model_with_stats():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(5, C), torch.randn(N, 5)
    cross_entropy(layer(x), TARGET).backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    loss, stats = CrossEntropyLoss(inplace_backward=True, return_stats=True)(layer(x), TARGET)
    (loss + 0 * stats.lse.sum()).backward()
    for p, gradient in zip(layer.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)


def test_a_later_use_of_the_logits_in_autograd_raises():
    leaf, z = logits()
    other = (z * z).sum()
    torch.autograd.grad(cross_entropy(z, TARGET, inplace_backward=True), z)
    with pytest.raises(RuntimeError, match=RUNS_OVER):
        torch.autograd.grad(other, leaf)


def test_two_losses_of_the_same_logits_raise():
    leaf, z = logits()
    loss = sum(cross_entropy(z, TARGET, inplace_backward=True) for _ in range(2))
    with pytest.raises(RuntimeError, match=RUNS_OVER):
        torch.autograd.grad(loss, leaf)


def test_a_second_backward_raises():
    leaf, z = logits()
    loss = cross_entropy(z, TARGET, inplace_backward=True)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match=RUNS_OVER):
        torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "return_stats": True}])
def test_a_differentiated_backward_raises_and_leaves_the_logits(options):
    _, z = logits()
    before = z.detach().clone()
    result = cross_entropy(z, TARGET, inplace_backward=True, **options)
    loss = result[0] if isinstance(result, tuple) else result
    with pytest.raises(RuntimeError, match=r"inplace_backward=True.*without create_graph"):
        torch.autograd.grad(loss, z, create_graph=True)
    assert torch.equal(z, before)


def test_a_batch_of_gradients_raises():
    _, z = logits()
    loss = cross_entropy(z, TARGET, reduction="none", inplace_backward=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, z, torch.eye(N), is_grads_batched=True)


@pytest.mark.parametrize(
    ("input", "says"),
    [
        (torch.randn(N, C, requires_grad=True), "input is a leaf that requires grad"),
        (torch.randn(N * C, requires_grad=True).view(N, C), "input is a view of a leaf"),
        ((torch.randn(1, C, requires_grad=True) * 1).expand(N, C), "share memory"),
    ],
    ids=["leaf", "view of a leaf", "expanded"],
)
def test_what_cannot_hold_its_gradient_is_refused(input: Tensor, says: str):
    with pytest.raises(RuntimeError, match=says):
        cross_entropy(input, TARGET, inplace_backward=True)


def test_nothing_is_refused_or_written_where_there_is_no_backward():
    z = torch.randn(N, C)
    before = z.clone()
    assert torch.equal(cross_entropy(z, TARGET, inplace_backward=True), cross_entropy(z, TARGET))
    with torch.no_grad():
        cross_entropy(z.requires_grad_(), TARGET, inplace_backward=True)
    assert torch.equal(z, before)


def test_transforms_and_compile_keep_the_logits_and_all_derivatives():
    z, v = torch.randn(N, C, dtype=torch.float64), torch.randn(N, C, dtype=torch.float64)
    before = z.clone()

    def f(x: Tensor) -> Tensor:
        return cross_entropy(x, TARGET, inplace_backward=True)

    expected = torch.func.grad(lambda x: cross_entropy(x, TARGET))(z)
    assert torch.equal(torch.func.grad(f)(z), expected)
    hvp = torch.func.jvp(torch.func.grad(f), (z,), (v,))[1]
    reference = torch.func.hessian(lambda x: torch.nn.functional.cross_entropy(x, TARGET))(z)
    torch.testing.assert_close(hvp, torch.einsum("ijkl,kl->ij", reference, v))
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(z, v))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, (expected * v).sum())
    leaf = z.clone().requires_grad_()
    compiled = torch.compile(lambda x: f(x * 1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)
    assert torch.equal(z, before)


def test_checkpoint_recomputes_what_the_backward_wrote_over():
    leaf, _ = logits()

    def block(x: Tensor) -> Tensor:
        return cross_entropy(x * 1, TARGET, inplace_backward=True)

    for reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(block, leaf, use_reentrant=reentrant)
        (gradient,) = torch.autograd.grad(loss, leaf) if not reentrant else (None,)
        if reentrant:
            loss.backward()
            gradient = leaf.grad
        (expected,) = torch.autograd.grad(cross_entropy(leaf, TARGET), leaf)
        assert torch.equal(gradient, expected)


def test_the_backward_allocates_no_second_logits(backend: str):
    if backend == "eager":
        pytest.skip("the eager kernels compute the gradient apart and copy it")
    rows, classes = 64, 50_000
    target = torch.randint(classes, (rows,))
    z = torch.randn(rows, classes, requires_grad=True) * 1

    def work() -> None:
        source = z.detach().requires_grad_()
        cross_entropy(Identity.apply(source), target, inplace_backward=True).backward()

    assert peak_bytes(work, torch.device("cpu")) < 2**20


class Identity(torch.autograd.Function):
    """A non-leaf in the memory of a leaf."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx, g: Tensor) -> None:
        return None


OVERLAPS = {
    "unfolded": lambda x: x.flatten().unfold(0, C, 1),
    "unfolded, rows apart": lambda x: x.flatten().unfold(0, C, C - 1),
    "expanded": lambda x: x[:1].expand(N, C),
    "strided over itself": lambda x: x.as_strided((4, C), (2, 3)),
}
APART = {
    "a column cut": lambda x: x[:, 3:],
    "every other row": lambda x: x[::2],
    "transposed": lambda x: x.t(),
    "unfolded side by side": lambda x: x.flatten().unfold(0, C, C),
}


@pytest.mark.parametrize("view", OVERLAPS)
def test_logits_that_share_memory_are_refused(view: str):
    z = OVERLAPS[view](logits()[1])
    with pytest.raises(ValueError, match="entries of input share memory"):
        cross_entropy(z, torch.zeros(len(z), dtype=torch.int64), inplace_backward=True)


@pytest.mark.parametrize("view", APART)
def test_logits_that_lie_apart_hold_their_gradient(view: str):
    leaf, z = logits()
    z = APART[view](z)
    target = torch.zeros(len(z), dtype=torch.int64)
    (want,) = torch.autograd.grad(cross_entropy(APART[view](leaf * 1), target), leaf)
    cross_entropy(z, target, inplace_backward=True).backward()
    torch.testing.assert_close(leaf.grad, want)
