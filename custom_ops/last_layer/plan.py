"""In which order the last layer is taken, by the memory that it may use beyond the gradients.

With N rows, D features, C classes and e bytes a number, the three products are 6 N D C operations,
and whatever order is chosen reads z, and reads and writes it once more: 3 N C e bytes. Then

    whole      all logits at once, N C e bytes, until the backward
    classes    S of them at a time: dx is added up and dW[S] is one product. The logits of D of the
               N rows lie in dW's own memory, which is idle until then, and of more rows where
               memory is left; those of the others are computed again
    rows       n of them at a time: dW is added up. The gradient of Σℓ is taken in the forward; of
               a loss a row the logits are computed again

`classes` takes 3 + max(0, 1 − min(1, D/N) − extra/(N C e)) products, `extra` the bytes of logits
kept beyond dW's memory. What is added up is read and written with every block, half of it while a
product is computed. For the half types that is done in float32, 4 bytes a number beyond the
gradient. On a GPU the model is within 0.04 of what an H200 took, in bare products, for each order
at three sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from torch import Tensor

from custom_ops.last_layer.layer import Layer

__all__ = ["Plan", "Sizes", "default_memory", "parts", "plan_of", "planned", "rows_at_a_time"]

SLABS = (16_384, 8192, 4096, 2048, 1024, 512, 256, 128)  #: classes at a time


class Device(NamedTuple):
    """What is known of a kind of device."""

    memory: int  #: bytes that may be used where nothing is said
    least_rows: int  #: or the logits of so many rows: each block reads W and all of dW
    operations: int  #: in the time of a byte
    fresh: int  #: bytes in the time in which memory is got for one
    call: int  #: bytes in the time of an operator's call, 5 µs


#: On a CPU memory is the goal; what is got from the system costs page faults. Two cores of a Xeon
#: with AVX-512 gave these numbers. A GPU does 300 half-precision operations in the time of a byte
#: (H100: 989 TFLOP/s, 3.35 TB/s), and torch keeps its memory.
DEVICES = {
    "cpu": Device(50 << 20, 64, 10, 8, 100_000),
    "cuda": Device(512 << 20, 256, 300, 0, 16_000_000),
}
#: Operators that are called for a block or a slab, forward and backward.
CALLS = {"whole": 15, "rows": 15, "classes": 60}


class Sizes(NamedTuple):
    """What the choice depends on."""

    rows: int  #: N
    features: int  #: D
    classes: int  #: C
    itemsize: int  #: e
    device: str = "cuda"
    total: bool = True
    wants_x: bool = True
    wants_W: bool = True

    @staticmethod
    def of(layer: Layer) -> Sizes:
        """Return a layer's."""
        x, blocks = layer.x, layer.blocks
        device = "cuda" if x.device.type == "cuda" else "cpu"
        # a length is a number also where torch.onnx traces sizes
        N, D, C = len(x), len(x.t()), len(layer.W)
        return Sizes(N, D, C, x.itemsize, device, blocks.total, *blocks.wanted[:2])

    @property
    def logit_bytes(self) -> int:
        """Of a row."""
        return self.classes * self.itemsize

    @property
    def products(self) -> int:
        """Numbers of dx and dW."""
        return (self.rows * self.wants_x + self.classes * self.wants_W) * self.features

    @property
    def least(self) -> int:
        """Products that nobody can do without."""
        return 1 + self.wants_x + self.wants_W

    @property
    def wide(self) -> int:
        """Bytes beyond the gradient of each number that is added up."""
        return 4 if self.itemsize == 2 else 0


class Plan(NamedTuple):
    """An order, and what it takes."""

    order: Literal["whole", "classes", "rows"]
    block: int  #: rows or classes at a time
    kept: int  #: rows whose logits are kept until the backward, in dW's memory and beyond it
    bytes: int  #: beyond the gradients
    products: float  #: of 2 N D C operations
    floors: float  #: the estimated time, in that of three bare products


def planned(layer: Layer, *, by_classes: bool) -> Plan:
    """Return the plan of a layer; `by_classes` says whether that order is possible."""
    s, blocks = Sizes.of(layer), layer.blocks
    if blocks.rows or not (blocks.plans and any(blocks.wanted)):
        return _by_rows(s, rows_at_a_time(layer, s.logit_bytes, s.wide * s.products))
    memory = default_memory(s) if blocks.memory is None else blocks.memory
    return plan_of(s, memory, by_classes)


