"""What the comparison writes down at every step."""

from __future__ import annotations

from typing import Any


class Record:
    """Series over the steps of a run, by the name of a path; they travel in the checkpoints.

    A path is a head on its own copy of the network, or the yardstick. Of gradients, what stands
    here is a list over the parameters: the largest |entry|, or the largest |difference| from the
    first path's. What is not finite stays so.

    Attributes:
        loss: per path, the loss of each step.
        seconds: per path, the time of each step: forward, backward and optimizer.
        gradients: at each step, each path's gradients.
        gradient_differences: at each step, each other path's, every path having its own weights.
        probes: the steps at which all heads were also given the same logits of the same weights.
        probe_losses, probe_gradients, probe_differences: likewise, at each probe.
        starts: the step at which each process began: 0, then one for each resumption.
    """

    def __init__(self, paths: list[str]) -> None:
        self.loss: dict[str, list[float]] = {name: [] for name in paths}
        self.seconds: dict[str, list[float]] = {name: [] for name in paths}
        self.gradients: list[dict[str, list[float]]] = []
        self.gradient_differences: list[dict[str, list[float]]] = []
        self.probes: list[int] = []
        self.probe_losses: list[dict[str, float]] = []
        self.probe_gradients: list[dict[str, list[float]]] = []
        self.probe_differences: list[dict[str, list[float]]] = []
        self.starts: list[int] = []

    @property
    def steps(self) -> int:
        """Steps recorded so far."""
        return len(self.gradients)

    def state_dict(self) -> dict[str, Any]:
        """Return all series."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the series of an earlier process."""
        vars(self).update(state)
