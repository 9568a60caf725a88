"""Calls of the ops on CPU tensors, as on a device: Triton's kernels, compiled and not run.

Run by test_launches.py with a driver that writes launches down. Prints for each call where
its tensors lie, and what was launched for it: the first time by Triton, then by the node.
"""

import json
import os
import sys
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.driver import CudaDriver

driver = CudaDriver()
driver.get_current_device = lambda: 0
driver.get_current_stream = lambda _: 0
driver.get_device_capability = lambda _=0: (9, 0)
triton.runtime.driver.set_active(driver)

from custom_ops import cross_entropy, log_softmax, softmax  # noqa: E402
from custom_ops.kernels import cpu  # noqa: E402
from custom_ops.kernels.cuda import cross_entropy as kernels  # noqa: E402
from custom_ops.kernels.cuda.record import READY, record_of  # noqa: E402
from custom_ops.node.launcher import FUNCTIONS  # noqa: E402

cpu.library.set_launcher("cpu", FUNCTIONS)
kernels.checked_labels = lambda target, *_: target  # which on a device nobody looks at either
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
ALL = {"label_smoothing": 0.1, "z_loss": 0.1, "logit_scale": 0.5, "softcap": 30.0}


def rows(n: int, classes: int, dtype: torch.dtype = F32, *, apart: int = 0, off: int = 0) -> Tensor:
    """Logits: `apart` numbers between the rows, beginning `off` numbers behind a multiple of 16."""
    memory = torch.zeros(n * (classes + apart) + off, dtype=dtype)[off:]
    return memory.view(n, classes + apart)[:, :classes].requires_grad_()


def labels(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


CALLS = {
    "mnist": (cross_entropy, lambda: (rows(128, 10), labels(128)), {}),
    "a sum": (cross_entropy, lambda: (rows(128, 10), labels(128)), {"reduction": "sum"}),
    "a loss a row": (
        cross_entropy,
        lambda: (rows(128, 10, BF16), labels(128)),
        {"reduction": "none"},
    ),
    "statistics": (cross_entropy, lambda: (rows(9, 70), labels(9)), {"return_stats": True}),
    "one row": (cross_entropy, lambda: (rows(1, 10), labels(1)), {}),
    "one class": (cross_entropy, lambda: (rows(5, 1), labels(5)), {}),
    "float64": (cross_entropy, lambda: (rows(33, 7, F64), labels(33)), ALL),
    "bfloat16 in chunks": (cross_entropy, lambda: (rows(3, 40_000, BF16), labels(3)), {}),
    "labels, smoothed and weighted": (
        cross_entropy,
        lambda: (rows(6, 9), labels(6), torch.ones(9)),
        ALL,
    ),
    "probabilities and a weight": (
        cross_entropy,
        lambda: (rows(6, 9), torch.zeros(6, 9), torch.ones(9)),
        ALL,
    ),
    "a normalizer": (cross_entropy, lambda: (rows(6, 9), labels(6)), {"normalizer": 3.5}),
    "pixels": (
        cross_entropy,
        lambda: (torch.zeros(2, 5, 3, 4).requires_grad_(), labels(2, 3, 4)),
        {},
    ),
    "rows apart": (cross_entropy, lambda: (rows(8, 9, apart=3), labels(8)), {}),
    "off by a number": (cross_entropy, lambda: (rows(8, 12, off=1), labels(9)[1:]), {}),
    "softmax": (softmax, lambda: (rows(64, 1000),), {"dim": 1}),
    "softmax along itself": (softmax, lambda: (rows(64, 1000),), {"dim": 1}),
    "softmax once more": (softmax, lambda: (rows(64, 1000),), {"dim": 1}),
    "softmax of odd rows": (softmax, lambda: (rows(5, 33, BF16, apart=2),), {"dim": 1}),
    "log-softmax in chunks": (log_softmax, lambda: (rows(2, 40_000),), {"dim": 1}),
}


def launches() -> list[str]:
    """Return what was launched since it was asked last."""
    log = Path(os.environ["LAUNCHES"])
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("")
    return lines


def run(name: str, tensors: tuple[Tensor, ...]) -> dict:
    op, _, options = CALLS[name]
    result = op(*tensors, **options)
    result = result[0] if "return_stats" in options else result
    g = result.detach() if name == "softmax along itself" else torch.ones_like(result)
    (d,) = torch.autograd.grad(result, tensors[0], g)
    addresses = [t.data_ptr() for t in (*tensors, g, result, d)]
    return {"addresses": addresses, "launches": launches(), "node": result.grad_fn.name()}


for name in sys.argv[1:] or CALLS:
    make = CALLS[name][1]
    first = make()
    runs = [run(name, tensors) for tensors in (first, first, make())]
    print(json.dumps({"name": name, "runs": runs}), flush=True)


record_of(labels(1)).memory.host[READY] = 1
try:
    cross_entropy(*CALLS["mnist"][1]())
    told = ""
except IndexError as error:
    told = str(error)
print(json.dumps({"name": "a bad label", "runs": [told, launches()]}))
