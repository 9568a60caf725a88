"""Two runs of a function beside each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops.testing.subject import Subject
from custom_ops.testing.wording import position

__all__ = ["ROUNDINGS", "differing", "owed", "run"]

ROUNDINGS = 256  # of the largest entry: another order of summation, not another formula


def run(subject: Subject, inputs: Sequence[object] | None = None) -> list[Tensor | None]:
    """Return the outputs and then the gradients at the subject's cotangents."""
    outputs, gradients = subject.gradients(None if inputs is None else list(inputs))
    return [*(y.detach() for y in outputs), *gradients]


def owed(subject: Subject) -> list[str]:
    """Return what `run` gives, in words."""
    with torch.no_grad():
        n = len(subject.outputs(*subject.fresh(())))
    results = ["the result"] if n == 1 else [f"result {o}" for o in range(n)]
    return results + [f"the gradient of {subject.input_name(i)}" for i in subject.wrt]


def differing(
    got: Sequence[Tensor | None],
    want: Sequence[Tensor | None],
    names: Sequence[str],
    roundings: float = 0.0,
) -> str | None:
    """Return where two runs differ first, in words; `roundings` 0 compares the bits."""
    for a, b, name in zip(got, want, names, strict=False):
        if a is None or b is None:
            if not (_zero(a) and _zero(b)):
                missing, there = ("missing", "there") if a is None else ("there", "missing")
                return f"{name} is {missing}; expected it {there}"
            continue
        if a.shape != b.shape:
            return f"{name} has the shape {tuple(a.shape)}; expected {tuple(b.shape)}"
        wrong = _unlike(a, b, roundings)
        if wrong.any():
            k = int(wrong.reshape(-1).nonzero()[0])
            x, y = a.reshape(-1)[k].item(), b.reshape(-1)[k].item()
            return f"{name} is {x:.6g} at {position(k, tuple(a.shape))}; expected {y:.6g}"
    return None


def _zero(a: Tensor | None) -> bool:
    return a is None or not a.any()


def _unlike(a: Tensor, b: Tensor, roundings: float) -> Tensor:
    both = torch.isnan(a) & torch.isnan(b)
    if not roundings:
        return (a != b.to(a.dtype)) & ~both
    eps = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    a, b = a.double(), b.double()
    finite = b[torch.isfinite(b)]
    size = finite.abs().max().item() if finite.numel() else 0.0
    if eps < 1e-6:
        size = max(size, 1.0)  # the numbers on the way are about 1 where they cancel to 0
    return ~((a - b).abs() <= roundings * eps * size) & (a != b) & ~both
