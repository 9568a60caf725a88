"""The optimizers and their schedule, the same for every head."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler

LEARNING_RATE = 0.05
HALVING_STEPS = 500

#: From parameters to their optimizer, and a schedule to be stepped after every step.
MakeOptimizer = Callable[[Iterable[nn.Parameter]], tuple[Optimizer, LRScheduler]]


def make_optimizer(parameters: Iterable[nn.Parameter], lr: float) -> tuple[Optimizer, LRScheduler]:
    """Return SGD with Nesterov momentum, and a schedule to be stepped after every step.

    Not Adam: it divides each gradient by its own size, so that one that is nothing but rounding
    (a dead unit's) moves its weight as far as a real one, and two heads part for no reason of
    theirs. The schedule does not look at the number of epochs: a finished run can be continued.
    """
    return _scheduled(SGD(parameters, lr=lr, momentum=0.9, nesterov=True))


def make_adam(parameters: Iterable[nn.Parameter], lr: float) -> tuple[Optimizer, LRScheduler]:
    """Return AdamW with the same schedule, for language models, which SGD hardly trains."""
    return _scheduled(AdamW(parameters, lr=lr, betas=(0.9, 0.95), fused=True))


def _scheduled(optimizer: Optimizer) -> tuple[Optimizer, LRScheduler]:
    return optimizer, ExponentialLR(optimizer, gamma=0.5 ** (1 / HALVING_STEPS))
