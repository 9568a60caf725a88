"""Softmax of what has no common rows: nested tensors, MaskedTensor, MKL-DNN's layout, sparse."""

import pytest
import torch
import torch.nn.functional as F
from torch.masked import masked_tensor
from torch.testing import assert_close

import custom_ops

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of", "ignore:Sparse CSR tensor")

OPS = {
    "softmax": (custom_ops.softmax, F.softmax),
    "log_softmax": (custom_ops.log_softmax, F.log_softmax),
}


@pytest.fixture(params=OPS)
def pair(request):
    return OPS[request.param]


def parts():
    return [torch.randn(2, 4), torch.randn(3, 4), torch.randn(1, 4)]


@pytest.mark.parametrize("dim", [1, 2, -1, -2])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_each_part_has_its_own_softmax_and_gradient(pair, layout, dim):
    ours, theirs = pair
    leaves = [p.requires_grad_() for p in parts()]
    nested = torch.nested.as_nested_tensor(leaves, layout=layout)
    got = ours(nested, dim)
    assert got.layout == layout
    want = [theirs(p, dim % 3 - 1) for p in leaves]
    assert_close(list(got.unbind()), want)
    gradients = [
        torch.autograd.grad(sum((p * p.sin()).sum() for p in ps), leaves)
        for ps in (got.unbind(), want)
    ]
    assert_close(*gradients)


def test_a_strided_nested_tensor_has_torchs_answer():
    nested = torch.nested.nested_tensor(parts())
    for dim in (1, 2, -1):
        got, want = custom_ops.softmax(nested, dim), F.softmax(nested, dim)
        assert_close(list(got.unbind()), list(want.unbind()))


def test_a_jagged_result_goes_with_its_input():
    nested = torch.nested.nested_tensor(parts(), layout=torch.jagged)
    product = custom_ops.softmax(nested, 2) * nested  # only where the raggedness is the same
    assert_close(list(product.unbind()), [F.softmax(p, 1) * p for p in nested.unbind()])


def test_torchs_gradient_along_the_ragged_dimension_is_not_each_parts_own():
    leaves = [p.requires_grad_() for p in parts()]
    want = torch.autograd.grad(sum(F.softmax(p, 0).square().sum() for p in leaves), leaves)
    nested = torch.nested.as_nested_tensor(leaves, layout=torch.jagged)
    ours, theirs = (
        torch.autograd.grad(sum(p.square().sum() for p in f(nested, 1).unbind()), leaves)
        for f in (custom_ops.softmax, F.softmax)
    )
    assert_close(ours, want)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(theirs, want, strict=True))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_dimension_that_counts_the_parts_is_refused(layout):
    nested = torch.nested.nested_tensor(parts(), layout=layout)
    with pytest.raises(RuntimeError, match="counts the parts of a nested tensor, got 0"):
        custom_ops.softmax(nested, 0)
    with pytest.raises(IndexError, match=r"range of \[-3, 2\], but got 3"):
        custom_ops.softmax(nested, 3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("dim", [0, 1])
def test_a_masked_tensor_has_torchs_answer(dim):
    x, mask = torch.randn(3, 4), torch.rand(3, 4) > 0.3
    mask[1] = False
    results = []
    for f in (custom_ops.softmax, F.softmax):
        z = masked_tensor(x.clone(), mask, requires_grad=True)
        p = f(z, dim)
        (d,) = torch.autograd.grad((p * p).sum(), z)
        results.append((p.to_tensor(9.0), d.to_tensor(9.0)))
    assert_close(*results)


def test_mkldnn_has_torchs_answer():
    x = torch.randn(3, 4)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without MKL-DNN")
    assert_close(custom_ops.softmax(x.to_mkldnn(), 1).to_dense(), F.softmax(x, 1))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_input_is_refused_by_name(pair, layout):
    with pytest.raises(NotImplementedError, match=r"not implemented for torch\.sparse"):
        pair[0](torch.eye(3).to_sparse(layout=layout), 1)


@pytest.mark.parametrize("make", [
    lambda: torch.nested.nested_tensor(parts()),
    lambda: torch.nested.nested_tensor(parts(), layout=torch.jagged),
    lambda: torch.eye(3).to_sparse(),
    lambda: torch.eye(3).to_mkldnn(),
    lambda: masked_tensor(torch.eye(3), torch.eye(3) > 0),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_cross_entropy_refuses_what_has_no_rows(make):
    target = torch.tensor([0, 1, 2])
    for f in (custom_ops.cross_entropy, lambda x, t: custom_ops.linear_cross_entropy(x, x, t)):
        with pytest.raises(NotImplementedError, match="expected a dense"):
            f(make(), target)
