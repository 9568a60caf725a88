"""Softmax and cross-entropy for PyTorch, by hand, through the Jacobian contraction.

>>> import torch, custom_ops
>>> custom_ops.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
tensor(0.6931)
"""

from custom_ops import derivatives, exporters, jacobian
from custom_ops.cross_entropy import CrossEntropyStats, cross_entropy
from custom_ops.fuse import fuse, materialized, unfuse
from custom_ops.kernels import backend
from custom_ops.linear_cross_entropy import linear_cross_entropy
from custom_ops.modules import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    LogSoftmax,
    Softmax,
)
from custom_ops.softmax import contract, log_softmax, softmax

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "Softmax",
    "backend",
    "contract",
    "cross_entropy",
    "fuse",
    "jacobian",
    "linear_cross_entropy",
    "log_softmax",
    "materialized",
    "softmax",
    "unfuse",
]

__version__ = "0.1.0"

derivatives.register()
exporters.register()
