"""softmax, log_softmax and contract beside float64, the literal Jacobian and torch's own."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db

import custom_ops
from custom_ops import contract, jacobian
from custom_ops.testing import check

pytestmark = pytest.mark.usefixtures("backend")

D = torch.double
OPS = {"softmax": custom_ops.softmax, "log_softmax": custom_ops.log_softmax}
BUILTINS = {"softmax": F.softmax, "log_softmax": F.log_softmax}
SHAPES = [
    ((), 0),
    ((), -1),
    ((5,), 0),
    ((3, 5), 1),
    ((3, 5), 0),
    ((2, 3, 4), -2),
    ((2, 3, 2, 2), 1),
]


@pytest.fixture(params=OPS)
def op(request):
    return request.param


def gradients(function, x, v):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y, x, v.to(y.dtype))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_value_and_gradient_agree_with_float64(op, dtype, shape, dim):
    x, v = torch.randn(shape, dtype=D).to(dtype), torch.randn(shape, dtype=D).to(dtype)
    got, got_grad = gradients(lambda x: OPS[op](x, dim), x, v)
    want, want_grad = gradients(lambda x: BUILTINS[op](x, dim), x.double(), v.double())
    assert got.dtype == got_grad.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype))
    if dtype in (torch.bfloat16, torch.float16):
        # torch too keeps the rounded output for the backward: J is that of the rounded p
        want_grad = literal_gradient(op, got.detach().double(), v.double(), dim)
    torch.testing.assert_close(got_grad, want_grad.to(dtype))


def literal_gradient(op, output, v, dim):
    """vᵀ ∂output/∂z from the output alone, with every matrix built."""
    y, w = (torch.atleast_1d(t).movedim(dim, -1) for t in (output, v))
    p = y if op == "softmax" else y.exp()
    rows = p if op == "softmax" else torch.ones_like(p)
    J = torch.diag_embed(rows) - torch.einsum("...k,...s->...ks", rows, p)
    return torch.einsum("...k,...ks->...s", w, J).movedim(-1, dim).reshape(output.shape)


@pytest.mark.parametrize("variant", ["", "with_dtype"])
def test_torchs_own_samples_agree(op, variant):
    (info,) = (i for i in op_db if i.name == op and i.variant_test_name == variant)
    dtype = torch.float32
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        got = OPS[op](sample.input, *sample.args, **sample.kwargs)
        want = info.op(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(got, want)
        v = torch.randn_like(want)
        torch.testing.assert_close(
            torch.autograd.grad(got, sample.input, v), torch.autograd.grad(want, sample.input, v)
        )


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_gradcheck_in_every_mode(op, shape, dim):
    x = torch.randn(shape, dtype=D, requires_grad=True)
    f = lambda x: OPS[op](x, dim)  # noqa: E731
    modes = {"check_batched_grad": True, "check_undefined_grad": True}
    assert gradcheck(f, x, check_forward_ad=True, check_batched_forward_grad=True, **modes)
    assert gradgradcheck(f, x, check_fwd_over_rev=True, check_rev_over_rev=True, **modes)


@pytest.mark.parametrize(("shape", "dim"), [((3, 5), 1), ((2, 3, 2, 2), 1)])
def test_every_derivative_transform_and_layout(op, shape, dim):
    kinds = ["derivatives", "torch.func", "layouts"]
    report = check(lambda x: OPS[op](x, dim), torch.randn(shape), only=kinds)
    assert report.passed, str(report)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_contract_is_the_literal_jacobian(shape):
    z, v = torch.randn(shape, dtype=D), torch.randn(shape, dtype=D)
    J = jacobian.softmax_jacobian(z)
    p = jacobian.softmax(z)
    torch.testing.assert_close(contract(p, v), jacobian.contract_with_jacobian(v, J))
    torch.testing.assert_close(contract(p, v), torch.einsum("...ks,...s->...k", J, v))


def test_contract_is_differentiable_in_both_arguments():
    p, v = (
        torch.rand(2, 3, dtype=D, requires_grad=True),
        torch.randn(2, 3, dtype=D, requires_grad=True),
    )
    assert gradcheck(contract, (p, v), check_forward_ad=True)
    assert gradgradcheck(contract, (p, v), check_fwd_over_rev=True)


def test_softmax_backward_is_the_contraction():
    z, v = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    p = custom_ops.softmax(z, 1)
    # of the same kernel: with p in a graph the eager one would answer, which adds in another order
    want = contract(p.detach(), v)
    torch.testing.assert_close(torch.autograd.grad(p, z, v)[0], want, rtol=0, atol=0)


finite_rows = st.lists(st.floats(-80, 80), min_size=1, max_size=12)


@given(finite_rows, st.floats(-1e3, 1e3))
@settings(deadline=None)
def test_shift_changes_nothing(row, shift):
    z = torch.tensor(row, dtype=D)
    torch.testing.assert_close(
        custom_ops.softmax(z + shift, 0), custom_ops.softmax(z, 0), rtol=1e-9, atol=1e-12
    )


@given(finite_rows, st.randoms())
@settings(deadline=None)
def test_permutation_of_the_classes_permutes_the_result(row, random):
    order = random.sample(range(len(row)), len(row))
    z = torch.tensor(row, dtype=D)
    torch.testing.assert_close(custom_ops.softmax(z[order], 0), custom_ops.softmax(z, 0)[order])


@given(finite_rows)
@settings(deadline=None)
def test_probabilities_sum_to_one_and_are_not_negative(row):
    p = custom_ops.softmax(torch.tensor(row), 0)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0))


def test_a_batch_equals_its_rows_bit_for_bit(op):
    x = torch.randn(7, 33)
    rows = torch.stack([OPS[op](row, 0) for row in x])
    torch.testing.assert_close(OPS[op](x, 1), rows, rtol=0, atol=0)


@pytest.mark.parametrize(
    "row",
    [
        [-torch.inf, 0.0, 1.0],
        [-torch.inf] * 3,
        [torch.inf, 0.0, 1.0],
        [torch.nan, 0.0, 1.0],
        [1e38, -1e38, 0.0],
        [3.4e38, 3.4e38, 0.0],
        [5.0],
    ],
)
def test_extreme_rows_are_those_of_torch(op, row):
    x, v = torch.stack([torch.tensor(row), torch.zeros(len(row))]), torch.randn(2, len(row))
    got, want = (gradients(lambda x, f=f: f(x, 1), x, v) for f in (OPS[op], BUILTINS[op]))
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (2, 3, 0)])
def test_empty_input_gives_empty_output(op, shape):
    x = torch.randn(shape, requires_grad=True)
    for dim in range(len(shape)):
        y = OPS[op](x, dim)
        assert y.shape == shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.mark.parametrize("C", [200_000, 1_000_000])
def test_many_classes_lose_no_more_than_the_builtin(C):
    """A gradient row sums to 0; the built-in's float32 rows reach 7.8e-6 at C = 200,000."""
    x, v = torch.randn(1, C), torch.randn(1, C)
    _, ours = gradients(lambda x: custom_ops.softmax(x, 1), x, v)
    _, theirs = gradients(lambda x: F.softmax(x, 1), x, v)
    assert ours.double().sum().abs() <= max(theirs.double().sum().abs().item(), 2e-8)
    _, exact = gradients(lambda x: F.softmax(x, 1), x.double(), v.double())
    assert (ours - exact).abs().max() <= 1.1 * (theirs - exact).abs().max()


