"""DTensor in two processes: value and every gradient are those of the whole tensors."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db

import custom_ops

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo"
)

WORLD, N, C, D = 2, 7, 5, 3  # 7 rows and 5 classes are shared out unevenly


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.double, generator=generator)

    labels = torch.randint(C, (N,), generator=generator)
    labels[1] = -100
    return {
        "z": random(N, C),
        "x": random(N, D),
        "W": random(C, D),
        "b": random(C),
        "weight": random(C).abs(),
        "labels": labels,
        "probabilities": random(N, C).softmax(1),
    }


class Mesh:
    """The processes, and how a tensor is put on them."""

    def __init__(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

        self.mesh = init_device_mesh("cpu", (WORLD,))
        self.DTensor, self.distribute = DTensor, distribute_tensor
        self.placements = {"replicated": Replicate(), "rows": Shard(0), "classes": Shard(1)}

    def put(self, t: Tensor, where: str = "replicated") -> Any:
        placed = self.distribute(t.clone(), self.mesh, [self.placements[where]])
        return placed.requires_grad_() if t.is_floating_point() else placed

    def whole(self, t: Any) -> Tensor:
        return t.full_tensor() if isinstance(t, self.DTensor) else t

    def check(self, got: Any, inputs: list[Any], want: Tensor, leaves: list[Tensor]) -> None:
        """The values, and the gradients of a sum with another factor for each row."""
        assert_close(self.whole(got), want)
        v = torch.arange(1.0, want.numel() + 1, dtype=want.dtype).cos().reshape(want.shape)
        (got * self.distribute(v, self.mesh, got.placements)).sum().backward()
        (want * v).sum().backward()
        for a, c in zip(inputs, leaves, strict=True):
            assert_close(self.whole(a.grad), c.grad)
            if not torch.__version__.startswith("2.11"):  # which replicates some of them
                assert a.grad.placements == a.placements


def softmaxes(m: Mesh) -> Iterator[None]:
    for where in m.placements:
        for ours, theirs in (
            (custom_ops.softmax, F.softmax),
            (custom_ops.log_softmax, F.log_softmax),
        ):
            for dim in (0, 1, -1):
                z, leaf = m.put(tensors()["z"], where), tensors()["z"].requires_grad_()
                m.check(ours(z, dim), [z], theirs(leaf, dim), [leaf])
                yield


def cross_entropies(m: Mesh) -> Iterator[None]:
    from torch.distributed.tensor.parallel import loss_parallel

    for where in m.placements:
        for kind in ("labels", "probabilities"):
            for reduction in ("mean", "sum", "none"):
                for weighted in (False, True):
                    for plain_target in (False, True):
                        t = tensors()
                        of_rows = where if where == "rows" else "replicated"
                        target = t[kind] if plain_target else m.put(t[kind], of_rows).detach()
                        z, w = m.put(t["z"], where), m.put(t["weight"])
                        parallel = loss_parallel() if where == "classes" else nullcontext()
                        with parallel:
                            got = custom_ops.cross_entropy(
                                z, target, w if weighted else None, reduction=reduction
                            )
                        leaves = [t["z"].requires_grad_(), t["weight"].requires_grad_()]
                        # of one process: torch has no gradient to the weights of labels
                        want = custom_ops.cross_entropy(
                            leaves[0], t[kind], leaves[1] if weighted else None, reduction=reduction
                        )
                        if not weighted:
                            want = F.cross_entropy(leaves[0], t[kind], reduction=reduction)
                        m.check(got, [z, w][: 1 + weighted], want, leaves[: 1 + weighted])
                        yield


def last_layers(m: Mesh) -> Iterator[None]:
    for where in m.placements:
        for of_W in m.placements:
            for kind in ("labels", "probabilities"):
                for reduction in ("mean", "sum", "none"):
                    t = tensors()
                    x, W, b = m.put(t["x"], where), m.put(t["W"], of_W), m.put(t["b"])
                    got = custom_ops.linear_cross_entropy(x, W, t[kind], b, reduction=reduction)
                    leaves = [t[name].requires_grad_() for name in ("x", "W", "b")]
                    want = F.cross_entropy(F.linear(*leaves), t[kind], reduction=reduction)
                    m.check(got, [x, W, b], want, leaves)
                    yield


def statistics(m: Mesh) -> Iterator[None]:
    t = tensors()
    z = m.put(t["z"], "rows")
    _, stats = custom_ops.cross_entropy(z, t["labels"], return_stats=True, z_loss=0.1)
    _, want = custom_ops.cross_entropy(t["z"], t["labels"], return_stats=True, z_loss=0.1)
    assert_close([m.whole(s) for s in stats], list(want))
    yield


def beyond_torch(m: Mesh) -> Iterator[None]:
    """torch takes the mean of the processes' weighted means: another number."""
    t = tensors()
    t["z"], t["labels"] = t["z"][:6], t["labels"][:6]  # it refuses what is uneven
    z, target, weight = m.put(t["z"], "rows"), m.put(t["labels"], "rows"), m.put(t["weight"])
    want = F.cross_entropy(t["z"], t["labels"], t["weight"])
    assert_close(m.whole(custom_ops.cross_entropy(z, target, weight.detach())), want)
    theirs = m.whole(F.cross_entropy(z, target, weight.detach()))
    assert abs(theirs - want) > 1e-3
    yield


