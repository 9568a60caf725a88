"""The same calls on two devices that are not there, on streams of their own, and in threads.

Run by test_launches.py, with the library built from device.cpp as its argument and a driver that
writes launches down. Prints for each call its device and stream, and what was launched for it.
"""

import importlib.util
import json
import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.driver import CudaDriver

spec = importlib.util.spec_from_file_location("fake_device", sys.argv[1])
fake = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake)


@contextmanager
def on_device(device: torch.device):
    before = fake.current_device()
    fake.set_device(device.index)
    yield
    fake.set_device(before)


torch.cuda._lazy_init = lambda: None
torch.cuda.current_device, torch.cuda.device = fake.current_device, on_device
driver = CudaDriver()
driver.get_current_device, driver.get_current_stream = fake.current_device, fake.stream
driver.get_device_capability = lambda _=0: (9, 0)
triton.runtime.driver.set_active(driver)

from custom_ops import cross_entropy, softmax  # noqa: E402
from custom_ops.kernels import Options, Problem, Rows, cpu, cuda  # noqa: E402
from custom_ops.kernels.cuda import cross_entropy as kernels  # noqa: E402
from custom_ops.kernels.cuda import operators, record  # noqa: E402
from custom_ops.kernels.labels import reported  # noqa: E402
from custom_ops.node.launcher import FUNCTIONS  # noqa: E402

cpu.library.set_launcher("cuda", FUNCTIONS)
cuda.library, cuda._tried = operators, True
cuda.set_launched(cpu.library.launched)
kernels.checked_labels = lambda target, *_: target
for device in (0, 1):
    there = torch.device("cuda", device)
    record._records[there] = record.Record(torch.device("cpu"))
log = Path(os.environ["LAUNCHES"])


def tensors(device: int, rows: int) -> tuple[Tensor, ...]:
    """Logits, labels, and the upstream gradients of a softmax and of a loss."""
    labels = torch.zeros(rows, dtype=torch.int64)
    host = torch.zeros(rows, 10), labels, torch.ones(rows, 10), torch.ones(())
    x, target, g, one = (fake.on(t, device) for t in host)
    return x.requires_grad_(), target, g, one


def run(device: int, stream: int, rows: int = 128) -> None:
    fake.set_stream(device, stream)
    x, target, g, one = tensors(device, rows)
    for result, upstream in ((cross_entropy(x, target), one), (softmax(x, 1), g)):
        assert result.device == x.device
        with torch.no_grad():  # as the engine calls a node
            gradient, *_ = (
                found if isinstance(found := result.grad_fn(upstream), tuple) else (found,)
            )
        assert (gradient.device, gradient.shape) == (x.device, x.shape)


def through_the_door(device: int, rows: int, **options) -> dict[str, list[str]]:
    """What the last layer calls, and what is launched for each."""
    x, target, _, _ = tensors(device, rows)
    o = Options(dim=1, dtype=torch.float32, **options)
    problem, found = Problem(x.detach(), target, None, o), {}
    ones = fake.on(torch.ones(()), device).expand(rows)
    found_rows = cuda.kernels.cross_entropy(problem)
    assert (found_rows.prediction is None) == (not o.stats)
    found["rows"] = launches()
    with reported():
        assert cuda.kernels.cross_entropy(problem).M.shape == (rows,)
    found["rows of labels that were looked at"] = launches()
    up = Rows(ones, None, found_rows.M, found_rows.L)
    d = cuda.kernels.cross_entropy_vjp(problem, up)
    assert d.shape == x.shape
    found["gradient"] = launches()
    cuda.kernels.cross_entropy_vjp_out(problem, up, d)
    found["gradient into memory"] = launches()
    version = problem.input._version
    assert cuda.kernels.cross_entropy_vjp_(problem, up).data_ptr() == x.data_ptr()
    assert problem.input._version > version
    found["gradient in place"] = launches()
    return found


def launches() -> list[str]:
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("")
    return lines


def told(name: str, device: int, stream: int) -> None:
    handle = fake.stream(device)
    line = {"name": name, "device": device, "stream": handle, "launches": launches()}
    print(json.dumps(line), flush=True)


for current in (0, 1):  # the device of a call is its tensors', whichever is the current one
    fake.set_device(current)
    for device, stream in ((0, 0), (1, 0), (0, 0), (1, 0), (0, 7), (1, 9)):
        run(device, stream)
        told("in turns", device, stream)
        assert fake.current_device() == current


for name, options in {"plain": {}, "all": {"z_loss": 0.1, "stats": True}}.items():
    runs = [through_the_door(1, 37, **options) for _ in range(3)]
    print(json.dumps({"name": "door", "options": name, "runs": runs}), flush=True)


def worker(device: int, stream: int) -> None:
    for _ in range(20):
        run(device, stream)


workers = [threading.Thread(target=worker, args=(i % 2, 16 + i)) for i in range(4)]
for thread in workers:
    thread.start()
for thread in workers:
    thread.join()
print(json.dumps({"name": "threads", "launches": launches()}), flush=True)
