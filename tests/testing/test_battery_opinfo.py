"""No false alarm on torch's own differentiable operators, with samples that torch has of them."""

import functools

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

from custom_ops.testing import check

QUICK = ("add", "cumsum", "exp", "logsumexp", "matmul", "nn_functional_linear", "var")
MOST = 64  # entries of the input; a sample in the middle of those

# What is found, and is so. Derivatives of derivative rules: https://github.com/pytorch/pytorch/issues/
# 198017 gathers them. Where there is no number, none was found.
TWICE = ("reverse over forward", "nested forward")
KNOWN = {
    "cholesky_inverse": (("forward mode", "forward over reverse"), "issue 198017"),
    "cholesky_solve": (("forward mode", "forward over reverse"), "issue 196694"),
    "cumprod": (TWICE, "at a zero: issue 196701"),
    "linalg_det": (TWICE, "issue 196696"),
    "det": (TWICE, "issue 196696"),
    "linalg_eigh": (TWICE, "issue 198017"),
    "linalg_householder_product": (TWICE, "issue 196698"),
    "linalg_slogdet": (TWICE, "issue 196697"),
    "linalg_solve": (TWICE, "issue 196695"),
    "linalg_solve_ex": (TWICE, "issue 196695"),
    "linalg_tensorsolve": (TWICE, "issue 196695"),
    "logdet": (TWICE, "issue 196697"),
    "nn_functional_batch_norm": (
        (*TWICE, "third derivative", "inputs unchanged"),
        "issue 186256; running statistics are written by design",
    ),
    "nn_functional_instance_norm": (
        (*TWICE, "third derivative", "empty batch"),
        "issue 186256; the sample's wrapper reads row 0",
    ),
    "nn_functional_layer_norm": ((*TWICE, "third derivative"), "issues 175754 and 196700"),
    "native_layer_norm": (("gradient", "forward mode"), "of mean and rstd: issue 79705"),
    "native_group_norm": (
        ("gradient", "upstream missing", "batched gradient", "jacrev"),
        "of mean and rstd, as in issue 79705",
    ),
    "native_batch_norm": (("gradient", "forward mode", "inputs unchanged"), "as in issue 79705"),
    "_native_batch_norm_legit": (
        ("gradient", "forward mode", "inputs unchanged"),
        "as in issue 79705",
    ),
    "_batch_norm_with_update": (
        ("gradient", "forward mode", "inputs unchanged"),
        "as in issue 79705",
    ),
    "scatter_reduce_prod": (
        ("forward mode", "forward over reverse"),
        "the tangent is 0 where entries are multiplied: issue 198017",
    ),
    "special_i1": (("third derivative",), "at 0, where a branch has no derivative"),
    "kron": (
        ("changes noticed", "strides"),
        "issue 185650; and _unsafe_view shares no version counter, so a change of an input between "
        "forward and backward gives a wrong gradient",
    ),
    "index_fill": (
        ("vmap", "mismatched rows"),
        "vmap over a 0-d value fills with another sample's; any number of indices will do",
    ),
    "index_put": (("bad labels",), "-1 is the last index, by definition"),
    "triangular_solve": (
        ("forward over reverse",),
        "2424 on a sample where reverse over reverse and differences give -1381",
    ),
    "nn_functional_hardsigmoid": (("gradient", "forward mode"), "1/6 is a constant of float32"),
    "nn_functional_max_unpool2d": (("strides",), "raises where the indices are not contiguous"),
    "nn_functional_max_unpool2d_grad": (("strides",), "as max_unpool2d"),
    "nn_functional_max_unpool3d": (("strides",), "as max_unpool2d"),
    "nn_functional_normalize": (("float16",), "eps=1e-12 is 0 in float16"),
    "nn_functional_soft_margin_loss": (("float16", "float16's range"), "exp overflows"),
    "nn_functional_multilabel_soft_margin_loss": (("float16's range",), "a sum overflows"),
    "nn_functional_cosine_embedding_loss": (("float16's range",), "a sum overflows"),
    "masked_var": (("float16's range",), "a sum of squares overflows"),
    "masked_std": (("float16's range",), "a sum of squares overflows"),
    "matrix_exp": (("bfloat16", "float16", "float16's range"), "NaN in the half types"),
    "linalg_multi_dot": (("dynamic",), "the order of the products depends on the sizes"),
    # by their nature
    "as_strided": (("vmap", "strides"), "it is about the storage"),
    "as_strided_copy": (("vmap", "strides"), "it is about the storage"),
    "as_strided_partial_views": (
        ("vmap", "strides", "vjp and grad", "jacrev", "make_fx"),
        "it is about the storage",
    ),
    "as_strided_scatter": (
        ("gradient", "batched gradient", "vmap", "per-sample gradients"),
        "the sample's rows overlap",
    ),
    "bernoulli": (("float32", "bfloat16", "float16", "make_fx"), "the sample seeds its draws"),
    "svd_lowrank": (("make_fx",), "the sample seeds its draws"),
    "bfloat16": (("gradient", "forward mode"), "a cast, whose gradient is that of the identity"),
    "float": (("gradient", "forward mode"), "a cast, whose gradient is that of the identity"),
    "half": (("gradient", "forward mode"), "a cast, whose gradient is that of the identity"),
    "linalg_norm_subgradients_at_zero": (("second derivative", *TWICE), "at 0 it has none"),
    "normal": (
        ("gradient", "forward mode", "make_fx"),
        "its gradient is 0 by definition, not pathwise",
    ),
    "_unsafe_masked_index_put_accumulate": (("many rows",), "a row more is a number more to add"),
    "nn_functional_multi_head_attention_forward": (
        ("meta tensors", "make_fx", "threads"),
        "a mask on the CPU; the sample seeds its dropout",
    ),
}


def infos():
    names = []
    for info in op_db:
        if info.supports_autograd and torch.float64 in info.supported_dtypes("cpu"):
            names.append(info)
    return {info.formatted_name: info for info in names}


INFOS = infos()


def sample_of(info):
    """A sample in the middle of the small ones, or None."""
    samples = []
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        first = [sample.input] if isinstance(sample.input, Tensor) else sample.input
        if not isinstance(first, (list, tuple)) or not all(isinstance(x, Tensor) for x in first):
            continue
        if 1 < sum(x.numel() for x in first) <= MOST:
            samples.append(sample)
    return samples[len(samples) // 2] if samples else None


def report_of(name, **options):
    info = INFOS[name]
    sample = sample_of(info)
    if sample is None:
        pytest.skip("no small sample")
    keywords = {k: x.detach() if isinstance(x, Tensor) else x for k, x in sample.kwargs.items()}

    @functools.wraps(info.op)
    def function(input, *args):
        return info.gradcheck_wrapper(info.op, input, *args, **keywords)

    function.__name__ = name
    return check(function, sample.input, *sample.args, **options)


def unexpected(report, name):
    known = KNOWN.get(name, ((), ""))[0]
    return [row for row in report.failures if row.check not in known]


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_operator_passes_every_derivative(name):
    report = report_of(name, only=["derivatives", "torch.func", "reuse"])
    assert report.passed, str(report)


@pytest.mark.audit
@pytest.mark.parametrize("name", INFOS)
def test_no_false_alarm(name):
    report = report_of(name, skip=["compile"])
    rows = unexpected(report, name)
    assert not rows, str(report)


@pytest.mark.audit
@pytest.mark.parametrize("name", list(INFOS)[::3])
def test_no_false_alarm_of_the_compiler_kind(name):
    report = report_of(name, only=["call", "compile"])
    assert not unexpected(report, name), str(report)
