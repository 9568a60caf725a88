"""torch.library.opcheck, for what is registered as an operator."""

from __future__ import annotations

from typing import Any

import torch

from custom_ops.testing.entry import Check
from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import Fault, NotApplicable

__all__ = ["CHECKS"]


def opcheck(subject: Subject) -> str:
    """Schema, fake kernel, autograd registration and AOT dispatch, by torch's own tool."""
    function: Any = subject.function
    sine = torch.ops.aten.sin
    kinds = (type(sine), type(sine.default), torch.library.CustomOpDef)
    if not isinstance(function, kinds):
        raise NotApplicable("not an operator of torch.library")
    try:
        torch.library.opcheck(function, tuple(subject.fresh()))
    except Exception as error:
        raise Fault(f"opcheck: {' '.join(str(error).split())[:250]}", "opcheck") from error
    return "schema, fake kernel, autograd, AOT dispatch"


CHECKS = (Check("operators", "opcheck", opcheck),)
