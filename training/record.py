"""What the comparison writes down at every step."""

from __future__ import annotations

from typing import Any


class Record:
    """Series over the steps of a run, one list per head; they travel in the checkpoints.

    Attributes:
        loss: per head, the loss of each step.
        seconds: per head, the time of each step: forward, backward and optimizer.
        gradient_size: the largest |entry| of each parameter's gradient, the built-in's; per step a
            list over the parameters.
        gradient_difference: per other head, likewise, the largest |difference| from the built-in's
            gradient, each head being on its own path.
        probes: the steps at which all heads were also given the same logits of the same weights.
        probe_loss_difference, probe_gradient_difference: per other head, at each probe.
        starts: the step at which each process began: 0, then one for each resumption.
    """

    def __init__(self, heads: list[str]) -> None:
        others = heads[1:]
        self.loss: dict[str, list[float]] = {name: [] for name in heads}
        self.seconds: dict[str, list[float]] = {name: [] for name in heads}
        self.gradient_size: list[list[float]] = []
        self.gradient_difference: dict[str, list[list[float]]] = {name: [] for name in others}
        self.probes: list[int] = []
        self.probe_loss_difference: dict[str, list[float]] = {name: [] for name in others}
        self.probe_gradient_difference: dict[str, list[list[float]]] = {n: [] for n in others}
        self.starts: list[int] = []

    @property
    def steps(self) -> int:
        """Steps recorded so far."""
        return len(self.gradient_size)

    def state_dict(self) -> dict[str, Any]:
        """Return all series."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the series of an earlier process."""
        vars(self).update(state)
