"""The last layer in one piece, beside the three matrix products that nobody can do without.

The floor is h Wᵀ, G W and Gᵀ h of the same sizes and type, each into memory of its own, as a model
written with torch has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import custom_ops
from benchmarks.contestants import BUILTIN, OURS, Contestant
from benchmarks.goals import Goal, judge
from benchmarks.timing import Effort, in_turns

FLOOR, ONE_PRODUCT = "three products", "one product"
CHUNKED, FORWARD, HVP = "chunked", "forward", "hvp"
#: Ours within other than its default memory.
WITHIN = {
    "ours in 320 MiB": 320 << 20,
    "ours in 614 MiB": 614 << 20,
    "ours in 2 GiB": 2 << 30,
    "ours unlimited": 1 << 40,
}


@dataclass(frozen=True)
class LastLayer:
    """Loss and gradients of (N, D) inputs and (C, D) weights."""

    rows: int
    features: int
    classes: int
    dtype: torch.dtype = torch.float32
    goals: tuple[Goal, ...] = ()
    within: tuple[str, ...] = ()  #: of `WITHIN`

    @property
    def size(self) -> str:
        """N, D, C and the type: `1024, 256, 32000 float32`."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.rows}, {self.features}, {self.classes} {dtype}"

    @property
    def name(self) -> str:
        """Everything that tells this case from the others."""
        return f"linear_cross_entropy {self.size}"

    @property
    def elements(self) -> int:
        """How many logits there are."""
        return self.rows * self.classes

    @property
    def gradient_bytes(self) -> int:
        """What the gradients of input and weight take."""
        return (self.rows + self.classes) * self.features * self.dtype.itemsize


def _case(rows: int, features: int, classes: int, bound: float) -> tuple[LastLayer, LastLayer]:
    forward = Goal(FORWARD, "products", 1.15)
    exact = LastLayer(rows, features, classes, goals=(Goal(OURS, "floors", bound), forward))
    return exact, replace(exact, dtype=torch.bfloat16, goals=(Goal(OURS, "floors", 1.15), forward))


_PAIRS = (
    _case(1024, 256, 32_000, 1.10),
    _case(512, 768, 50_257, 1.00),
    _case(1024, 512, 32_000, 1.05),
    _case(2048, 64, 32_000, 1.20),
)
CASES: tuple[LastLayer, ...] = tuple(pair[half] for half in (0, 1) for pair in _PAIRS)

#: Those that take a tenth of a second.
QUICK: tuple[LastLayer, ...] = _PAIRS[-1]

#: The peak of memory is taken of this one, and the time of a Hessian-vector product.
MEMORY = LastLayer(
    4096, 64, 64_000, goals=(Goal(OURS, "MiB", 64), Goal(HVP, "MiB", 128), Goal(HVP, "steps", 3))
)
MEMORY_OF = (BUILTIN, OURS, HVP)

#: Along the curve, with so many features.
CURVE_CLASSES = (1000, 10_000, 100_000, 1_000_000)
CURVE_FEATURES = 64


def curve(elements: int) -> tuple[LastLayer, ...]:
    """Return last layers of about so many logits, up to a million classes."""
    return tuple(LastLayer(elements // C, CURVE_FEATURES, C) for C in CURVE_CLASSES)


def enter(
    case: LastLayer,
    names: Sequence[str],
    others: Mapping[str, Callable[..., Tensor]] | None = None,
) -> dict[str, Contestant]:
    """Draw the case's numbers and return the contestants of these names, all on the same.

    `others` are functions of x, W and the labels that take part under their names.
    """
    torch.manual_seed(0)
    x, W = torch.randn(case.rows, case.features), torch.randn(case.classes, case.features)
    x, W = x.to(case.dtype).requires_grad_(), (W / case.features**0.5).to(case.dtype)
    tensors = x, W.requires_grad_(), torch.randint(case.classes, (case.rows,))
    work = {name: _work(case, name, *tensors) for name in names}
    work |= {name: _gradients(f, *tensors) for name, f in (others or {}).items()}
    return {name: Contestant(lambda: x, w) for name, w in work.items()}


def _work(
    case: LastLayer, name: str, x: Tensor, W: Tensor, target: Tensor
) -> Callable[[Tensor], object]:
    if name == FLOOR:
        G = torch.randn(case.rows, case.classes).to(case.dtype)
        return lambda _: _products(x.detach(), W.detach(), G)
    if name == ONE_PRODUCT:
        return lambda _: x.detach() @ W.detach().T
    if name == FORWARD:
        return lambda _: custom_ops.linear_cross_entropy(x.detach(), W.detach(), target)
    if name == HVP:
        loss = custom_ops.linear_cross_entropy(x, W, target)
        gradients = torch.autograd.grad(loss, (x, W), create_graph=True)
        v = [torch.randn_like(g) for g in gradients]
        return lambda _: torch.autograd.grad(gradients, (x, W), v, retain_graph=True)
    return _gradients(_function(name), x, W, target)


def _gradients(
    function: Callable[..., Tensor], x: Tensor, W: Tensor, target: Tensor
) -> Callable[[Tensor], object]:
    return lambda _: torch.autograd.grad(function(x, W, target), (x, W))


def _products(x: Tensor, W: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x @ W.T, G @ W, G.T @ x


def _two_steps(x: Tensor, W: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x @ W.T, target)


def _function(name: str) -> Callable[..., Tensor]:
    if name == OURS:
        return custom_ops.linear_cross_entropy
    if name in WITHIN:
        return partial(custom_ops.linear_cross_entropy, memory=WITHIN[name])
    if name == BUILTIN:  # of which torch before 2.13 has but the two halves
        return getattr(F, "linear_cross_entropy", _two_steps)
    options = torch.nn.LinearCrossEntropyOptions()
    return partial(F.linear_cross_entropy, options=options)


def row(case: LastLayer, effort: Effort, chunked: bool) -> dict[str, Any]:
    """Time everybody on one case; torch's chunked path twice only, as it takes so long."""
    names = (FLOOR, BUILTIN, OURS, ONE_PRODUCT, FORWARD)
    seconds = in_turns(enter(case, names), effort)
    if chunked:
        seconds |= in_turns(enter(case, (CHUNKED,)), Effort(0, 2, 2, 0))
    medians = {name: times["median"] for name, times in seconds.items()}
    ratios = {
        name: {"floors": median / medians[FLOOR], "products": median / medians[ONE_PRODUCT]}
        for name, median in medians.items()
    }
    return {
        "name": case.name,
        "size": case.size,
        "seconds": seconds,
        "ratios": ratios,
        "claims": judge(case.goals, ratios),
    }


def hessian(case: LastLayer, effort: Effort) -> dict[str, Any]:
    """Time a Hessian-vector product beside loss and gradients."""
    seconds = in_turns(enter(case, (OURS, HVP)), effort)
    step = seconds[OURS]["median"]
    ratios = {name: {"steps": times["median"] / step} for name, times in seconds.items()}
    goals = [goal for goal in case.goals if goal.measure == "steps"]
    return {
        "name": case.name,
        "seconds": seconds,
        "ratios": ratios,
        "claims": judge(goals, ratios),
    }


def point(case: LastLayer, effort: Effort) -> dict[str, Any]:
    """Return the nanoseconds of a logit."""
    seconds = in_turns(enter(case, (FLOOR, OURS)), effort)
    scale = 1e9 / case.elements
    return {
        "rows": case.rows,
        "features": case.features,
        "classes": case.classes,
        "nanoseconds": {name: scale * times["median"] for name, times in seconds.items()},
        "seconds": seconds,
    }
