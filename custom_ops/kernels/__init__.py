"""The only place that knows a device: what the functions above may ask of it, and who answers.

A kernel computes numbers and trusts its arguments; derivatives are the business of the functions
that call it, and where they need a kernel as plain differentiable algebra they take `eager`.
"""

from __future__ import annotations

from custom_ops.kernels.eager import (
    contract,
    cross_entropy,
    cross_entropy_vjp,
    log_softmax,
    log_softmax_jvp,
    log_softmax_vjp,
    softmax,
)
from custom_ops.kernels.options import Options, statistics_dtype

__all__ = [
    "Options",
    "backend",
    "contract",
    "cross_entropy",
    "cross_entropy_vjp",
    "log_softmax",
    "log_softmax_jvp",
    "log_softmax_vjp",
    "softmax",
    "statistics_dtype",
]


def backend() -> str:
    """Return which kernels are in use, in one line.

    >>> backend()
    'eager: plain ATen operators, on every device'
    """
    return "eager: plain ATen operators, on every device"
