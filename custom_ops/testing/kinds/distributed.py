"""Two processes, each with its part of some inputs, beside the reference on the whole."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from custom_ops.testing.compare import ROUNDINGS, differing, owed, run
from custom_ops.testing.double import widest
from custom_ops.testing.entry import Check
from custom_ops.testing.subject import Subject, make_subject
from custom_ops.testing.verdict import Fault, NotApplicable

__all__ = ["CHECKS"]

PROCESSES = 2


def two_processes(subject: Subject) -> str:
    """Each of two processes gives the reference's result, and its part of the gradient."""
    if not subject.shards:
        raise NotApplicable("no shards= was given")
    double = widest(subject)
    want = run(double.of_reference())
    names = owed(double.of_reference())
    try:
        pickle.dumps(subject.function)
    except Exception as error:
        raise NotApplicable(
            f"the function cannot be sent to another process: {str(error)[:80]}"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        inputs = [x.detach() if isinstance(x, Tensor) else x for x in double.inputs]
        arguments = (folder, subject.function, inputs, double.wrt, subject.shards, subject.seed)
        try:
            mp.spawn(_work, arguments, nprocs=PROCESSES)
        except Exception as error:
            last = str(error).strip().split("\n")[-1]
            raise Fault(f"one of two processes raises {last[:200]}", "distributed") from error
        for rank in range(PROCESSES):
            got = torch.load(Path(folder) / f"{rank}.pt")
            _compare(double, rank, got, want, names)
    return "two processes"


def _compare(
    subject: Subject,
    rank: int,
    got: list[Tensor | None],
    want: list[Tensor | None],
    names: list[str],
) -> None:
    parts = list(want)
    n = len(want) - len(subject.wrt)
    for k, i in enumerate(subject.wrt):
        d = parts[n + k]
        if i in subject.shards and d is not None:
            parts[n + k] = d.chunk(PROCESSES, subject.shards[i])[rank]
    found = differing(got, parts, names, 16 * ROUNDINGS)
    if found is not None:
        raise Fault(
            f"{found}, the reference's on the whole, in process {rank} of {PROCESSES}",
            "distributed",
        )


def _work(
    rank: int,
    folder: str,
    function: Any,
    inputs: list[Any],
    wrt: tuple[int, ...],
    shards: dict[int, int],
    seed: int,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES
    )
    own = [
        x.chunk(PROCESSES, shards[i])[rank].clone() if i in shards else x
        for i, x in enumerate(inputs)
    ]
    own = [x.requires_grad_() if i in wrt else x for i, x in enumerate(own)]
    try:
        torch.save(run(make_subject(function, own, seed=seed)), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


CHECKS = (Check("distributed", "two processes", two_processes, asked=True),)
