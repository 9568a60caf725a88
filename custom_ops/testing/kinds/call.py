"""The call itself, before anything else."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.testing.entry import Check
from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import Fault, NotApplicable

__all__ = ["CHECKS"]


def forward(subject: Subject) -> str:
    """The function takes its inputs, and a result is a floating-point tensor."""
    if any(isinstance(x, Tensor) and x.layout != torch.strided for x in subject.inputs):
        raise NotApplicable("an input is sparse")
    try:
        with torch.no_grad():
            outputs = subject.outputs(*subject.fresh(()))
    except Exception as error:
        raise Fault(
            f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            "forward raises",
            final=True,
        ) from error
    if any(y.layout != torch.strided for y in outputs):
        raise NotApplicable("a result is sparse")
    if not outputs:
        raise NotApplicable("no result is a tensor of real floating-point numbers")
    return f"{len(outputs)} result" + "s" * (len(outputs) > 1)


CHECKS = (Check("call", "forward", forward),)
