"""DDP and FSDP2 around a model whose last layer and loss are one module: two processes, gloo.

Each process sees its half of the rows. What the two end up with must be the gradients that one
process gets from the whole batch; in float64, so that the order of the sums is no excuse.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from custom_ops import LinearCrossEntropyLoss

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo"
)

WORLD = 2
ROWS, FEATURES, CLASSES = 16, 6, 11

# The two halves have 8 and 3 labels that count, so that a mean of their means is not the mean.
IGNORED = [9, 10, 12, 13, 15]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(FEATURES, 8, dtype=torch.double), nn.Tanh())
        self.loss = LinearCrossEntropyLoss(
            8, CLASSES, bias=True, dtype=torch.double, label_smoothing=0.1, block_rows=3
        )

    def forward(self, x: Tensor, target: Tensor, normalizer: float | None = None) -> Tensor:
        return self.loss(self.trunk(x), target, normalizer=normalizer)


def batch(ignored: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, FEATURES, dtype=torch.double, generator=generator)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[ignored] = -100
    return x, target


def with_ddp(model: Model) -> tuple[nn.Module, Callable[[], Any]]:
    wrapped = DistributedDataParallel(model)
    return wrapped, wrapped.no_sync


def with_fsdp(model: Model) -> tuple[nn.Module, Callable[[], Any]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model.trunk, mesh=mesh)
    fully_shard(model.loss, mesh=mesh)
    wrapped = fully_shard(model, mesh=mesh)
    assert all(p.numel() > p.to_local().numel() for p in model.parameters())  # it is shared out

    def no_sync() -> Any:
        wrapped.set_requires_gradient_sync(False)
        return nullcontext()

    return wrapped, no_sync


WRAPPERS = {"ddp": with_ddp, "fsdp": with_fsdp}


def work(rank: int, folder: str, wrapper: str, ignored: list[int], micro_batches: int) -> None:
    """Be one of the processes; the first leaves the gradients in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    model = Model()
    wrapped, no_sync = WRAPPERS[wrapper](model)
    x, target = batch(ignored)
    # Both take the mean over the processes' gradients: each must divide by its share of the rows.
    normalizer = (target != -100).sum().item() / WORLD if ignored else None
    rows = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
    parts = list(zip(x[rows].chunk(micro_batches), target[rows].chunk(micro_batches), strict=True))
    for part in parts[:-1]:
        with no_sync():
            wrapped(*part, normalizer=normalizer).backward()
    if wrapper == "fsdp":
        wrapped.set_requires_gradient_sync(True)
    wrapped(*parts[-1], normalizer=normalizer).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        gradients[name] = gradient.full_tensor() if wrapper == "fsdp" else gradient
    if rank == 0:
        torch.save(gradients, Path(folder, "gradients"))
    dist.barrier()
    # Past the interpreter's end: FSDP holds the process group, and gloo's threads, destroyed there
    # while they run, now and then abort it ("terminate called without an active exception").
    os._exit(0)


def check(folder: Path, wrapper: str, ignored: list[int], micro_batches: int) -> None:
    torch.multiprocessing.spawn(work, (str(folder), wrapper, ignored, micro_batches), WORLD)
    got = torch.load(folder / "gradients", weights_only=True)
    alone = Model()
    alone(*batch(ignored)).backward()
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_get_the_gradients_of_the_whole_batch(tmp_path: Path, wrapper: str):
    check(tmp_path, wrapper, [], micro_batches=1)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_normalizer_makes_up_for_ignored_rows_and_micro_batches(tmp_path: Path, wrapper: str):
    check(tmp_path, wrapper, IGNORED, micro_batches=2)
