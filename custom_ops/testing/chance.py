"""Whether a function draws random numbers."""

from __future__ import annotations

import torch

from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import NotApplicable

__all__ = ["not_random"]


def not_random(subject: Subject) -> None:
    """Raise NotApplicable where a call has moved the state of torch's generator."""
    before = torch.get_rng_state()
    with torch.no_grad():
        subject.call(*subject.fresh(()))
    moved = not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    if moved:
        raise NotApplicable("the result is random")