def test_half_precision_is_summed_in_float32():
    x = torch.zeros(1, 70_000, dtype=torch.float16)  # a float16 sum would overflow to inf
    assert (custom_ops.log_softmax(x, 1).exp() > 0).all()
    assert (custom_ops.softmax(x, 1) > 0).all()


def test_dtype_converts_the_input_first(op):
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    got, want = OPS[op](x, 1, dtype=torch.float32), BUILTINS[op](x, 1, dtype=torch.float32)
    torch.testing.assert_close(got, want)
    v = torch.randn(3, 4)
    got_grad, want_grad = (torch.autograd.grad(y, x, v)[0] for y in (got, want))
    assert got_grad.dtype == torch.bfloat16
    torch.testing.assert_close(got_grad, want_grad)
    torch.testing.assert_close(
        OPS[op](torch.arange(3), 0, torch.float32),
        BUILTINS[op](torch.arange(3), 0, dtype=torch.float32),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_on_the_cpu_leaves_softmax_alone_as_in_torch(op, dtype):
    x = torch.randn(3, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = OPS[op](x, 1), BUILTINS[op](x, 1)
    assert got.dtype == want.dtype


@pytest.mark.parametrize("dim", [2, -3])
def test_dim_out_of_range_is_an_index_error(op, dim):
    message = rf"expected to be in range of \[-2, 1\], but got {dim}"
    with pytest.raises(IndexError, match=message):
        OPS[op](torch.zeros(2, 2), dim)


def test_integer_input_is_refused_with_its_dtype(op):
    with pytest.raises(NotImplementedError, match=f"{op} is not implemented for torch.int64"):
        OPS[op](torch.zeros(2, dtype=torch.long), 0)
    with pytest.raises(NotImplementedError, match=r"not implemented for dtype=torch\.int64"):
        OPS[op](torch.zeros(2), 0, dtype=torch.long)


def test_something_else_than_a_tensor_is_a_type_error(op):
    with pytest.raises(TypeError, match="input must be a Tensor, got list"):
        OPS[op]([1.0, 2.0], 0)
