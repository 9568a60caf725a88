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
def logits(input, numbers, KIND: tl.constexpr):
    """Return z."""
    _, _, _, scale, cap = numbers  # scale is α, or α/s under a cap
    if KIND.LOGITS == "capped":
        return scalar(cap, KIND.ACC) * tanh(input * scalar(scale, KIND.ACC))
    if KIND.LOGITS == "scaled":
        return input * scalar(scale, KIND.ACC)
    return input


@triton.jit
def chained(d, z, numbers, KIND: tl.constexpr):
    """Return d ⊙ z'."""
    _, _, _, scale, cap = numbers
    if KIND.LOGITS == "capped":
        t = z / scalar(cap, KIND.ACC)
        return d * (scalar(scale, KIND.ACC) * scalar(cap, KIND.ACC) * (1.0 - t * t))
    if KIND.LOGITS == "scaled":
        return d * scalar(scale, KIND.ACC)
    return d
