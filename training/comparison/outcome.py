"""What one seed of a comparison leaves: series, answers and costs, in a file of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from training.comparison.record import Record
from training.refusal import Refused
from training.run import checkpoint, folder


@dataclass(frozen=True)
class Cost:
    """What the last layer and its loss take alone, and a step's peak of memory."""

    seconds: list[float]
    head_peak_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Outcome:
    """A seed after its last step and its test.

    Attributes:
        seed: of the weights and of the order of the batches.
        record: the series of the training.
        losses: per path, the mean loss of the test.
        predictions: per path, the class answered for each target of the test.
        targets: of the test.
        costs: per head, measured apart from the training.
    """

    seed: int
    record: Record
    losses: dict[str, float]
    predictions: dict[str, list[int]]
    targets: list[int]
    costs: dict[str, Cost]


def save(outcome: Outcome, path: Path) -> None:
    """Write the outcome as a whole or not at all."""
    content = {
        **vars(outcome),
        "record": outcome.record.state_dict(),
        "costs": {name: asdict(cost) for name, cost in outcome.costs.items()},
    }
    folder.write_whole(path, lambda file: torch.save(content, file))


def load(path: Path) -> Outcome | None:
    """Return the outcome at `path`, or None if the seed has not come that far."""
    if not path.is_file():
        return None
    content: dict[str, Any] = checkpoint.read(path)
    try:
        record = Record(list(content["predictions"]))
        record.load_state_dict(content.pop("record"))
        costs = {name: Cost(**cost) for name, cost in content.pop("costs").items()}
        return Outcome(record=record, costs=costs, **content)
    except (KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path} is damaged: it is no seed's outcome ({error})") from error
