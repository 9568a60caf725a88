"""The C++ autograd node with the Triton kernels behind it, in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from custom_ops import cross_entropy
from custom_ops.kernels import cpu, cuda

pytestmark = [
    pytest.mark.skipif(cuda.library is None, reason="TRITON_INTERPRET=1 is not set"),
    pytest.mark.skipif(cpu.library is None, reason=f"no C++ node: {cpu.missing}"),
]


@pytest.fixture(autouse=True)
def no_cpp_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: of the C++ library only the node answers."""
    monkeypatch.setattr(cpu, "takes", lambda *_: False)


LABELS = torch.tensor([3, 0, 2, -100, 8, 1])
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss and cap": {"z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5},
    "weights": {"weight": torch.rand(9) + 0.5, "label_smoothing": 0.2},
    "normalizer": {"normalizer": 3.5},
    "in place": {"inplace_backward": True},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", ["labels", "labels of int32", "probabilities", "pixels"])
def test_the_node_and_the_function_give_the_same_bits(
    monkeypatch, kind: str, options: dict, reduction: str, dtype: torch.dtype
):
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    if reduction != "mean":
        options.pop("normalizer", None)
    shape = (2, 9, 3) if kind == "pixels" else (6, 9)
    target = LABELS.view(3, 2).T if kind == "pixels" else LABELS
    if kind == "labels of int32":
        target = LABELS.int()
    if kind == "probabilities":
        target = torch.rand(shape, dtype=dtype)
    x, u = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)

    def run() -> tuple[list[Tensor], str]:
        leaf = x.clone().requires_grad_()
        z = leaf * 1
        loss = cross_entropy(z, target, reduction=reduction, **options)
        name = loss.grad_fn.name()
        g = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        if "inplace_backward" in options:
            (once,) = torch.autograd.grad(loss, z, g)
            assert once.data_ptr() == z.data_ptr()
            assert z._version == 1
            return [loss, once], name
        (once,) = torch.autograd.grad(loss, leaf, g, retain_graph=True)
        (again,) = torch.autograd.grad(loss, leaf, g, create_graph=True)
        (second,) = torch.autograd.grad(again, leaf, u)
        return [loss, once, again, second], name

    by_node, name = run()
    assert "custom_ops::CrossEntropy" in name
    monkeypatch.setattr(cpu, "library", None)
    by_function, name = run()
    assert "custom_ops::CrossEntropy" not in name
    for a, b in zip(by_node, by_function, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("of", ["loss", "lse", "both", "entropy"])
def test_statistics_are_the_functions_and_their_gradients_too(monkeypatch, of, reduction):
    x, v = torch.randn(6, 9), torch.randn(6)

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        loss, stats = cross_entropy(leaf, LABELS, return_stats=True, reduction=reduction)
        assert ("custom_ops::" in loss.grad_fn.name()) == (cpu.library is not None)
        taken = {"loss": loss, "lse": stats.lse, "entropy": stats.entropy}
        taken["both"] = loss + stats.lse
        (d,) = torch.autograd.grad((taken[of] * v).sum(), leaf)
        return [loss, *stats, d]

    by_node = run()
    monkeypatch.setattr(cpu, "library", None)
    assert all(map(torch.equal, by_node, run()))


@pytest.mark.parametrize("weight", [None, torch.rand(9) + 0.5])
def test_rows_that_are_all_ignored(weight):
    leaf = torch.randn(3, 9).requires_grad_()
    target = torch.full((3,), -100)
    loss = cross_entropy(leaf, target, weight)
    assert loss.isnan()
    assert "custom_ops::CrossEntropy" in loss.grad_fn.name()
    (d,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(d, torch.zeros(3, 9))


def test_a_bad_label_is_named():
    target = LABELS.clone()
    target[4] = 9
    with pytest.raises(IndexError, match=r"target\[4\] is 9, out of range for 9 classes"):
        cross_entropy(torch.randn(6, 9), target)


@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 8192, 20_000])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0])])
def test_means_of_few_rows_are_one_programs(rows, weight):
    x, target = torch.randn(rows, 2), torch.randint(2, (rows,))
    target[rows // 2] = -100 if rows > 1 else 0
    got = cross_entropy(x.requires_grad_(), target, weight)
    assert "custom_ops::CrossEntropy" in got.grad_fn.name()
    want = F.cross_entropy(x.double(), target, None if weight is None else weight.double())
    torch.testing.assert_close(got, want.float())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_of_any_length_takes_two_launches(monkeypatch, reduction):
    from custom_ops.kernels.cuda import cross_entropy as kernels
    from custom_ops.kernels.cuda import reduction as finishing

    launched = []
    for module in (kernels, finishing):

        def keep(kernel, *args, launch=module.launch):
            launched.append(kernel)
            launch(kernel, *args)

        monkeypatch.setattr(module, "launch", keep)
    x, target = torch.randn(70_000, 2), torch.randint(2, (70_000,))
    loss = cross_entropy(x.requires_grad_(), target, reduction=reduction)
    assert "custom_ops::CrossEntropy" in loss.grad_fn.name()
    assert len(launched) == 2
    torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction=reduction))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_may_be_written_to(reduction, dtype):
    """It has memory of its own: it is no view of what is kept beside it."""
    x, target = torch.randn(4, 3, dtype=dtype, requires_grad=True), torch.tensor([0, 1, 2, 0])
    want = cross_entropy(x, target, reduction=reduction).detach() / 2
    loss = cross_entropy(x, target, reduction=reduction)
    loss /= 2
    torch.testing.assert_close(loss.detach(), want)
    loss.sum().backward()
    (twice,) = torch.autograd.grad(cross_entropy(x, target, reduction=reduction).sum(), x)
    torch.testing.assert_close(2 * x.grad, twice)
    other = cross_entropy(x, target, reduction=reduction)
    other.detach().mul_(2)
    torch.testing.assert_close(other.detach(), 4 * want)
    other.detach_()


def test_a_sum_is_of_all_numbers_in_whatever_order_they_lie():
    from custom_ops.kernels.cuda.reduction import total

    for x in (torch.randn(5, 7), torch.randn(5, 7).T, torch.randn(3, 9000), torch.randn(())):
        torch.testing.assert_close(total(x), x.double().sum().float())