def default_memory(s: Sizes) -> int:
    """Return what may be used where nothing is said: on CUDA as much as the gradients, or more."""
    device = DEVICES[s.device]
    gradients = (s.rows + s.classes) * s.features * s.itemsize if s.device == "cuda" else 0
    return max(device.memory, device.least_rows * s.logit_bytes, gradients)


@lru_cache(maxsize=256)
def plan_of(s: Sizes, memory: int, by_classes: bool = True) -> Plan:
    """Return the fastest plan within so many bytes beyond the gradients, or else the smallest."""
    whole = Plan("whole", s.rows, s.rows, s.rows * s.logit_bytes, s.least, 0)
    plans = [whole._replace(floors=_floors(s, whole, 0))]
    for bytes in {memory, min(memory, default_memory(s))}:
        plans.append(_by_rows(s, _even(s.rows, _rows_within(s, bytes))))
    if by_classes:
        plans.extend(_by_classes(s, memory))
        plans.extend(_by_classes(s, 0))  # what is kept in dW alone
    fitting = [plan for plan in plans if plan.bytes <= memory]
    if not fitting:
        return min(plans, key=lambda plan: plan.bytes)
    return min(fitting, key=lambda plan: (plan.floors, plan.bytes))


def rows_at_a_time(layer: Layer, row_bytes: int, sums: int = 0, least: int = 1) -> int:
    """Return the rows of a block whose numbers take `row_bytes` a row, beside `sums` in float32."""
    s, blocks = Sizes.of(layer), layer.blocks
    if blocks.rows:
        return blocks.rows
    if blocks.memory is None:
        most = max(default_memory(s) // max(row_bytes, 1), least)
    else:
        most = max(_beside(blocks.memory, sums) // max(row_bytes, 1), 1)
    return _even(s.rows, most)


def parts(x: Tensor, size: int) -> Iterator[slice]:
    """Yield the rows of each block of x."""
    for start in range(0, len(x), size):
        yield slice(start, min(start + size, len(x)))


def _even(rows: int, most: int) -> int:
    """The rows of a block, all blocks of a size, as many as `most` makes."""
    return -(-rows // max(-(-rows // most), 1)) or 1


def _rows_within(s: Sizes, memory: int) -> int:
    return max(_beside(memory, s.wide * s.products) // max(s.logit_bytes, 1), 1)


def _beside(memory: int, sums: int) -> int:
    """What a block may take beside float32 sums, before these become gradients of half the size."""
    return max(memory - sums, 0) + sums // 2


def _by_rows(s: Sizes, block: int) -> Plan:
    sums = s.wide * s.products
    taken = sums + max(0, block * s.logit_bytes - sums // 2)
    plan = Plan("rows", block, 0, taken, s.least + (not s.total), 0)
    added = -(-s.rows // max(block, 1)) * 8 * s.classes * s.features * s.wants_W
    return plan._replace(floors=_floors(s, plan, added))


def _by_classes(s: Sizes, memory: int) -> Iterator[Plan]:
    N, D, C, e, *_ = s
    in_dW = D if s.wants_W else 0
    for slab in SLABS:
        block = min(slab, C)
        needed = N * block * e + s.wide * N * D * s.wants_x
        kept = min(N, in_dW + max(0, memory - needed) // max(C * e, 1))
        extra = max(0, kept - in_dW) * C * e
        products = s.least + (N - kept) / max(N, 1)
        plan = Plan("classes", block, kept, needed + extra, products, 0)
        added = -(-C // max(block, 1)) * 8 * N * D * s.wants_x
        yield plan._replace(floors=_floors(s, plan, added))


def _floors(s: Sizes, plan: Plan, added: int) -> float:
    device = DEVICES[s.device]
    product = 2 * s.rows * s.features * s.classes / device.operations
    computed = plan.products * product + 3 * s.rows * s.logit_bytes + device.fresh * plan.bytes
    # where little is computed, nothing hides what is added up
    computed = max(computed + added / 2, added)
    parts = -(-(s.classes if plan.order == "classes" else s.rows) // max(plan.block, 1))
    called = parts * CALLS[plan.order] * device.call
    # a GPU computes while the next operators are called
    taken = max(computed, called) if s.device == "cuda" else computed + called
    return taken / max(3 * product, 1)
