"""Random programs of tensor operations between a head and its loss: as with the real logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import custom_ops

C, D = 7, 3

#: (z, its partner, a number, a generator) to another z; a tuple is refused by the next step.
STEPS: dict[str, Callable[[Tensor, Tensor, int, torch.Generator], Tensor]] = {
    # dimensions
    "transpose": lambda z, o, n, g: z.transpose(n % z.dim(), (n + 1) % z.dim()),
    "permute": lambda z, o, n, g: z.permute(*torch.randperm(z.dim(), generator=g).tolist()),
    "movedim": lambda z, o, n, g: z.movedim(0, -1),
    "flatten": lambda z, o, n, g: z.flatten(n % 2),
    "view": lambda z, o, n, g: z.reshape(-1, z.shape[-1]),
    "unflatten": lambda z, o, n, g: z.unsqueeze(0).flatten(0, 1).unflatten(0, (1, -1)),
    "unsqueeze": lambda z, o, n, g: z.unsqueeze(n % (z.dim() + 1)),
    "squeeze": lambda z, o, n, g: z.squeeze(),
    "squeeze one": lambda z, o, n, g: z.squeeze(n % z.dim()),
    "expand": lambda z, o, n, g: z.expand(2, *z.shape),
    "contiguous": lambda z, o, n, g: z.contiguous(),
    "view as": lambda z, o, n, g: z.reshape_as(z.flatten()),
    # rows and classes
    "slice": lambda z, o, n, g: z[1:],
    "slice inside": lambda z, o, n, g: z[:, :-1],
    "slice last": lambda z, o, n, g: z[..., : max(2, z.shape[-1] - 1)],
    "step": lambda z, o, n, g: z[::2],
    "select": lambda z, o, n, g: z[n % z.shape[0]],
    "select last": lambda z, o, n, g: z[..., n % z.shape[-1]],
    "new dimension": lambda z, o, n, g: z[None, ..., None],
    "mask": lambda z, o, n, g: z[torch.rand(z.shape[0], generator=g) > 0.3],
    "mask of two": lambda z, o, n, g: z[torch.rand(z.shape[:2], generator=g) > 0.3],
    "mask of all": lambda z, o, n, g: z[torch.rand(z.shape, generator=g) > 0.3],
    "numbers": lambda z, o, n, g: z[torch.randint(z.shape[0], (3,), generator=g)],
    "numbers inside": lambda z, o, n, g: z[:, torch.randint(z.shape[1], (2,), generator=g)],
    "numbers last": lambda z, o, n, g: z[..., torch.randint(z.shape[-1], (4,), generator=g)],
    "index select": lambda z, o, n, g: z.index_select(n % z.dim(), torch.tensor([0, 0])),
    "take": lambda z, o, n, g: z.take_along_dim(torch.zeros((1,) * z.dim(), dtype=torch.long), -1),
    "chunk": lambda z, o, n, g: z.chunk(2, n % z.dim())[-1],
    "split": lambda z, o, n, g: z.split([1, z.shape[0] - 1])[-1],
    "split anywhere": lambda z, o, n, g: z.split([1, z.shape[n % z.dim()] - 1], n % z.dim())[-1],
    "cat with itself": lambda z, o, n, g: torch.cat([z, z * 1], n % z.dim()),
    "unbind and stack": lambda z, o, n, g: torch.stack(z.unbind(n % z.dim()), n % z.dim()),
    "cat": lambda z, o, n, g: torch.cat([z, z.flip(0), z * 1], n % z.dim()),
    "cat with another": lambda z, o, n, g: torch.cat([z, o], n % z.dim()),
    "flip": lambda z, o, n, g: z.flip(-1),
    "roll": lambda z, o, n, g: z.roll(1, 0),
    "repeat": lambda z, o, n, g: z.repeat_interleave(2, 0),
    # numbers
    "scale": lambda z, o, n, g: z * (n - 2.5),
    "scale from the left": lambda z, o, n, g: 0.5 * z,
    "divide": lambda z, o, n, g: z / (n + 1),
    "negate": lambda z, o, n, g: -z,
    "cap": lambda z, o, n, g: 3 * torch.tanh(z / 3),
    "tanh": lambda z, o, n, g: z.tanh(),
    "add a number": lambda z, o, n, g: z + n,
    "add a vector": lambda z, o, n, g: z + torch.linspace(0, 1, z.shape[-1], dtype=z.dtype),
    "add a row": lambda z, o, n, g: z - z[..., :1],
    "add itself": lambda z, o, n, g: z + z,
    "add another": lambda z, o, n, g: z + 2 * o,
    "subtract another": lambda z, o, n, g: z - o,
    "times another": lambda z, o, n, g: z * o,
    "times a tensor": lambda z, o, n, g: z * torch.tensor(1.5, dtype=z.dtype),
    "from one": lambda z, o, n, g: 1 - z,
    "exponential": lambda z, o, n, g: (z / 4).exp(),
    "square": lambda z, o, n, g: z.square(),
    "clamp": lambda z, o, n, g: z.clamp(-1, 1),
    "where": lambda z, o, n, g: torch.where(z > 0, z, 0.1 * z),
    "softmax": lambda z, o, n, g: z.softmax(n % z.dim()),
    "log-softmax": lambda z, o, n, g: z.log_softmax(-1),
    "centred": lambda z, o, n, g: z - z.mean(-1, keepdim=True),
    # in place
    "times in place": lambda z, o, n, g: z.mul_(1.5),
    "divide in place": lambda z, o, n, g: (z.div_(2), z)[1],
    "cap in place": lambda z, o, n, g: z.tanh_(),
    "add in place": lambda z, o, n, g: z.add_(1),
    "write a row": lambda z, o, n, g: (z[0].fill_(0.5), z)[1],
    "write a class": lambda z, o, n, g: (z.__setitem__((..., 0), -1.0), z)[1],
    "write into a view": lambda z, o, n, g: (z.flatten().mul_(2), z)[1],
    # what autograd is told
    "detached beside": lambda z, o, n, g: z + z.detach(),
    "cloned": lambda z, o, n, g: z.clone(),
    "half of it": lambda z, o, n, g: z.float(),
    "double": lambda z, o, n, g: z.double(),
}


def labels_of(z: Tensor, shape: Any, classes: int) -> Tensor:
    return torch.arange(z.numel() // classes).reshape(shape) % classes


def loss_of_last(z: Tensor) -> Tensor:
    t = labels_of(z, z.shape[:-1], z.shape[-1])
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), t.flatten(), label_smoothing=0.1)


def loss_of_second(z: Tensor) -> Tensor:
    return F.cross_entropy(
        z, labels_of(z, (z.shape[0], *z.shape[2:]), z.shape[1]), reduction="none"
    )


def loss_by_gather(z: Tensor) -> Tensor:
    t = labels_of(z, z.shape[:-1], z.shape[-1])
    return -z.log_softmax(-1).gather(-1, t.unsqueeze(-1)).mean()


LOSSES = {
    "last": loss_of_last,
    "second": loss_of_second,
    "gather": loss_by_gather,
    "nll": lambda z: F.nll_loss(
        z.log_softmax(1), labels_of(z, (z.shape[0], *z.shape[2:]), z.shape[1])
    ),
    "nll of a part": lambda z: F.nll_loss(
        0.5 * z.log_softmax(1), labels_of(z, (z.shape[0], *z.shape[2:]), z.shape[1])
    ),
    "entropy": lambda z: (z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "lse": lambda z: z.logsumexp(-1) - z.logsumexp(0).mean(),
    "square": lambda z: z.square().mean(),
    "sum": lambda z: z.sum(),
    "accuracy": lambda z: z.sum() * z.argmax(-1).double().mean(),
}


def run(program: list[tuple[str, int]], losses: list[str], fused: bool, seed: int) -> Any:
    """What the program gives: losses and gradients, or the class of what was raised."""
    torch.manual_seed(seed)
    heads = nn.ModuleList(
        [nn.Linear(D, C, dtype=torch.double), nn.Linear(D, C, False, dtype=torch.double)]
    )
    x = torch.randn(2, 4, D, dtype=torch.double, requires_grad=True)
    if fused:
        for head in heads:
            custom_ops.fuse(head)
    generator = torch.Generator().manual_seed(seed)
    z, other = heads[0](x), heads[1](x)
    history = [z]
    found: list[Any] = []
    for name, n in program:
        try:
            z = STEPS[name](z, other, n, generator)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            found.append((name, type(error) in (ValueError, RuntimeError, IndexError, TypeError)))
            continue
        if z.numel() == 0 or z.dim() == 0:
            break
        history.append(z)
        strides = [s for s, n in zip(z.stride(), z.shape, strict=True) if n > 1]
        found.append((name, tuple(z.shape), z.dtype, strides, z.requires_grad))
    total = torch.zeros((), dtype=torch.double)
    for at, name in enumerate(losses):
        try:
            loss = LOSSES[name](history[-1 - (at % len(history))])
        except (RuntimeError, IndexError, ValueError, TypeError):
            found.append((name, "refused"))
            continue
        found.append(loss.detach())
        total = total + loss.double().sum()
    if total.requires_grad:
        try:
            total.backward()
        except RuntimeError:
            if fused:
                raise
            return None  # torch refuses it: something that autograd saved was written to
    return found, [None if t.grad is None else t.grad.clone() for t in (x, *heads.parameters())]


def check(program: list[tuple[str, int]], losses: list[str], seed: int) -> None:
    expected = run(program, losses, False, seed)
    if expected is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = run(program, losses, True, seed)
    single = any(name == "half of it" for name, _ in program)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if single else {"rtol": 1e-7, "atol": 1e-8}
    assert len(expected[0]) == len(got[0])
    for a, b in zip(expected[0], got[0], strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, equal_nan=True, **tolerance)
        else:
            assert a == b
    for a, b in zip(expected[1], got[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, equal_nan=True, **tolerance)


steps = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5)), max_size=7)
losses = st.lists(st.sampled_from(sorted(LOSSES)), min_size=1, max_size=3)


@given(steps, losses, st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_a_random_program_gives_what_the_real_logits_give(program: Any, losses: Any, seed: int):
    check(program, losses, seed)


@pytest.mark.audit
@given(steps, losses, st.integers(0, 1000))
@settings(max_examples=20000, deadline=None)
@pytest.mark.timeout(3000)
def test_many_random_programs(program: Any, losses: Any, seed: int):
    check(program, losses, seed)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("loss", LOSSES)
def test_each_step_before_each_loss(step: str, loss: str):
    for n in range(3):
        check([(step, n)], [loss], 0)
