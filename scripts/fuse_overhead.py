"""Measure what `custom_ops.fuse` costs a step beside a direct call of `linear_cross_entropy`.

The problem is so small that only the host's work counts. The two steps, forward and backward, take
turns in one process. Printed are microseconds of the processor: the median of the differences of
neighbours, and the difference of the least times, in which other programs disturb least.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import custom_ops

BATCH, TOKENS, FEATURES, CLASSES = 2, 8, 8, 32


def rows(z: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of logits (N, C)."""
    return F.cross_entropy(z, labels.flatten())


def flattened(z: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of logits (B, T, C)."""
    return F.cross_entropy(z.flatten(0, 1), labels.flatten())


def as_in_transformers(z: Tensor, labels: Tensor) -> Tensor:
    """Return the loss as a causal model of transformers writes it."""
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(z.float().view(-1, CLASSES), shifted.view(-1))


def steps(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable[[], None], ...]:
    """Return a step of the fused head, and the same with a direct call."""
    shape = (BATCH * TOKENS,) if loss is rows else (BATCH, TOKENS)
    x, labels = torch.randn(*shape, FEATURES), torch.randint(CLASSES, (BATCH, TOKENS))
    head = custom_ops.fuse(nn.Linear(FEATURES, CLASSES, bias=False))
    x.requires_grad_()

    def fused() -> None:
        loss(head(x), labels).backward()

    def direct() -> None:
        shifted, h = labels, x
        if loss is as_in_transformers:
            shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        if loss is not rows:
            h = x.flatten(0, 1)
        found = custom_ops.linear_cross_entropy(h, head.weight, shifted.flatten())
        found.backward()

    return fused, direct


def seconds(step: Callable[[], None], calls: int) -> float:
    """Return the processor's time of a call."""
    start = time.process_time()
    for _ in range(calls):
        step()
    return (time.process_time() - start) / calls


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=20, help="of each step in a round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # nothing may be materialised
    for loss in (rows, flattened, as_in_transformers):
        fused, direct = steps(loss)
        seconds(fused, 200), seconds(direct, 200)
        pairs = [
            (seconds(fused, arguments.calls), seconds(direct, arguments.calls))
            for _ in range(arguments.rounds)
        ]
        least = [1e6 * min(column) for column in zip(*pairs, strict=True)]
        overhead = 1e6 * statistics.median(a - b for a, b in pairs)
        print(
            f"{loss.__name__:20} {overhead:4.0f} µs; "
            f"least {least[0]:4.0f} - {least[1]:4.0f} = {least[0] - least[1]:4.0f} µs"
        )


if __name__ == "__main__":
    main()
