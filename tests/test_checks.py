"""Arguments that cannot be used: torch's type of exception, the value, and what was expected."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import custom_ops
from custom_ops import cross_entropy

pytestmark = pytest.mark.usefixtures("backend")

X, T = torch.zeros(4, 5), torch.tensor([0, 1, 2, 3])
P = torch.full((4, 5), 0.2)
META = torch.device("meta")

# Where torch refuses too, its exception's type is among the bases of ours.
REFUSED_BY_TORCH = {
    "rows differ": ((X, T[:3]), {}, r"shape \(4,\), or class probabilities, shape \(4, 5\); got "),
    "pixels differ": ((torch.zeros(4, 5, 3), torch.zeros(4, 2).long()), {}, r"shape \(4, 3\)"),
    "no pixels given": ((torch.zeros(4, 5, 3), T), {}, r"got shape \(4,\)"),
    "scalar logits": ((torch.tensor(1.0), torch.tensor(0)), {}, "got a 0-d tensor"),
    "float labels": ((X, T.float()), {}, r"integer dtype .* got torch.float32"),
    "bool labels": ((X, T.bool()), {}, "got torch.bool"),
    "integer probabilities": ((X, P.long()), {}, "floating-point dtype, got torch.int64"),
    "probabilities with ignore_index": ((X, P), {"ignore_index": 2}, "negative value, got 2"),
    "weight of the wrong length": (
        (X, T, torch.ones(4)),
        {},
        r"weight must have one entry per class: expected shape \(5,\), got \(4,\)",
    ),
    "weight with two dimensions": ((X, T, torch.ones(1, 5)), {}, r"got \(1, 5\)"),
    "weight of the wrong length, probabilities": ((X, P, torch.ones(4)), {}, r"got \(4,\)"),
    "weight of another dtype": (
        (X, T, torch.ones(5).double()),
        {},
        "weight must have the dtype of input: expected torch.float32, got torch.float64",
    ),
    "weight of another dtype, half": ((X.bfloat16(), T, torch.ones(5)), {}, "got torch.float32"),
    "label_smoothing above 1": (
        (X, T),
        {"label_smoothing": 1.5},
        r"label_smoothing must be in \[0, 1\], got 1.5",
    ),
    "no such reduction": ((X, T), {"reduction": "avg"}, "'none', 'mean' or 'sum', got 'avg'"),
    "integer logits": ((X.long(), T), {}, "cross_entropy is not implemented for torch.int64"),
    "complex logits": ((X.cfloat(), T), {}, "not implemented for torch.complex64"),
    "a list of labels": ((X, [0, 1, 2, 3]), {}, "target must be a Tensor, got list"),
    "a list of weights": ((X, T, [1.0] * 5), {}, "weight must be a Tensor or None, got list"),
    "target elsewhere": ((X.to(META), T), {}, "on the device of input: expected meta, got cpu"),
    "weight elsewhere": ((X, T, torch.ones(5, device=META)), {}, "expected cpu, got meta"),
    "bool ignore_index": ((X, T), {"ignore_index": True}, "must be an int, got bool"),
    "fractional ignore_index": ((X, T), {"ignore_index": 0.5}, "must be an int, got float"),
    "label too large": (
        (X, torch.tensor([0, 1, 7, 9])),
        {},
        r"target\[2\] is 7, out of range for 5 classes \(0 to 4, or ignore_index=-100\)",
    ),
    "label negative": ((X, torch.tensor([0, 1, -7, 2])), {}, r"target\[2\] is -7, out of range"),
    "label at a pixel": (
        (torch.zeros(2, 3, 2, 2), torch.tensor([[[0, 0], [0, 0]], [[0, 3], [0, 0]]])),
        {},
        r"target\[1, 0, 1\] is 3, out of range for 3 classes",
    ),
    "label of one row": ((X[0], torch.tensor(9)), {}, "target is 9, out of range"),
    "a label without classes": (
        (X[:, :0], T),
        {},
        r"target\[0\] is 0, out of range for 0 classes \(ignore_index=-100\)",
    ),
    "label beside ignore_index": (
        (X, torch.tensor([-1, -2, 0, 0])),
        {"ignore_index": -1},
        r"target\[1\] is -2, .* or ignore_index=-1\)",
    ),
}

REFUSED = {
    "label_smoothing below 0": ({"label_smoothing": -0.1}, "got -0.1"),
    "label_smoothing NaN": ({"label_smoothing": float("nan")}, r"in \[0, 1\], got nan"),
    "z_loss negative": ({"z_loss": -1.0}, "z_loss must be a finite number, 0 or more, got -1.0"),
    "z_loss infinite": ({"z_loss": float("inf")}, "got inf"),
    "softcap 0": ({"softcap": 0.0}, "softcap must be a finite number above 0, or None, got 0.0"),
    "softcap negative": ({"softcap": -2.0}, "got -2.0"),
    "logit_scale NaN": ({"logit_scale": float("nan")}, "logit_scale must be a finite number"),
    "normalizer 0": ({"normalizer": 0}, "normalizer must be a finite number above 0, got 0"),
    "normalizer of a row": ({"normalizer": torch.ones(4)}, r"a 0-d tensor, got shape \(4,\)"),
    "normalizer without mean": (
        {"normalizer": 2, "reduction": "sum"},
        "reduction='mean', got reduction='sum'",
    ),
}


@pytest.mark.parametrize("case", REFUSED_BY_TORCH)
def test_refused_with_torchs_type_and_a_sentence(case):
    arguments, options, message = REFUSED_BY_TORCH[case]
    with pytest.raises((RuntimeError, ValueError, IndexError, TypeError)) as theirs:
        F.cross_entropy(*arguments, **options)
    with pytest.raises(theirs.type, match=message):
        cross_entropy(*arguments, **options)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_as_a_value_error_that_is_also_torchs_runtime_error(case):
    options, message = REFUSED[case]
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match=message):
            cross_entropy(X, T, **options)


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "softcap", "logit_scale"])
@pytest.mark.parametrize("value", [torch.tensor(0.5), "0.5"])
def test_a_number_is_not_a_tensor_whose_derivative_would_be_lost(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number, got {type(value).__name__}"):
        cross_entropy(X, T, **{name: value})


def test_numpys_numbers_are_numbers():
    np = pytest.importorskip("numpy")
    cross_entropy(X, T, ignore_index=np.int64(2), label_smoothing=np.float32(0.1))
    custom_ops.softmax(X, np.int64(1))


@pytest.mark.parametrize("dim", [True, None, 1.0])
def test_dim_must_be_an_int(dim):
    with pytest.raises(TypeError, match=f"dim must be an int, got {type(dim).__name__}"):
        custom_ops.softmax(X, dim)


def test_dtype_must_be_a_float():
    with pytest.raises(NotImplementedError, match=r"not implemented for dtype=torch\.int64"):
        cross_entropy(X, T, dtype=torch.int64)


def test_weight_may_have_the_dtype_of_the_loss():
    loss = cross_entropy(X.bfloat16(), T, torch.ones(5), dtype=torch.float32)
    assert loss.dtype == torch.float32


def test_uint64_labels_beyond_int64_are_not_the_ignore_index():
    with pytest.raises(IndexError, match=rf"target\[0\] is {2**64 - 100}, out of range"):
        cross_entropy(X[:1], torch.tensor([2**64 - 100], dtype=torch.uint64))


def test_only_the_first_bad_label_is_named_and_uint64_beyond_int64_is_bad():
    target = torch.tensor([0, 1, 2**63 + 5, 9], dtype=torch.uint64)
    with pytest.raises(IndexError, match=rf"target\[2\] is {2**63 + 5}, out of range"):
        cross_entropy(X, target)


NO_NUMBERS = {
    "a list": ({"label_smoothing": [0.1]}, TypeError, "label_smoothing must be a number, got list"),
    "a list as cap": ({"softcap": [1.0]}, TypeError, "softcap must be a number, got list"),
    "a list as factor": ({"z_loss": [1]}, TypeError, "z_loss must be a number, got list"),
    "a list of reductions": ({"reduction": ["mean"]}, ValueError, r"got \['mean'\]"),
    "beyond 64 bits": ({"ignore_index": 2**63}, ValueError, "ignore_index must fit in 64 bits"),
    "below 64 bits": ({"ignore_index": -(2**63) - 1}, ValueError, "must fit in 64 bits, got -92"),
    "no float": ({"z_loss": 10**400}, ValueError, "z_loss must be a finite number"),
    "no float to scale by": ({"logit_scale": 10**400}, ValueError, "logit_scale must be a finite"),
    "no float to divide by": ({"normalizer": 10**400}, ValueError, "normalizer must be a finite"),
    "a dtype's name": ({"dtype": "float32"}, TypeError, "must be a torch.dtype or None, got 'fl"),
    "numpy's dtype": ({"dtype": np.float32}, TypeError, "must be a torch.dtype or None, got <cl"),
}


@pytest.mark.parametrize("case", NO_NUMBERS)
def test_an_option_that_is_no_number_has_our_sentence(case):
    options, error, sentence = NO_NUMBERS[case]
    with pytest.raises(error, match=sentence):
        cross_entropy(X, T, **options)
    with pytest.raises(error, match=sentence):
        custom_ops.linear_cross_entropy(X, torch.zeros(5, 5), T, **options)


def test_a_fraction_and_numpys_numbers_are_numbers():
    want = cross_entropy(X, T, label_smoothing=0.25)
    for number in (Fraction(1, 4), np.float32(0.25)):
        torch.testing.assert_close(cross_entropy(X, T, label_smoothing=number), want)


@pytest.mark.parametrize("f", [custom_ops.softmax, custom_ops.log_softmax])
@pytest.mark.parametrize("dtype", ["float32", float, np.float32])
def test_a_dtype_is_torchs(f, dtype):
    with pytest.raises(TypeError, match=r"must be a torch\.dtype or None, got"):
        f(X, 0, dtype)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((X, [1.0]), TypeError),
        ((X, X.long()), NotImplementedError),
        ((X.long(), X), NotImplementedError),
        ((X, X, 2), IndexError),
        ((X, X, "0"), TypeError),
        ((X, X[:3]), RuntimeError),
    ],
)
def test_contract_refuses_what_has_no_product(args, error):
    with pytest.raises(error):
        custom_ops.contract(*args)
