"""Where we knowingly answer better than torch 2.13, each beside torch's own answer.

The table of these differences stands in docs/differences.md; everything else agrees with torch. If
torch's answer changes, a test here fails, and the row leaves the table.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import differentiable

from custom_ops import cross_entropy
from custom_ops.kernels import Options, Problem, Rows, eager

pytestmark = pytest.mark.usefixtures("backend")

IGNORED = torch.tensor([1, -100, 0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"softcap": 5.0}])
def test_ignored_row_adds_exactly_zero_whatever_it_holds(value, options):
    x = torch.randn(3, 4, dtype=torch.double)
    clean, (leaf,) = differentiable(x), differentiable(x)
    with torch.no_grad():
        leaf[1] = value
    got = cross_entropy(leaf, IGNORED, **options)
    torch.testing.assert_close(got, cross_entropy(clean[0], IGNORED, **options), rtol=0, atol=0)
    (d,) = torch.autograd.grad(got, leaf, create_graph=True)
    assert (d[1] == 0).all()
    (dd,) = torch.autograd.grad(d.square().sum(), leaf)
    assert (dd[1] == 0).all()
    assert dd.isfinite().all()
    _, tangent = torch.func.jvp(
        lambda x: cross_entropy(x, IGNORED, **options), (leaf.detach(),), (torch.ones_like(x),)
    )
    assert tangent.isfinite()
    loss, stats = cross_entropy(leaf, IGNORED, reduction="none", return_stats=True, **options)
    assert loss[1] == stats.lse[1] == 0
    assert stats.prediction[1] == -1


def test_ignored_nan_row_poisons_torchs_gradient():
    (leaf,) = differentiable(torch.randn(3, 4))
    with torch.no_grad():
        leaf[1] = torch.nan
    F.cross_entropy(leaf, IGNORED).backward()
    assert leaf.grad[1].isnan().all()


ZERO = (torch.tensor([[0.5, -torch.inf, 1.0]]), torch.tensor([[0.25, 0.0, 0.75]]))


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 3.0])])
def test_a_probability_of_zero_over_minus_infinity_adds_nothing(weight):
    x, y = ZERO
    (leaf,), (finite,) = differentiable(x), differentiable(x[:, [0, 2]])
    got = cross_entropy(leaf, y, weight)
    want = cross_entropy(finite, y[:, [0, 2]], None if weight is None else weight[[0, 2]])
    torch.testing.assert_close(got, want)
    (d,), (e,) = (
        torch.autograd.grad(got, leaf, create_graph=True),
        torch.autograd.grad(want, finite),
    )
    torch.testing.assert_close(d[:, [0, 2]], e)
    assert d[0, 1] == 0
    assert torch.autograd.grad(d.square().sum(), leaf)[0].isfinite().all()
    _, tangent = torch.func.jvp(lambda x: cross_entropy(x, y, weight), (x,), (torch.ones(1, 3),))
    assert tangent.isfinite()


def test_a_probability_of_zero_over_minus_infinity_is_nan_in_torch():
    (leaf,) = differentiable(ZERO[0])
    assert F.cross_entropy(leaf, ZERO[1]).isnan()


def test_a_smoothed_class_without_weight_may_lie_at_minus_infinity():
    """The same rule for labels: ỹ_k = w_k ε/C is exactly 0 where w_k is."""
    x, w = torch.tensor([[0.5, -torch.inf, 1.0]]), torch.tensor([1.0, 0.0, 1.0])
    target = torch.tensor([0])
    assert cross_entropy(x, target, w, label_smoothing=0.1).isfinite()
    assert F.cross_entropy(x, target, w, label_smoothing=0.1).isnan()


# Enough rows for two threads: torch's kernel throws in a parallel region, which ends the process.
COMPILED = """
import torch, custom_ops
torch.set_num_threads(2)
x, target = torch.zeros(40_000, 50, requires_grad=True), torch.zeros(40_000, dtype=torch.long)
target[20_000] = 99
torch.compile({function}, fullgraph=True)(x, target)
"""


def run(function):
    program = COMPILED.format(function=function)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_a_bad_label_in_a_compiled_graph_is_the_same_index_error():
    torch._dynamo.reset()
    x, target = torch.zeros(4, 5, requires_grad=True), torch.tensor([0, 1, 9, 2])
    message = r"target\[2\] is 9, out of range for 5 classes \(0 to 4, or ignore_index=-100\)"
    compiled = torch.compile(cross_entropy, fullgraph=True)
    for function in (cross_entropy, compiled):
        with pytest.raises(IndexError, match=message):
            function(x, target)
    compiled(x, target.clamp_max(4)).backward()  # and the process, and the graph, live on
    assert x.grad.isfinite().all()


def test_a_bad_label_in_a_compiled_graph_ends_torchs_process():
    result = run("torch.nn.functional.cross_entropy")
    assert result.returncode < 0, result.stderr  # killed by a signal
    result = run("custom_ops.cross_entropy")
    assert result.returncode == 1
    assert "IndexError: target[20000] is 99" in result.stderr


def test_a_bad_label_where_it_cannot_be_read_makes_its_row_nan_and_reads_nothing_outside(
    monkeypatch,
):
    """What a kernel on another device sees: no exception there, and no read through the label."""
    monkeypatch.setattr(eager, "checked_labels", lambda target, *_: target)
    o = Options(1, torch.float32, label_smoothing=0.1)
    x, target = torch.randn(4, 5), torch.tensor([0, 10**12, -7, 2])
    problem = Problem(x, target, None, o)
    loss, M, L, *_ = eager.cross_entropy(problem)
    assert loss.isnan().tolist() == [False, True, True, False]
    problem = problem._replace(weight=torch.ones(5))
    d = eager.cross_entropy_vjp(problem, Rows(torch.ones(4), None, M, L))
    assert d.isnan().any(1).tolist() == [False, True, True, False]


def test_an_all_ignored_micro_batch_with_a_normalizer_is_zero_and_attached():
    (leaf,) = differentiable(torch.randn(2, 3))
    target = torch.tensor([-100, -100])
    loss = cross_entropy(leaf, target, normalizer=7)
    assert loss == 0
    assert (torch.autograd.grad(loss, leaf)[0] == 0).all()
    assert F.cross_entropy(leaf, target).isnan()
    assert cross_entropy(leaf, target).isnan()  # without one, as torch


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint16])
def test_labels_of_every_integer_dtype_where_torch_takes_two(dtype):
    x, target = torch.randn(2, 3), torch.tensor([0, 2])
    assert cross_entropy(x, target.to(dtype)) == cross_entropy(x, target)
    with pytest.raises(RuntimeError, match="Long"):
        F.cross_entropy(x, target.to(dtype))


def test_gradient_flows_to_class_weights_of_labels_where_torch_refuses():
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    (w,) = differentiable(torch.rand(4))
    (d,) = torch.autograd.grad(cross_entropy(x, target, w, reduction="sum"), w)
    want = torch.zeros(4).index_add(0, target, F.cross_entropy(x, target, reduction="none"))
    torch.testing.assert_close(d, want)
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        F.cross_entropy(x, target, w)
