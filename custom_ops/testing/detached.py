"""Which term a second derivative lacks: the one through a tensor that is cut off its graph.

A backward g(v, s_1, …) reads tensors s_k(x). Its derivative owes Σ_k ∂g/∂s_k · ∂s_k/∂x; a tensor
that was computed inside forward, or detached, gives no term. Each term is taken by differences:
g is called by hand with s_k from a forward at x + h, and all others from x.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops.testing.by_hand import hand_backward
from custom_ops.testing.differences import jacobian
from custom_ops.testing.scalars import columns
from custom_ops.testing.subject import Subject

__all__ = ["missing_terms"]


def missing_terms(
    subject: Subject, i: int, us: Sequence[Tensor], lacking: Tensor, error: Tensor
) -> list[str]:
    """Return the names of the fewest tensors whose terms add up to what is lacking.

    Args:
        subject: a Function, in float64.
        i: the input by which the gradient is differentiated.
        us: the vectors that the gradients of the inputs `subject.wrt` are multiplied with.
        lacking: expected − observed for the looked-at entries of input i.
        error: a bound on its error.
    """
    hand = hand_backward(subject)
    if hand is None:
        return []
    here = [t.detach() for t in hand.tensors]
    vs = [v.detach() for v in subject.cotangents(hand.outputs)]
    terms: list[tuple[str, Tensor]] = []
    for k, name in enumerate(hand.names):

        def f(x: Tensor, k: int = k) -> Tensor:
            moved = hand_backward(subject.replaced(i, x))
            assert moved is not None
            tensors = list(here)
            tensors[k] = moved.tensors[k].detach()
            with torch.no_grad():
                gradients = hand(vs, tensors)
            kept = [
                (u * d).sum()
                for u, d in zip(us, [gradients[j] for j in subject.wrt], strict=True)
                if d is not None
            ]
            return torch.stack(kept).sum().reshape(1) if kept else torch.zeros(1).double()

        try:
            found = jacobian(f, subject.inputs[i].detach(), columns(subject, i))
        except Exception:
            continue
        terms.append((name, found.value[0]))
    for n in (1, 2, 3):
        for chosen in itertools.combinations(terms, n):
            total = torch.stack([term for _, term in chosen]).sum(0)
            bound = 20 * error + 1e-7 * (total.abs().max() + lacking.abs().max())
            if (torch.isfinite(bound) & ((total - lacking).abs() > bound)).any():
                continue
            return [name for name, _ in chosen]
    return []
