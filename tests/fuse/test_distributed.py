"""DDP, FSDP2 and FSDP1 around a model with a fused head, two processes: the gradients of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import custom_ops

from .conftest import CLASSES, FEATURES, fused
from .test_heads import Model

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo"
)

WORLD, ROWS = 2, 8


class WithLoss(Model):
    """A model that makes its loss itself, and gives the logits too."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        z = super().forward(x)
        return F.cross_entropy(z.float().double(), y), z


def own_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x, y)[0]


def callers_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).float().double(), y)


def rows_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return -model(x).log_softmax(-1).gather(1, y[:, None]).mean()


def with_ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options)


def with_unused(model: nn.Module) -> nn.Module:
    return with_ddp(model, find_unused_parameters=True)


def with_static_graph(model: nn.Module) -> nn.Module:
    return with_ddp(model, static_graph=True)


def mesh() -> Any:
    return dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))


def fsdp_root(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh())


def fsdp_layers(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.trunk, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def fsdp_head(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.head, mesh=mesh(), reshard_after_forward=True)
    return fsdp_layers(model)


def fsdp_head_first(model: nn.Module) -> nn.Module:
    model = custom_ops.unfuse(model)
    model = fsdp_head(model)
    return custom_ops.fuse(model, "head")


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def tensor_parallel(model: nn.Module) -> nn.Module:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    return parallelize_module(model, mesh(), {"head": ColwiseParallel(output_layouts=Replicate())})


WRAPPERS = {
    "ddp": with_ddp,
    "ddp, unused": with_unused,
    "ddp, static": with_static_graph,
    "fsdp, root": fsdp_root,
    "fsdp, layers": fsdp_layers,
    "fsdp, head": fsdp_head,
    "fsdp, head, fused last": fsdp_head_first,
    "fsdp1": fsdp1,
    "tensor parallel": tensor_parallel,
}
LOSSES = {"own": own_loss, "caller's": callers_loss, "rows": rows_loss}


def steps(
    model: nn.Module, loss: Callable[..., Tensor], rows: slice, count: int = 3
) -> list[float]:
    """Train; return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    found = []
    for n in range(count):
        generator = torch.Generator().manual_seed(n)
        x = torch.randn(ROWS, FEATURES, dtype=torch.double, generator=generator)
        y = torch.randint(CLASSES, (ROWS,), generator=generator)
        value = loss(model, x[rows], y[rows])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(value.item())
    return found


def make(loss: str) -> nn.Module:
    torch.manual_seed(0)
    return (WithLoss() if loss == "own" else Model()).double()


def process(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    half = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
    found = {}
    for wrapper, wrap in WRAPPERS.items():
        for loss, of in LOSSES.items():
            model = custom_ops.fuse(make(loss), "head")
            try:
                wrapped = wrap(model)
                values = steps(wrapped, of, slice(None) if wrap is tensor_parallel else half)
                whole = {
                    n.removeprefix("module."): p.full_tensor() if hasattr(p, "full_tensor") else p
                    for n, p in wrapped.state_dict().items()
                }
                found[wrapper, loss] = values, whole, fused(model), custom_ops.materialized(model)
            except Exception as error:
                found[wrapper, loss] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{results}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    args = (str(folder / "store"), str(folder / "results"))
    environment = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        torch.multiprocessing.spawn(process, args, nprocs=WORLD)
    finally:
        if environment is None:
            del os.environ["GLOO_SOCKET_IFNAME"]
    return [torch.load(Path(f"{args[1]}.{r}"), weights_only=False) for r in range(WORLD)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_weights_after_three_steps_are_those_of_one_process(
    wrapper: str, loss: str, found: Any
):
    mine = [of[wrapper, loss] for of in found]
    assert not any(isinstance(result, str) for result in mine), mine
    model = make(loss)
    steps(model, LOSSES[loss], slice(None))
    # It hands the output to a Function of its own, whose backward must run; or W is a DTensor.
    sink = wrapper in ("ddp, unused", "ddp, static") and loss != "own"
    sink |= wrapper == "tensor parallel"
    for _, weights, losses, computed in mine:
        torch.testing.assert_close(weights, dict(model.state_dict()), rtol=1e-6, atol=1e-7)
        assert sink or (losses == 3 and not computed)
