"""Arguments of the last layer that cannot be used: what was given, and what is expected."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from custom_ops.autocast import autocast_is_on
from custom_ops.checks import ArgumentError, as_index

__all__ = ["check_blocks", "check_linear", "chosen_ignore_index"]


def check_linear(
    input: Tensor, linear_weight: object, linear_bias: object, target: object
) -> tuple[tuple[int, ...], bool]:
    """Raise unless the tensors fit each other.

    Return the shape of the rows, (N, d1, …, dk), and whether the target has that of probabilities.
    """
    for name, tensor in (("linear_weight", linear_weight), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    assert isinstance(linear_weight, Tensor)  # for mypy
    assert isinstance(target, Tensor)
    if input.dim() == 0:
        raise ArgumentError("input must be (D), (N, D) or (B, ..., D), got a 0-d tensor")
    if linear_weight.dim() < 2:
        raise ArgumentError(
            "linear_weight must be (C, D) or (C, d1, ..., dk, D), got shape "
            f"{tuple(linear_weight.shape)}"
        )
    if target.device != input.device:
        raise ArgumentError(
            f"target must be on the device of input: expected {input.device}, got {target.device}"
        )
    C, *positions, D = linear_weight.shape
    if input.shape[-1] != D:
        raise ArgumentError(
            f"linear_weight must have the features of input: expected (..., {input.shape[-1]}), "
            f"got shape {tuple(linear_weight.shape)}"
        )
    if positions and input.dim() != 2:
        raise ArgumentError(
            f"with linear_weight of shape {tuple(linear_weight.shape)}, a layer for each position, "
            f"input must be (N, D), got shape {tuple(input.shape)}"
        )
    _check_kin("linear_weight", linear_weight, input)
    if linear_bias is not None:
        _check_bias(linear_bias, linear_weight, input)
    rows = (*input.shape[:-1], *positions)
    probabilities = (*input.shape[:1], C, *positions) if positions else (*rows, C)
    soft = target.shape == probabilities
    if not soft and target.shape != rows and not (rows == () and target.shape == (1,)):
        raise ArgumentError(
            f"target must hold a label for each row, shape {rows}, or class probabilities, shape "
            f"{probabilities}; got shape {tuple(target.shape)}"
        )
    return rows, soft


def _check_bias(linear_bias: object, linear_weight: Tensor, input: Tensor) -> None:
    if not isinstance(linear_bias, Tensor):
        raise TypeError(f"linear_bias must be a Tensor or None, got {type(linear_bias).__name__}")
    if linear_bias.shape != linear_weight.shape[:-1]:
        raise ArgumentError(
            f"linear_bias must have an entry for each logit: expected shape "
            f"{tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    _check_kin("linear_bias", linear_bias, input)


def _check_kin(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ArgumentError(
            f"{name} must be on the device of input: expected {input.device}, got {tensor.device}"
        )
    if tensor.dtype != input.dtype and not autocast_is_on(input):
        raise ArgumentError(
            f"{name} must have the dtype of input: expected {input.dtype}, got {tensor.dtype}"
        )


def chosen_ignore_index(ignore_index: object, probabilities: bool) -> int:
    """Return the label that is ignored; as in torch, −100 for None, and none with probabilities."""
    if ignore_index is None:
        return -100
    if probabilities:
        raise ArgumentError(
            "ignore_index is not supported for class probabilities: expected None, got "
            f"{ignore_index}"
        )
    return as_index("ignore_index", ignore_index)


def check_blocks(memory: object, block_rows: object, options: Any) -> tuple[int | None, int | None]:
    """Return the rows of a block and the memory, None where they are to be chosen."""
    if options is not None and not hasattr(options, "batch_chunk_size"):
        raise TypeError(
            "options must be torch's LinearCrossEntropyOptions or None, got "
            f"{type(options).__name__}"
        )
    chunk = None if options is None else options.batch_chunk_size
    given = {"memory": memory, "block_rows": block_rows, "options.batch_chunk_size": chunk}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ArgumentError(
            "memory, block_rows and options all say how much is taken at a time: expected one of "
            f"them, got {', '.join(f'{name}={value}' for name, value in given.items())}"
        )
    block_rows = chunk if block_rows is None else block_rows
    rows = None if block_rows is None else as_index("block_rows", block_rows)
    if rows is not None and rows < 1:
        raise ArgumentError(f"block_rows must be 1 or more, or None, got {rows}")
    bytes = None if memory is None else as_index("memory", memory)
    if bytes is not None and bytes < 0:
        raise ArgumentError(f"memory must be 0 bytes or more, or None, got {bytes}")
    return rows, bytes
