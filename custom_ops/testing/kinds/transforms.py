"""torch.func: the transforms beside autograd and beside a loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops.testing.compare import ROUNDINGS, differing
from custom_ops.testing.double import widest
from custom_ops.testing.entry import Check
from custom_ops.testing.refusals import refusals
from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import Fault

__all__ = ["CHECKS"]


def _of_differentiated(subject: Subject) -> Callable[..., Any]:
    """The function of its differentiated inputs alone."""

    def f(*xs: Tensor) -> Any:
        inputs = list(subject.inputs)
        for i, x in zip(subject.wrt, xs, strict=True):
            inputs[i] = x
        return tuple(subject.outputs(*inputs))

    return f


def _xs(subject: Subject) -> tuple[Tensor, ...]:
    return tuple(subject.inputs[i].detach() for i in subject.wrt)


def _names(subject: Subject) -> list[str]:
    return [f"the gradient of {subject.input_name(i)}" for i in subject.wrt]


def _fail_where(found: str | None, transform: str, other: str) -> None:
    if found is not None:
        raise Fault(f"{found}, by {transform}; {other} differs", transform)


def vjp(subject: Subject) -> str:
    """torch.func.vjp and grad give autograd's gradient."""
    double = widest(subject)
    outputs, want = double.gradients()
    vs = tuple(double.cotangents(outputs))
    with refusals():
        got = torch.func.vjp(_of_differentiated(double), *_xs(double))[1](vs)

        def total(*xs: Tensor) -> Tensor:
            ys = _of_differentiated(double)(*xs)
            return torch.stack([(v * y).sum() for v, y in zip(vs, ys, strict=True)]).sum()

        every = tuple(range(len(double.wrt)))
        gradient = torch.func.grad(total, argnums=every)(*_xs(double))
    for name, found in (("torch.func.vjp", got), ("torch.func.grad", gradient)):
        _fail_where(differing(found, want, _names(double), ROUNDINGS), name, "torch.autograd.grad")
    return "vjp and grad are autograd's"


def jacobians(subject: Subject) -> str:
    """torch.func.jacrev gives the rows that autograd gives one by one."""
    double = widest(subject)
    f, xs = _of_differentiated(double), _xs(double)
    if sum(x.numel() for x in xs) > 256:
        xs = xs[:1]
        f = _first_only(f, _xs(double))
    with refusals():
        got = torch.func.jacrev(f, argnums=tuple(range(len(xs))))(*xs)
    inputs = double.fresh()
    outputs = double.outputs(*inputs)
    for o, y in enumerate(outputs):
        v = double.cotangents([y])[0]
        if not y.requires_grad:
            continue
        leaves = [inputs[i] for i in double.wrt][: len(xs)]
        want = torch.autograd.grad(y, leaves, v, retain_graph=True, allow_unused=True)
        rows = [torch.tensordot(v, J, dims=y.dim()) for J in got[o]]
        _fail_where(
            differing(rows, want, _names(double), 16 * ROUNDINGS),
            "torch.func.jacrev",
            "torch.autograd.grad",
        )
    return "jacrev is autograd's"


def _first_only(f: Callable[..., Any], xs: tuple[Tensor, ...]) -> Callable[..., Any]:
    return lambda x: f(x, *xs[1:])


def forward_jacobian(subject: Subject) -> str:
    """torch.func.jacfwd gives jacrev's matrix."""
    double = widest(subject)
    f, x = _first_only(_of_differentiated(double), _xs(double)), _xs(double)[0]
    with refusals():
        got = torch.func.jacfwd(f)(x)
        want = torch.func.jacrev(f)(x)
    names = [f"the Jacobian of result {o}" for o in range(len(got))]
    _fail_where(
        differing(got, want, names, 16 * ROUNDINGS), "torch.func.jacfwd", "torch.func.jacrev"
    )
    return "jacfwd is jacrev"


