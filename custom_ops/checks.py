"""Arguments that cannot be used: what was given, and what is expected."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor, nn

from custom_ops.surroundings import is_masked, root_of

__all__ = [
    "ArgumentError",
    "as_index",
    "as_number",
    "check_class_weight",
    "check_cross_entropy_tensors",
    "check_dense",
    "check_dim",
    "check_dtype",
    "check_inplace",
    "check_input",
    "check_label_dtype",
    "check_label_weight",
    "check_linear_module",
    "check_normalizer",
    "check_probabilities",
    "check_vector",
    "checked_numbers",
]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LABELS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


SPARSE = (
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)


class ArgumentError(ValueError, RuntimeError):
    """A value that cannot be used: a ValueError, and the RuntimeError that torch raises for it."""


def check_input(name: str, input: object, dtype: torch.dtype | None) -> None:
    """Raise unless `input` is a tensor of a dtype that has a softmax, by itself or as `dtype`."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    if dtype is not None:
        check_dtype(name, dtype)
    elif input.dtype not in FLOATS:
        raise NotImplementedError(
            f"{name} is not implemented for {input.dtype}: expected a floating-point input "
            "(float64, float32, bfloat16 or float16)"
        )
    if input.layout in SPARSE:
        raise NotImplementedError(
            f"{name} is not implemented for {input.layout}: expected a dense one"
        )


def check_dense(name: str, input: Tensor) -> None:
    """Raise unless `input` has rows and columns: it is neither nested nor of another layout."""
    if input.is_nested or input.is_mkldnn or is_masked(input):
        kind = "a nested tensor" if input.is_nested else f"{type(input).__name__}, {input.layout}"
        raise NotImplementedError(
            f"{name} is not implemented for {kind}: expected a dense strided tensor"
        )


def check_vector(name: str, input: object) -> None:
    """Raise unless `input` is a tensor of a floating-point dtype."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(input).__name__}")
    if input.dtype not in FLOATS:
        raise NotImplementedError(
            f"contract is not implemented for {name} of {input.dtype}: expected float64, float32, "
            "bfloat16 or float16"
        )


def check_dtype(name: str, dtype: object) -> None:
    """Raise unless `dtype` is None or one that has a softmax."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
    if dtype is not None and dtype not in FLOATS:
        raise NotImplementedError(
            f"{name} is not implemented for dtype={dtype}: expected float64, float32, bfloat16 or "
            "float16"
        )


def as_index(name: str, value: object) -> int:
    """Return `value` as an int of 64 bits, or raise; numpy's integers are ints, a bool is not."""
    if isinstance(value, int) and not isinstance(value, bool):
        index = value
    elif isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    else:
        index = operator.index(value)
    if not -(2**63) <= index < 2**63:
        raise ArgumentError(f"{name} must fit in 64 bits, got {index}")
    return index


def as_number(name: str, value: object) -> float:
    """Return `value` as a float, or raise.

    A tensor is no number, as the derivative to it would be lost.
    """
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ArgumentError(f"{name} must be a finite number, got {value}") from None


def check_dim(dim: int, input: Tensor) -> int:
    """Return `dim` counted from the front, or raise IndexError; a scalar has the dimension 0."""
    dim = as_index("dim", dim)
    n = max(input.dim(), 1)
    if not -n <= dim < n:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {dim})"
        )
    return dim % n