def half_precision(m: Mesh) -> Iterator[None]:
    """Sums are taken in float32, and the loss is rounded once."""
    z = torch.randn(600, C, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = torch.arange(600) % C
    for reduction in ("mean", "sum"):
        got = custom_ops.cross_entropy(m.put(z, "rows"), target, reduction=reduction)
        assert got.dtype == torch.bfloat16
        want = F.cross_entropy(z.double(), target, reduction=reduction).bfloat16()
        assert_close(m.whole(got), want)
        yield


def refusals(m: Mesh) -> Iterator[None]:
    t = tensors()
    x, W = m.put(t["x"], "rows"), m.put(t["W"])
    for args in ((x, t["W"]), (t["x"], W)):
        with pytest.raises(RuntimeError, match="must be a DTensor, as another argument is one"):
            custom_ops.linear_cross_entropy(*args, t["labels"])
        yield
    with pytest.raises(RuntimeError, match="must hold a label for each row"):
        custom_ops.cross_entropy(m.put(t["z"], "rows"), t["labels"][:3])
    yield


def torchs_samples(m: Mesh) -> Iterator[None]:
    """Rows shared out where there are any; torch's own answer for the whole."""
    pairs = {
        "softmax": (custom_ops.softmax, F.softmax),
        "log_softmax": (custom_ops.log_softmax, F.log_softmax),
        "nn.functional.cross_entropy": (custom_ops.cross_entropy, F.cross_entropy),
    }
    for name, (ours, theirs) in pairs.items():
        (info,) = (i for i in op_db if i.name == name and i.variant_test_name == "")
        for s in info.sample_inputs("cpu", torch.double, requires_grad=True):
            where = "rows" if s.input.dim() > 1 else "replicated"
            z, leaf = m.put(s.input.detach(), where), s.input.detach().requires_grad_()
            got = ours(z, *s.args, **s.kwargs)
            want = theirs(leaf, *s.args, **s.kwargs)
            m.check(got, [z], want, [leaf])
            yield


PARTS: dict[str, Callable[[Mesh], Iterator[None]]] = {
    part.__name__: part
    for part in (
        *(softmaxes, cross_entropies, last_layers, statistics),
        *(beyond_torch, half_precision, refusals, torchs_samples),
    )
}


def work(rank: int, folder: str) -> None:
    """Be one of the processes; the first leaves a line for each part: its cases, or what failed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    mesh = Mesh()
    for name, part in PARTS.items():
        try:
            found = f"{sum(1 for _ in part(mesh))} cases"
        except Exception:
            found = traceback.format_exc()
        if rank == 0:
            Path(folder, name).write_text(found)
    os._exit(0)  # see test_distributed.py


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, (str(folder),), WORLD)
    return folder


@pytest.mark.parametrize("part", PARTS)
def test_two_processes_have_the_answer_of_one(results: Path, part: str):
    found = (results / part).read_text()
    assert found.endswith("cases"), found
    assert found != "0 cases"
