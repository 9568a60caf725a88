"""Arguments of the last layer that cannot be used: torch's type, the value, what was expected."""

import pytest
import torch
import torch.nn.functional as F

from custom_ops import linear_cross_entropy

if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
    pytest.skip("this torch has no linear_cross_entropy to compare with", allow_module_level=True)

X, W, T = torch.zeros(4, 3), torch.zeros(5, 3), torch.tensor([0, 1, 2, 3])
P = torch.full((4, 5), 0.2)

# Where torch refuses too, its exception's type is among the bases of ours.
REFUSED_BY_TORCH = {
    "features differ": ((X, W[:, :2], T), {}, r"expected \(..., 3\), got shape \(5, 2\)"),
    "weight is a vector": ((X, W[0], T), {}, r"must be \(C, D\) .* got shape \(3,\)"),
    "scalar input": ((X[0, 0], W, T), {}, "got a 0-d tensor"),
    "dtypes differ": ((X, W.double(), T), {}, "expected torch.float32, got torch.float64"),
    "bias of the wrong length": (
        (X, W, T),
        {"linear_bias": torch.zeros(4)},
        r"expected shape \(5,\), got \(4,\)",
    ),
    "rows differ": ((X, W, T[:3]), {}, r"shape \(4,\), or class probabilities, shape \(4, 5\)"),
    "float labels": ((X, W, T.float()), {}, "integer dtype .* got torch.float32"),
    "probabilities with ignore_index": (
        (X, W, P),
        {"ignore_index": 2},
        "not supported for class probabilities: expected None, got 2",
    ),
    "class weights of the wrong length": (
        (X, W, T),
        {"weight": torch.ones(4)},
        r"one entry per class: expected shape \(5,\), got \(4,\)",
    ),
    "label_smoothing above 1": ((X, W, T), {"label_smoothing": 1.5}, r"\[0, 1\], got 1.5"),
    "no such reduction": ((X, W, T), {"reduction": "max"}, "got 'max'"),
    "bad label": ((X, W, T + 2), {}, r"target\[3\] is 5, out of range for 5 classes \(0 to 4"),
    "positions without rows": (
        (X[0], torch.zeros(5, 2, 3), torch.zeros(2).long()),
        {},
        r"input must be \(N, D\), got shape \(3,\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED_BY_TORCH)
def test_refused_with_torchs_type_and_a_sentence(case):
    arguments, options, sentence = REFUSED_BY_TORCH[case]
    with pytest.raises(Exception) as theirs:  # noqa: PT011  its type is what is asked
        F.linear_cross_entropy(*arguments, **options)
    with pytest.raises(theirs.type, match=sentence):
        linear_cross_entropy(*arguments, **options)


REFUSED = {
    "block_rows of nothing": ({"block_rows": 0}, ValueError, "1 or more, or None, got 0"),
    "block_rows a float": ({"block_rows": 1.5}, TypeError, "block_rows must be an int, got float"),
    "memory below nothing": (
        {"memory": -1},
        ValueError,
        "must be 0 bytes or more, or None, got -1",
    ),
    "memory a float": ({"memory": 1e9}, TypeError, "memory must be an int, got float"),
    "memory and rows": (
        {"memory": 1 << 20, "block_rows": 2},
        ValueError,
        "expected one of them, got memory=1048576, block_rows=2",
    ),
    "memory and torch's chunks": (
        {"memory": 0, "options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)},
        ValueError,
        r"expected one of them, got memory=0, options\.batch_chunk_size=2",
    ),
    "options of another kind": ({"options": 3}, TypeError, "LinearCrossEntropyOptions .* got int"),
    "both": (
        {"block_rows": 2, "options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)},
        ValueError,
        "expected one of them",
    ),
    "normalizer for a sum": ({"normalizer": 2, "reduction": "sum"}, ValueError, "got reduction="),
    "bias not a tensor": ({"linear_bias": 1.0}, TypeError, "linear_bias must be a Tensor or None"),
    "weight on another device": (
        {"weight": torch.ones(5, device="meta")},
        ValueError,
        "expected cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_sentence(case):
    options, kind, sentence = REFUSED[case]
    with pytest.raises(kind, match=sentence):
        linear_cross_entropy(X, W, T, **options)


def test_a_bad_label_is_named_by_its_place_in_the_batch():
    target = torch.tensor([[0, 1, -100], [2, 9, 3]])
    with pytest.raises(IndexError, match=r"target\[1, 1\] is 9, out of range for 5 classes"):
        linear_cross_entropy(torch.zeros(2, 3, 3), W, target)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="linear_weight must be a Tensor, got list"):
        linear_cross_entropy(X, [[1.0]], T)
    with pytest.raises(NotImplementedError, match=r"not implemented for torch\.int64"):
        linear_cross_entropy(X.long(), W.long(), T)


def test_torchs_options_give_the_rows_of_a_block():
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    torch.testing.assert_close(
        linear_cross_entropy(X, W, T, options=options), F.linear_cross_entropy(X, W, T)
    )
