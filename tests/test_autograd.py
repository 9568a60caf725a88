"""What users do around an op: graphs kept, changed, checkpointed, hooked and threaded."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import custom_ops
from custom_ops import cross_entropy
from custom_ops.testing import battery

pytestmark = pytest.mark.usefixtures("backend")

TARGET = torch.tensor([1, -100, 3, 0])
OPS = {
    "softmax": lambda x: custom_ops.softmax(x, 1),
    "log_softmax": lambda x: custom_ops.log_softmax(x, 1),
    "cross_entropy": lambda x: cross_entropy(x, TARGET, reduction="none", z_loss=0.1),
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


@pytest.fixture
def x():
    return torch.randn(4, 5, requires_grad=True)


@battery(
    lambda g: (torch.randn(4, 5, generator=g),),
    only=["reuse", "surroundings", "two runs", "nothing kept"],
    skip=["deepcopy", "meta tensors", "make_fx"],
)
def test_surroundings(op):
    return op


def same_bits(a, b):
    assert_close(a, b, rtol=0, atol=0)


def test_backward_twice_without_retaining_is_torchs_error(op, x):
    y = op(x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_the_number_of_threads_changes_no_bit(op):
    x = torch.randn(4, 20_000, requires_grad=True)
    runs = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = op(x)
        runs.append((y, *torch.autograd.grad(y.sum(), x)))
    torch.set_num_threads(before)
    same_bits(*runs)


def test_in_place_change_of_the_logits_is_noticed(x):
    z = x * 1
    loss = cross_entropy(z, TARGET)
    z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("changed", ["target", "weight", "probabilities"])
def test_in_place_change_of_another_saved_tensor_is_noticed(x, changed):
    target, weight = TARGET.clone(), torch.ones(5, dtype=torch.float32)
    if changed == "probabilities":
        target = torch.rand(4, 5)
    loss = cross_entropy(x, target, weight)
    (weight if changed == "weight" else target).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_in_place_change_of_the_output_is_noticed(x, name):
    y = OPS[name](x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_anomaly_mode_runs_and_names_a_nan(op, x):
    with torch.autograd.detect_anomaly(check_nan=True):
        op(x).sum().backward()
        bad = x.detach().clone().requires_grad_()
        with pytest.raises(RuntimeError, match="returned nan values"):
            op(bad * float("nan")).sum().backward()


def test_a_frozen_input_gives_a_result_without_a_graph(op):
    assert not op(torch.randn(4, 5)).requires_grad


def test_only_one_of_the_outputs_is_used(x):
    loss, stats = cross_entropy(x, TARGET, return_stats=True)
    (d,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert_close(d, torch.autograd.grad(F.cross_entropy(x, TARGET), x)[0])
    (d,) = torch.autograd.grad(stats.lse.sum(), x)
    assert_close(d, torch.autograd.grad((x.logsumexp(1) * (TARGET != -100)).sum(), x)[0])


def test_gradient_of_a_frozen_input_is_not_computed_for_the_weight_alone():
    weight = torch.rand(5, requires_grad=True)
    loss = cross_entropy(torch.randn(4, 5), TARGET, weight)
    (d,) = torch.autograd.grad(loss, weight)
    assert d.shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_mode_keeps_the_dtype(op, dtype):
    import torch.autograd.forward_ad as fwd

    x, v = torch.randn(4, 5).to(dtype), torch.randn(4, 5).to(dtype)
    with fwd.dual_level():
        y = fwd.unpack_dual(op(fwd.make_dual(x, v)))
    assert y.tangent.dtype == y.primal.dtype == dtype
    wide = torch.func.jvp(op, (x.double(),), (v.double(),))[1]
    atol = 4 * torch.finfo(dtype).eps * wide.abs().max().item()
    assert_close(y.tangent.double(), wide, rtol=0, atol=atol)
