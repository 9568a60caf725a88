"""Inputs as given, or the examples of a strategy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["EXAMPLES", "sample_inputs"]

EXAMPLES = 3  # of a strategy


def sample_inputs(inputs: Sequence[Any], seed: int) -> list[tuple[Any, ...]]:
    """Return one tuple of inputs, or EXAMPLES of those that a strategy makes.

    >>> made = sample_inputs([lambda g: (torch.rand(2, generator=g),)], 0)
    >>> len(made), made[0][0].shape
    (3, torch.Size([2]))
    """
    if len(inputs) != 1:
        return [tuple(inputs)]
    (strategy,) = inputs
    hypothesis = sys.modules.get("hypothesis")
    if hypothesis is not None and isinstance(strategy, hypothesis.strategies.SearchStrategy):
        return _examples(hypothesis, strategy, seed)
    if callable(strategy) and not isinstance(strategy, torch.Tensor):
        g = torch.Generator().manual_seed(seed)
        return [tuple(strategy(g)) for _ in range(EXAMPLES)]
    return [tuple(inputs)]


def _examples(hypothesis: Any, strategy: Any, seed: int) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(strategy)
    def collect(sample: Any) -> None:
        found.append(tuple(sample))

    collect()
    return found
