"""What users do around a call: modes, checkpoints, hooks, copies, threads, tracers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from custom_ops.testing.chance import not_random
from custom_ops.testing.compare import ROUNDINGS, differing, owed, run
from custom_ops.testing.entry import Check
from custom_ops.testing.refusals import refusals
from custom_ops.testing.subject import Subject, floating
from custom_ops.testing.verdict import Fault, NotApplicable

__all__ = ["CHECKS"]


OTHER_KERNEL = ROUNDINGS  # roundings: without a graph to keep, another kernel may answer


def _same(subject: Subject, got: list[Tensor | None], where: str, roundings: float = 0) -> None:
    found = differing(got, run(subject), owed(subject), roundings)
    if found is not None:
        raise Fault(f"{found}, the plain call's, {where}", where)


def no_grad(subject: Subject) -> str:
    """no_grad and inference_mode give the same numbers without a graph."""
    want = run(subject)
    for where, mode in (
        ("under no_grad", torch.no_grad),
        ("under inference_mode", torch.inference_mode),
    ):
        with mode():
            outputs = subject.outputs(*subject.fresh())
        if any(y.grad_fn is not None for y in outputs):
            raise Fault(f"the result has a graph {where}", where)
        found = differing(outputs, want, owed(subject), OTHER_KERNEL)
        if found is not None:
            raise Fault(f"{found}, the plain call's, {where}", where)
    return "the same numbers, no graph"


def checkpointed(subject: Subject) -> str:
    """Both kinds of checkpoint give the same numbers, also recomputed under other modes."""
    for reentrant in (False, True):
        inputs = subject.fresh()
        call: Callable[..., Any] = lambda *xs: tuple(subject.outputs(*xs))  # noqa: E731
        with refusals():
            outputs = list(
                checkpoint(call, *inputs, use_reentrant=reentrant, preserve_rng_state=False)
            )
            got = _backward(subject, inputs, outputs, reentrant)
        _same(subject, got, f"in checkpoint(use_reentrant={reentrant})", OTHER_KERNEL)
    inputs = subject.fresh()
    with refusals():
        outputs = list(
            checkpoint(
                lambda *xs: tuple(subject.outputs(*xs)),
                *inputs,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
        with (
            torch.autograd.set_detect_anomaly(True, check_nan=False),
            saved_tensors_hooks(torch.clone, lambda t: t),
        ):
            got = _backward(subject, inputs, outputs, False)
    _same(subject, got, "in checkpoint, recomputed in other surroundings", OTHER_KERNEL)
    return "both kinds, and recomputed in other surroundings"


def _backward(
    subject: Subject, inputs: list[Any], outputs: list[Tensor], through_grad: bool
) -> list[Tensor | None]:
    kept, vs = subject.differentiable(outputs)
    leaves = [inputs[i] for i in subject.wrt]
    if through_grad:
        if kept:
            torch.autograd.backward(kept, vs)
        gradients = [x.grad for x in leaves]
    else:
        gradients = (
            list(torch.autograd.grad(kept, leaves, vs, allow_unused=True))
            if kept
            else [None] * len(leaves)
        )
    return [*(y.detach() for y in outputs), *gradients]


def hooks(subject: Subject) -> str:
    """A hook on the result replaces the upstream gradient, and one on the input sees its own."""
    inputs = subject.fresh()
    seen: dict[int, Tensor] = {}
    used = list(inputs)
    for i in subject.wrt:
        used[i] = inputs[i] * 1
        used[i].register_hook(lambda d, i=i: seen.update({i: d.detach().clone()}))
    outputs = subject.outputs(*used)
    if any(y is x for y in outputs for x in used):
        raise NotApplicable("a result is an input itself")
    for y in outputs:
        if y.requires_grad:
            y.register_hook(lambda v: 2 * v)
    got = _backward(subject, inputs, outputs, False)
    n = len(outputs)
    want = run(subject)
    doubled = [*want[:n], *(None if d is None else 2 * d for d in want[n:])]
    names = owed(subject)
    found = differing(got, doubled, names, 256)
    if found is None:
        there = [k for k, i in enumerate(subject.wrt) if i in seen]
        found = differing(
            [seen[subject.wrt[k]] for k in there],
            [got[n + k] for k in there],
            [names[n + k] for k in there],
        )
    if found is not None:
        raise Fault(f"{found}, with a hook that doubles the upstream gradient", "hooks")
    return "seen and replaced"


def anomaly(subject: Subject) -> str:
    """detect_anomaly runs, and gives the same bits."""
    with torch.autograd.detect_anomaly(check_nan=False):
        got = run(subject)
    _same(subject, got, "under detect_anomaly")
    return "the same bits"


def saved_hooks(subject: Subject) -> str:
    """saved_tensors_hooks that move the saved tensors away and back give the same bits."""
    with saved_tensors_hooks(lambda t: (t.detach().clone(),), lambda packed: packed[0].clone()):
        got = run(subject)
    _same(subject, got, "under saved_tensors_hooks")
    return "the same bits"


def deep_copy(subject: Subject) -> str:
    """A deep copy of a Module gives the same bits."""
    if not isinstance(subject.function, nn.Module):
        raise NotApplicable("not a Module")
    other = copy.deepcopy(subject.function)
    call = subject.around(other)
    _same(subject, run(replace(subject, call=call, function=other)), "in a deep copy")
    return "the same bits"


def threads(subject: Subject) -> str:
    """Four Python threads at once give the same bits."""
    want, names = run(subject), owed(subject)
    found: list[str] = []

    def work() -> None:
        for _ in range(5):
            try:
                # the seed is the process's: a thread of its own must not set it
                inputs = subject.fresh()
                outputs = _plain(subject, inputs)
                text = differing(_backward(subject, inputs, outputs, False), want, names)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            if text is not None:
                found.append(text)

    not_random(subject)
    running = [threading.Thread(target=work) for _ in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if found:
        raise Fault(
            f"{found[0]}, in one of four threads at once: state is shared between calls", "threads"
        )
    return "the same bits in four at once"


def _plain(subject: Subject, inputs: list[Any]) -> list[Tensor]:
    result = subject.result(*inputs)
    return list(result) if isinstance(result, tuple) else [result]


class _Watching(TorchFunctionMode):
    """A function mode that changes nothing."""

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return f(*args, **(kwargs or {}))


def modes(subject: Subject) -> str:
    """A dispatch mode and a function mode that change nothing change nothing."""
    with refusals():
        with FlopCounterMode(display=False):
            got = run(subject)
        _same_or_close(subject, got, "under a dispatch mode")
        with _Watching():
            got = run(subject)
        _same_or_close(subject, got, "under a function mode")
    return "a dispatch mode and a function mode"


def _same_or_close(subject: Subject, got: list[Tensor | None], where: str) -> None:
    found = differing(got, run(subject), owed(subject), 256)
    if found is not None:
        raise Fault(f"{found}, the plain call's, {where}", where)


def meta(subject: Subject) -> str:
    """Meta tensors, which have no numbers, give results of the same shape and dtype."""
    inputs = [x.detach().to("meta") if isinstance(x, Tensor) else x for x in subject.inputs]
    with torch.no_grad():
        want = subject.outputs(*subject.fresh(()))
    try:
        with refusals(), torch.no_grad():
            got = _plain(subject, inputs)
    except NotApplicable:
        raise
    except Exception as error:
        raise NotApplicable(f"meta tensors are refused: {str(error)[:90]}") from error
    for o, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.device.type != "meta" or a.shape != b.shape or a.dtype != b.dtype:
            raise Fault(
                f"result {o} of meta tensors is {a.dtype} {tuple(a.shape)} on {a.device}; expected "
                f"{b.dtype} {tuple(b.shape)} on meta",
                "meta",
            )
    return "the same shapes"


def traced(subject: Subject) -> str:
    """A graph of make_fx, on true and on fake tensors, run again with other numbers."""
    not_random(subject)
    other = subject.with_inputs([x.detach() * 0.5 if floating(x) else x for x in subject.inputs])
    tensors = [i for i, x in enumerate(subject.inputs) if isinstance(x, Tensor)]

    def f(*xs: Tensor) -> list[Tensor]:
        inputs = list(subject.inputs)
        for i, x in zip(tensors, xs, strict=True):
            inputs[i] = x
        for i in subject.wrt:
            inputs[i] = inputs[i].detach().requires_grad_()
        outputs = _plain(subject, inputs)
        kept = [(y, v) for y, v in zip(outputs, vs, strict=True) if y.requires_grad]
        if not kept:
            return outputs
        ys, ws = zip(*kept, strict=True)
        found = torch.autograd.grad(ys, [inputs[i] for i in subject.wrt], ws, allow_unused=True)
        return [
            *outputs,
            *(
                torch.zeros_like(inputs[i]) if d is None else d
                for d, i in zip(found, subject.wrt, strict=True)
            ),
        ]

    vs = subject.cotangents([y.detach() for y in _plain(subject, subject.fresh(()))])
    for mode in ("real", "fake"):
        with refusals():
            try:
                graph = make_fx(f, tracing_mode=mode)(
                    *[subject.inputs[i].detach() for i in tensors]
                )
            except Exception as error:
                if mode == "fake":
                    raise NotApplicable(f"make_fx refuses: {str(error)[:90]}") from error
                raise
            got = list(graph(*[other.inputs[i] for i in tensors]))
        want = run(other)
        found = differing(got, want, owed(subject), 256)
        if found is not None:
            raise Fault(
                f"{found}, where a graph of make_fx is run again with other numbers: a number was "
                "read while tracing",
                "traced",
            )
    return "run again with other numbers"


CHECKS = (
    Check("surroundings", "no_grad and inference", no_grad),
    Check("surroundings", "checkpoint", checkpointed, after=("gradient", "inputs unchanged")),
    Check("surroundings", "hooks", hooks, after=("gradient", "inputs unchanged")),
    Check("surroundings", "anomaly", anomaly),
    Check("surroundings", "saved_tensors_hooks", saved_hooks),
    Check("surroundings", "deepcopy", deep_copy),
    Check("surroundings", "threads", threads),
    Check("surroundings", "modes", modes),
    Check("surroundings", "meta tensors", meta),
    Check("surroundings", "make_fx", traced),
)
