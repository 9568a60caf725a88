"""What torch's chunked linear_cross_entropy gets wrong, beside ours (docs/differences.md)."""

import pytest
import torch
import torch.nn.functional as F
from conftest import differentiable
from torch.func import jvp
from torch.testing import assert_close

from custom_ops import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("backend")

if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
    pytest.skip("this torch has no linear_cross_entropy in chunks", allow_module_level=True)

CHUNKS = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, allow_retain_graph=True)


def chunked(x, W, t, **options):
    return F.linear_cross_entropy(x, W, t, options=CHUNKS, **options)


def plain(x, W, t):
    return F.cross_entropy(F.linear(x, W), t)


@pytest.fixture
def tensors():
    return torch.randn(6, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 4, 0])


def second(loss, x, W, t):
    """The gradient of the sum of squares of the gradient of W, as a penalty on it would take it."""
    x, W = differentiable(x, W)
    (g,) = torch.autograd.grad(loss(x, W, t), W, create_graph=True)
    penalty = (g**2).sum() + W.sum() * 0  # attached to W in any case
    return torch.autograd.grad(penalty, W)[0]


def test_the_second_derivative_is_exact_where_the_chunks_lose_it(tensors):
    want = second(plain, *tensors)
    assert_close(second(linear_cross_entropy, *tensors), want)
    try:
        lost = second(chunked, *tensors)
    except RuntimeError:
        return  # a torch that says so
    assert (lost - want).norm() > 0.5 * want.norm()


def test_the_tangent_is_exact_where_the_chunks_answer_zero(tensors):
    x, W, t = tensors
    v = torch.ones_like(W)
    want = jvp(lambda W: plain(x, W, t), (W,), (v,))[1]
    assert_close(jvp(lambda W: linear_cross_entropy(x, W, t), (W,), (v,))[1], want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(W, v)
        assert_close(
            torch.autograd.forward_ad.unpack_dual(linear_cross_entropy(x, dual, t)).tangent, want
        )
        try:
            zero = torch.autograd.forward_ad.unpack_dual(chunked(x, dual, t)).tangent
        except (RuntimeError, NotImplementedError):
            return  # a torch that says so
        assert zero is None or zero == 0


def test_the_gradient_of_a_bfloat16_weight_does_not_lose_digits_with_the_number_of_chunks():
    x, W, t = torch.randn(512, 8).bfloat16(), torch.randn(20, 8).bfloat16(), torch.arange(512) % 20

    def error(loss, *options):
        (leaf,) = differentiable(W)
        exact = differentiable(W.double())[0]
        (g,) = torch.autograd.grad(loss(x, leaf, t, *options), leaf)
        (want,) = torch.autograd.grad(plain(x.double(), exact, t), exact)
        return ((g.double() - want).norm() / want.norm()).item()

    def ours(x, W, t):
        return linear_cross_entropy(x, W, t, block_rows=2)

    assert error(ours) <= error(plain)
    compact = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=2, allow_retain_graph=True, acc_policy="compact"
    )
    assert error(lambda x, W, t: F.linear_cross_entropy(x, W, t, options=compact)) > 3 * error(ours)


@pytest.mark.parametrize("frozen", [0, 1])
def test_training_one_side_alone_gives_its_gradient(tensors, frozen):
    """In a peer, a frozen input leaves `weight.grad` None."""
    x, W, t = tensors
    pair = [x, W]
    leaf = pair[1 - frozen] = pair[1 - frozen].clone().requires_grad_()
    linear_cross_entropy(*pair, t).backward()
    copy = pair[1 - frozen] = leaf.detach().clone().requires_grad_()
    plain(*pair, t).backward()
    assert_close(leaf.grad, copy.grad)
