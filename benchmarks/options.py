"""What each option costs: time and memory of forward and backward, over those without it."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import torch

import custom_ops
from benchmarks import environment
from benchmarks.cases import Case
from benchmarks.contestants import Contestant, Inputs, loss_and_gradient
from benchmarks.timing import Effort, in_turns
from training.measurement import peak_bytes

CASE = Case("cross_entropy", (1024, 32_000))
PLAIN = "none"
EFFORT = Effort(warm_up=1, least=15, most=15, seconds=0)


def report() -> dict[str, Any]:
    """Measure every option in turns with the call that has none.

    The time is a median of ratios: each round's over that round's plain call, which another
    program on the machine slows down as much.
    """
    torch.set_num_threads(1)
    inputs = Inputs(CASE)
    contestants = {
        name: Contestant(inputs.logits, loss_and_gradient(call)) for name, call in _calls(inputs)
    }
    seconds = in_turns(contestants, EFFORT)
    peaks = {
        name: peak_bytes(partial(_once, contestant), torch.device("cpu"))
        for name, contestant in contestants.items()
    }
    plain = seconds[PLAIN]["samples"]
    return {
        "environment": environment.describe(),
        "name": CASE.name,
        "logits_bytes": CASE.elements * CASE.dtype.itemsize,
        "options": [
            {
                "name": name,
                "time": median(
                    mine / other for mine, other in zip(times["samples"], plain, strict=True)
                ),
                "bytes": peaks[name],
            }
            for name, times in seconds.items()
        ],
    }


def _once(contestant: Contestant) -> object:
    return contestant.work(contestant.prepare())


def _calls(inputs: Inputs) -> list[tuple[str, Any]]:
    classes, target = CASE.shape[1], inputs.target
    y = torch.softmax(torch.randn(CASE.shape), 1)
    weight = 0.5 + torch.rand(classes)
    options: dict[str, dict[str, Any]] = {
        PLAIN: {},
        "label_smoothing=0.1": {"label_smoothing": 0.1},
        "weight=w": {"weight": weight},
        "weight=w, which requires grad": {"weight": weight.clone().requires_grad_()},
        "z_loss=1e-4": {"z_loss": 1e-4},
        "softcap=30": {"softcap": 30.0},
        "logit_scale=0.5": {"logit_scale": 0.5},
        "normalizer=1000": {"normalizer": 1000},
        'reduction="none"': {"reduction": "none"},
        "return_stats=True": {"return_stats": True},
        "return_stats=True, the entropy in the loss": {"return_stats": True},
        "inplace_backward=True": {"inplace_backward": True},
        "probabilities": {"target": y},
    }
    return [
        (name, partial(_loss, {"target": target, **chosen}, "entropy" in name))
        for name, chosen in options.items()
    ]


def _loss(chosen: dict[str, Any], with_entropy: bool, logits: torch.Tensor) -> torch.Tensor:
    found = custom_ops.cross_entropy(logits, **chosen)
    if not chosen.get("return_stats"):
        return found.sum()
    loss, stats = found
    return loss - 0.01 * stats.entropy.mean() if with_entropy else loss