def checked_numbers(
    reduction: object,
    label_smoothing: object,
    z_loss: object,
    logit_scale: object,
    softcap: object,
) -> dict[str, Any]:
    """Return the four numbers as floats, by name; raise unless every option means something."""
    label_smoothing = as_number("label_smoothing", label_smoothing)
    z_loss = as_number("z_loss", z_loss)
    logit_scale = as_number("logit_scale", logit_scale)
    softcap = None if softcap is None else as_number("softcap", softcap)
    if reduction not in ("none", "mean", "sum"):
        raise ArgumentError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0.0 <= z_loss < math.inf:
        raise ArgumentError(f"z_loss must be a finite number, 0 or more, got {z_loss}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ArgumentError(f"softcap must be a finite number above 0, or None, got {softcap}")
    if not -math.inf < logit_scale < math.inf:
        raise ArgumentError(f"logit_scale must be a finite number, got {logit_scale}")
    return {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "logit_scale": logit_scale,
        "softcap": softcap,
    }


def check_normalizer(normalizer: float | Tensor | None, reduction: str) -> None:
    """Raise unless the mean's denominator is a number above 0 or a 0-d tensor, for the mean."""
    if normalizer is None:
        return
    if reduction != "mean":
        raise ArgumentError(
            f"normalizer replaces the denominator of reduction='mean', got reduction={reduction!r}"
        )
    if isinstance(normalizer, Tensor):
        # its value stays unread: that would wait for the device
        if normalizer.dim() != 0:
            raise ArgumentError(
                f"normalizer must be a number or a 0-d tensor, got shape {tuple(normalizer.shape)}"
            )
    elif not isinstance(normalizer, numbers.Real):
        raise TypeError(
            f"normalizer must be a number or a 0-d tensor, got {type(normalizer).__name__}"
        )
    elif not 0.0 < as_number("normalizer", normalizer) < math.inf:
        raise ArgumentError(f"normalizer must be a finite number above 0, got {normalizer}")


def check_cross_entropy_tensors(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> None:
    """Raise unless shapes, dtypes and devices of the tensors fit each other."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor, got {type(target).__name__}")
    if input.dim() == 0:
        raise ArgumentError("input must be (C), (N, C) or (N, C, d1, ..., dk), got a 0-d tensor")
    if target.device != input.device:
        raise ArgumentError(
            f"target must be on the device of input: expected {input.device}, got {target.device}"
        )
    if target.shape == input.shape:
        check_probabilities(target)
        if ignore_index >= 0:
            raise ArgumentError(
                "ignore_index is not supported for class probabilities: expected a negative value, "
                f"got {ignore_index}"
            )
    else:
        _check_labels(input, target)
    check_class_weight(input, input.shape[1 if input.dim() > 1 else 0], weight)


def check_probabilities(target: Tensor) -> None:
    """Raise unless the target has a dtype that holds probabilities."""
    if target.dtype not in FLOATS:
        raise ArgumentError(
            "target has the shape of input, so it must hold class probabilities: expected a "
            f"floating-point dtype, got {target.dtype}"
        )


def _check_labels(input: Tensor, target: Tensor) -> None:
    shape = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    if target.shape != shape and not (shape == () and target.shape == (1,)):
        raise ArgumentError(
            f"target must hold a label for each row of input, shape {tuple(shape)}, or class "
            f"probabilities, shape {tuple(input.shape)}; got shape {tuple(target.shape)}"
        )
    check_label_dtype(target)


def check_label_dtype(target: Tensor) -> None:
    """Raise unless the target has a dtype that holds labels."""
    if target.dtype not in LABELS:
        raise ArgumentError(
            f"target must hold labels of an integer dtype (its shape is not that of input), got "
            f"{target.dtype}"
        )


def check_class_weight(input: Tensor, classes: int, weight: object) -> None:
    """Raise unless `weight` is None or has a real number for each class, beside the input."""
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor or None, got {type(weight).__name__}")
    if weight.shape != (classes,):
        raise ArgumentError(
            f"weight must have one entry per class: expected shape ({classes},), got "
            f"{tuple(weight.shape)}"
        )
    if weight.device != input.device:
        raise ArgumentError(
            f"weight must be on the device of input: expected {input.device}, got {weight.device}"
        )
    if weight.dtype.is_complex:
        raise ArgumentError(f"weight must have a real dtype, got {weight.dtype}")


def check_label_weight(
    input_dtype: torch.dtype, weight: Tensor | None, result_dtype: torch.dtype
) -> None:
    """Raise unless the class weights of labels have the dtype of the input, or of the result."""
    if weight is not None and weight.dtype not in (input_dtype, result_dtype):
        raise ArgumentError(
            f"weight must have the dtype of input: expected {input_dtype}, got {weight.dtype}"
        )


def check_inplace(input: Tensor) -> None:
    """Raise unless a gradient may take the place of `input`, as torch does for in-place operators.

    A leaf would lose the values that its gradient is there to change.
    """
    if not (input.requires_grad and torch.is_grad_enabled()):
        return
    base = root_of(input)
    if base.is_leaf and base.requires_grad:
        kind = "a leaf" if base is input else "a view of a leaf"
        raise ArgumentError(
            f"inplace_backward=True: input is {kind} that requires grad, and its gradient would "
            "overwrite it; expected the result of an operation"
        )
    if _overlaps(input):
        raise ArgumentError(
            "inplace_backward=True: entries of input share memory (it was expanded or unfolded), "
            "where their gradients do not fit; expected an input of its own, got shape "
            f"{tuple(input.shape)} with strides {input.stride()}"
        )


def _overlaps(x: Tensor) -> bool:
    """Whether two entries of x may be one place in memory.

    They are not if each dimension steps over all that the dimensions of smaller stride span.
    """
    span = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= span:
                return True
            span += (size - 1) * stride
    return False


#: Where nn.Module keeps what runs around `forward`.
_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}


def check_linear_module(linear: object) -> None:
    """Raise unless calling `linear` is x Wᵀ + b and nothing else."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
    more = "whose forward is not that of nn.Linear"
    if type(linear).forward is nn.Linear.forward and "forward" not in vars(linear):
        hooks = [
            f"{what}, {getattr(hook, '__qualname__', type(hook).__name__)}"
            for name, what in _HOOKS.items()
            for hook in getattr(linear, name, {}).values()
        ]
        if not hooks:
            return
        more = f"with {hooks[0]}"
    raise ArgumentError(
        f"linear is a {type(linear).__name__} {more}: the loss reads weight and bias and does not "
        "call the layer, so that would be left out; expected a plain nn.Linear"
    )
