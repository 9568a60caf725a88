"""The input as logits z, and the slope z' = ∂z/∂input.

LOGITS = "identity"   z = input                   z' = 1
LOGITS = "scaled"     z = α·input                 z' = α
LOGITS = "capped"     z = s·tanh(α·input / s)     z' = α (1 − (z/s)²)
"""

import triton
import triton.language as tl

from custom_ops.kernels.cuda.arithmetic import scalar, tanh

__all__ = ["chained", "logits"]


@triton.jit
def logits(input, numbers, LOGITS: tl.constexpr, ACC: tl.constexpr):
    """Return z."""
    _, _, _, scale, cap = numbers  # scale is α, or α/s under a cap
    if LOGITS == "capped":
        return scalar(cap, ACC) * tanh(input * scalar(scale, ACC))
    if LOGITS == "scaled":
        return input * scalar(scale, ACC)
    return input


@triton.jit
def chained(d, z, numbers, LOGITS: tl.constexpr, ACC: tl.constexpr):
    """Return d ⊙ z'."""
    _, _, _, scale, cap = numbers
    if LOGITS == "capped":
        t = z / scalar(cap, ACC)
        return d * (scalar(scale, ACC) * scalar(cap, ACC) * (1.0 - t * t))
    if LOGITS == "scaled":
        return d * scalar(scale, ACC)
    return d