def hessian(subject: Subject) -> str:
    """torch.func.hessian gives the second derivative that autograd gives."""
    double = widest(subject)
    f, x = _first_only(_of_differentiated(double), _xs(double)), _xs(double)[0]
    outputs = double.outputs(*double.fresh(()))
    vs = double.cotangents(outputs)

    def total(x: Tensor) -> Tensor:
        return torch.stack([(v * y).sum() for v, y in zip(vs, f(x), strict=True)]).sum()

    with refusals():
        got = torch.func.hessian(total)(x)
        want = torch.autograd.functional.hessian(total, x)
    _fail_where(
        differing([got], [want], ["the Hessian"], 64 * ROUNDINGS),
        "torch.func.hessian",
        "torch.autograd.functional.hessian",
    )
    return "hessian is autograd's"


def vmap(subject: Subject) -> str:
    """vmap over each subset of the tensors gives what a loop gives."""
    double = widest(subject)
    tensors = [i for i, x in enumerate(double.inputs) if isinstance(x, Tensor)]
    sizes = range(1, len(tensors) + 1)
    every = itertools.chain.from_iterable(itertools.combinations(tensors, n) for n in sizes)
    count = 0
    for subset in itertools.islice(every, 7):
        for dim in (0, -1):
            _vmap_is_a_loop(double, subset, dim)
            count += 1
    return f"{count} ways to batch are a loop"


def _copies(x: Tensor) -> list[Tensor]:
    x = x.detach()
    if not x.is_floating_point():
        return [x, x.clone(), x.clone()]
    return [x, x * 0.75, x * 0.5]


def _vmap_is_a_loop(subject: Subject, subset: tuple[int, ...], dim: int) -> None:
    copies = {i: _copies(subject.inputs[i]) for i in subset}
    inputs = [
        torch.stack(copies[i], dim if x.dim() else 0)
        if i in copies
        else (x.detach() if isinstance(x, Tensor) else x)
        for i, x in enumerate(subject.inputs)
    ]
    dims = tuple(
        (dim if x.dim() else 0) if i in copies else None for i, x in enumerate(subject.inputs)
    )
    with refusals():
        got = torch.func.vmap(
            lambda *xs: tuple(subject.outputs(*xs)), in_dims=dims, randomness="same"
        )(*inputs)
    for b in range(3):
        alone = [copies[i][b] if i in copies else x for i, x in enumerate(subject.inputs)]
        with torch.no_grad():
            want = subject.outputs(*subject.with_inputs(alone).fresh(()))
        names = [f"result {o}" for o in range(len(want))]
        listed = " and ".join(f"`{subject.names[i]}`" for i in subset)
        _fail_where(
            differing([y[b] for y in got], want, names, ROUNDINGS),
            f"torch.vmap over {listed}, in_dim {dim}",
            "a loop",
        )


def per_sample_gradients(subject: Subject) -> str:
    """vmap(grad(f)) gives the gradient of each sample."""
    double = widest(subject)
    x = _xs(double)[0]
    f = _first_only(_of_differentiated(double), _xs(double))
    outputs = double.outputs(*double.fresh(()))
    vs = double.cotangents(outputs)

    def total(x: Tensor) -> Tensor:
        return torch.stack([(v * y).sum() for v, y in zip(vs, f(x), strict=True)]).sum()

    samples = _copies(x)
    with refusals():
        got = torch.func.vmap(torch.func.grad(total), randomness="same")(torch.stack(samples))
    for b, sample in enumerate(samples):
        leaf = sample.clone().requires_grad_()
        y = total(leaf)
        want = torch.autograd.grad(y, leaf, allow_unused=True) if y.requires_grad else (None,)
        _fail_where(
            differing([got[b]], want, _names(double)[:1], ROUNDINGS),
            "vmap(grad(...))",
            "the gradient of a sample alone",
        )
    return "each sample's gradient is its own"


CHECKS = (
    Check("torch.func", "vjp and grad", vjp),
    Check("torch.func", "jacrev", jacobians),
    Check("torch.func", "jacfwd", forward_jacobian, after=("gradient", "forward mode")),
    Check(
        "torch.func",
        "hessian",
        hessian,
        after=("gradient", "second derivative", "forward over reverse"),
    ),
    Check("torch.func", "vmap", vmap),
    Check("torch.func", "per-sample gradients", per_sample_gradients),
)
