"""The measurements on a GPU: everybody on one case, and what it is as a share of a copy's speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import contestants, device_cases, last_layer, rivals
from benchmarks.contestants import BUILTIN, COMPILED, COPY, OURS, Contestant, Inputs
from benchmarks.device_cases import DeviceCase
from benchmarks.device_timing import EventClock, WallClock, admit, ratios
from benchmarks.goals import Goal, judge
from benchmarks.last_layer import FLOOR, LastLayer
from benchmarks.plan import Plan, Step
from benchmarks.timing import Effort, Seconds, in_turns
from training.measurement import peak_bytes

#: Of a report.
SECTIONS = ("rows", "curve", "step", "last layer")

#: By count less than four minutes: of each case a second, at most three of a compiler.
THOROUGH = Plan(
    Effort(warm_up=1, least=7, most=60, seconds=1),
    curve_elements=0,
    last_layer=Effort(warm_up=1, least=5, most=10, seconds=2),
    whole_last_layer=True,
)

_OVER = {"over builtin": BUILTIN, "over compiled": COMPILED}


def steps(plan: Plan, device: torch.device) -> list[Step]:
    """Return all that is to be measured."""
    clock = EventClock(device)
    wait = partial(torch.cuda.synchronize, device)
    return [
        *(
            Step(section, f"{prefix}{case.name}", partial(row, case, plan, device, clock, wait))
            for section, prefix, cases in (
                ("rows", "", device_cases.CASES),
                ("curve", "curve: ", device_cases.CURVE),
            )
            for case in cases
        ),
        *(
            Step("step", f"step: {step.name}", partial(wall_time, step, plan, device, wait))
            for step in device_cases.STEPS
        ),
        *(
            Step(
                "last layer", layer.name, partial(last_layer_row, layer, plan, device, clock, wait)
            )
            for layer in device_cases.LAST_LAYERS
        ),
    ]


def row(
    case: DeviceCase, plan: Plan, device: torch.device, clock: Seconds, wait: Callable[[], None]
) -> dict[str, Any]:
    """Time everybody on one case; a copy of the logits is the measure of the device."""
    able, first, failed = admit(enter(case, device), wait)
    seconds = in_turns(able, plan.effort, seconds=clock)
    copied = 2 * case.case.elements * case.case.dtype.itemsize
    moved = {name: copied if name == COPY else case.moved for name in seconds}
    speed = {name: moved[name] / times["median"] for name, times in seconds.items()}
    found = ratios(seconds, _OVER)
    for name in found:
        found[name]["share"] = speed[name] / speed[COPY]
    return {
        "name": case.name,
        "seconds": seconds,
        "bytes_a_second": speed,
        **_rest(able, first, failed, found, case.case.goals, device),
    }


def wall_time(
    case: DeviceCase, plan: Plan, device: torch.device, wait: Callable[[], None]
) -> dict[str, Any]:
    """Time a step of a small batch, as a training loop has it."""
    able, first, failed = admit(enter(case, device), wait)
    seconds = in_turns(able, plan.effort, case.case.calls, WallClock(wait))
    return {
        "name": case.name,
        "seconds": seconds,
        **_rest(able, first, failed, ratios(seconds, _OVER), case.case.goals, device),
    }


def last_layer_row(
    case: LastLayer,
    plan: Plan,
    device: torch.device,
    clock: Seconds,
    wait: Callable[[], None],
) -> dict[str, Any]:
    """Time the last layer beside three bare products; memory is what exceeds the gradients."""
    with device:
        others = rivals.functions("linear_cross_entropy")
        entered = last_layer.enter(case, (FLOOR, BUILTIN, OURS, *case.within), others)
    able, first, failed = admit(entered, wait)
    seconds = in_turns(able, plan.last_layer, seconds=clock)
    found = ratios(seconds, {"over builtin": BUILTIN})
    for name, times in seconds.items():
        found[name]["floors"] = times["median"] / seconds[FLOOR]["median"]
    given = case.gradient_bytes
    return {
        "name": case.name,
        "seconds": seconds,
        **_rest(able, first, failed, found, case.goals, device, given),
    }


def enter(case: DeviceCase, device: torch.device) -> dict[str, Contestant]:
    """Draw the case's numbers on the device; return everybody on the same."""
    torch.compiler.reset()
    with device:
        inputs = Inputs(case.case)
        copy = torch.empty(case.case.shape, dtype=case.case.dtype)
    names = contestants.of(case.case)
    if case.direction == "forward" and case.case.calls > 1:  # compiled is judged both ways
        names = tuple(name for name in names if name != COMPILED)
    functions = {name: contestants.function(case.case, name) for name in names if name != COPY}
    if case.case.op != "cross_entropy":
        functions = {name: partial(f, dim=1) for name, f in functions.items()}
    functions |= rivals.functions(case.case.op)
    work = {name: _contestant(case, f, inputs) for name, f in functions.items()}
    return {COPY: Contestant(inputs.logits, lambda z: copy.copy_(z.detach())), **work}


def _contestant(case: DeviceCase, function: Callable[..., Any], inputs: Inputs) -> Contestant:
    if case.direction == "forward":
        given = {"target": inputs.target} if case.case.op == "cross_entropy" else {}
        return Contestant(lambda: inputs.logits().detach(), partial(function, **given))
    if case.direction == "backward":

        def prepare() -> Any:
            z = inputs.logits()
            return z, function(z)

        return Contestant(prepare, lambda zy: torch.autograd.grad(zy[1], zy[0], inputs.cotangent))
    if case.case.op != "cross_entropy":
        work = contestants.output_and_gradient(function, inputs.cotangent)
        return Contestant(inputs.logits, work)
    with_target = partial(function, target=inputs.target)
    return Contestant(inputs.logits, contestants.loss_and_gradient(with_target))


def _rest(
    able: Mapping[str, Contestant],
    first: Mapping[str, float],
    failed: Mapping[str, str],
    found: dict[str, dict[str, float]],
    goals: tuple[Goal, ...],
    device: torch.device,
    given: int = 0,
) -> dict[str, Any]:
    """Memory beyond what is `given`, the first calls, who failed, and the goals."""
    peaks = {
        name: peak_bytes(lambda c=c: c.work(c.prepare()), device) - given  # type: ignore[misc]
        for name, c in able.items()
    }
    for name, peak in peaks.items():
        found[name]["MiB"] = peak / 2**20
    there = [g for g in goals if g.measure in found.get(g.contestant, {})]
    return {
        "first_call_seconds": dict(first),
        "failed": dict(failed),
        "peak_bytes": peaks,
        "ratios": found,
        "claims": judge(there, found),
    }
