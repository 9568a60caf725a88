"""The function under test with one set of inputs: what every check is given."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import Function

from custom_ops.testing.structure import flatten
from custom_ops.testing.verdict import NotApplicable

__all__ = ["Subject", "floating", "make_subject"]


def floating(value: object) -> bool:
    """Whether `value` is a tensor of real floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass(frozen=True, eq=False)
class Subject:
    """A function of flat arguments, and the arguments.

    Args:
        name: how a report calls it.
        function: what the user gave: a callable, a Module or a Function.
        call: takes as many positional arguments as there are `inputs`.
        inputs: tensors and whatever else the function takes.
        names: the name of each input.
        wrt: positions of the inputs that are differentiated.
        reference: the same function written by somebody else, or None.
        seed: seeds every random number that a check draws.
        around: makes `call` of another function in this one's place.
        reference_call: takes the flat inputs, where it is not around(reference).
        shards: the dimension along which an input is cut between processes.
    """

    name: str
    function: Any
    call: Callable[..., Any]
    inputs: tuple[Any, ...]
    names: tuple[str, ...]
    wrt: tuple[int, ...]
    reference: Callable[..., Any] | None = None
    seed: int = 0
    around: Callable[[Any], Callable[..., Any]] = lambda target: target
    reference_call: Callable[..., Any] | None = None
    shards: dict[int, int] = field(default_factory=dict)

    def with_inputs(self, inputs: Sequence[Any]) -> Subject:
        """Return the same subject at other inputs."""
        return replace(self, inputs=tuple(inputs))

    def replaced(self, position: int, value: Any) -> Subject:
        """Return the same subject with one input replaced."""
        inputs = list(self.inputs)
        inputs[position] = value
        return self.with_inputs(inputs)

    def to(self, dtype: torch.dtype) -> Subject:
        """Return the same subject with every floating-point input in `dtype`."""
        return self.with_inputs([x.to(dtype) if floating(x) else x for x in self.inputs])

    def of_reference(self) -> Subject:
        """Return the reference at the same inputs."""
        if self.reference is None:
            raise NotApplicable("no reference= was given")
        call = self.reference_call or self.around(self.reference)
        return replace(self, call=call, function=self.reference, reference=None)

    def fresh(self, wrt: Sequence[int] | None = None) -> list[Any]:
        """Return copies of the inputs, with those at `wrt` as leaves that require grad."""
        wrt = self.wrt if wrt is None else wrt
        copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in self.inputs]
        for i in wrt:
            copies[i].requires_grad_()
        return copies

    def outputs(self, *inputs: Any) -> list[Tensor]:
        """Return the floating-point tensors among the results, in order.

        The random numbers are the same at every call, so that a dropout is one function.
        """
        with _seeded(self.seed):
            leaves = flatten(self.call(*inputs))[0]
        return [y for y in leaves if floating(y)]

    def result(self, *inputs: Any) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs as a transform wants them: one tensor, or a tuple."""
        outputs = tuple(y for y in flatten(self.call(*inputs))[0] if floating(y))
        return outputs[0] if len(outputs) == 1 else outputs

    def generator(self) -> torch.Generator:
        """Return a new generator of this subject's seed."""
        return torch.Generator().manual_seed(self.seed)

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return random upstream gradients, none of them near 0 or 1."""
        g = self.generator()
        return [
            (
                (torch.rand(y.shape, generator=g, dtype=torch.float64) + 0.5)
                * (torch.randint(0, 2, y.shape, generator=g) * 2 - 1)
            )
            .to(y.dtype)
            .to(y.device)
            for y in outputs
        ]

    def tangents(self) -> list[Tensor]:
        """Return random tangents of the differentiated inputs."""
        g = torch.Generator().manual_seed(self.seed + 1)
        return [
            torch.randn(self.inputs[i].shape, generator=g, dtype=torch.float64).to(
                self.inputs[i].dtype
            )
            for i in self.wrt
        ]

    def gradients(
        self, inputs: Sequence[Any] | None = None, wrt: Sequence[int] | None = None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return outputs and the gradients at `cotangents`, None where torch gives None."""
        wrt = self.wrt if wrt is None else wrt
        inputs = self.fresh(wrt) if inputs is None else inputs
        outputs = self.outputs(*inputs)
        ys, vs = self.differentiable(outputs)
        if not ys:
            return outputs, [None] * len(wrt)
        leaves = [inputs[i] for i in wrt]
        return outputs, list(torch.autograd.grad(ys, leaves, vs, allow_unused=True))

    def differentiable(self, outputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs that have a graph, and the upstream gradient of each of them."""
        pairs = zip(outputs, self.cotangents(outputs), strict=True)
        kept = [(y, v) for y, v in pairs if y.requires_grad]
        return [y for y, _ in kept], [v for _, v in kept]

    def subsets(self) -> Iterator[tuple[int, ...]]:
        """Return every non-empty subset of the differentiated inputs, at most 15 of them."""
        sizes = range(1, len(self.wrt) + 1)
        every = itertools.chain.from_iterable(itertools.combinations(self.wrt, n) for n in sizes)
        return itertools.islice(every, 15)

    def input_name(self, position: int) -> str:
        """Return "input 0 (`x`)", as sentences have it."""
        return f"input {position} (`{self.names[position]}`)"

    def written_function(self) -> type[Function] | None:
        """Return the Function under test, where the subject is one and nothing else."""
        return self.function if _is_function(self.function) else None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch.manual_seed for a while; the plain one notes a stack trace for absent devices."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def make_subject(
    function: Any,
    inputs: Sequence[Any],
    reference: Callable[..., Any] | None = None,
    seed: int = 0,
    shards: Mapping[int, int] | None = None,
) -> Subject:
    """Return a subject with the arguments flat, a Module's parameters among them."""
    leaves, nest = flatten(list(inputs))
    names, reference_call = _names(function, inputs), None
    if isinstance(function, nn.Module):
        names, leaves, around, reference_call = _of_module(function, names, leaves, nest, reference)
        call = around(function)
    else:

        def around(target: Any) -> Callable[..., Any]:
            return lambda *flat: target(*nest(list(flat)))

        call = around(function.apply if _is_function(function) else function)
    wrt = [i for i, x in enumerate(leaves) if floating(x) and x.requires_grad]
    wrt = wrt or [i for i, x in enumerate(leaves) if floating(x)]
    return Subject(
        _name(function),
        function,
        call,
        tuple(leaves),
        tuple(names),
        tuple(wrt),
        reference,
        seed,
        around,
        reference_call,
        dict(shards or {}),
    )


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _names(function: Any, inputs: Sequence[Any]) -> list[str]:
    """The parameters' names, a leaf each; `x0`, `x1` … where there is no signature."""
    try:
        if _is_function(function):
            names = list(inspect.signature(function.forward).parameters)
            names = names[not _modern(function) :]
        else:
            target = function.forward if isinstance(function, nn.Module) else function
            names = [
                p.name
                for p in inspect.signature(target).parameters.values()
                if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            ]
    except (TypeError, ValueError):
        names = []
    found = []
    for i, value in enumerate(inputs):
        name = names[i] if i < len(names) else f"x{i}"
        n = len(flatten(value)[0])
        found += [name] if n == 1 else [f"{name}[{j}]" for j in range(n)]
    return found


def _is_function(function: object) -> TypeGuard[type[Function]]:
    return isinstance(function, type) and issubclass(function, Function)


def _modern(function: type[Function]) -> bool:
    """Whether forward takes no ctx."""
    return function.setup_context is not Function.setup_context


def _of_module(
    module: nn.Module, names: list[str], leaves: list[Any], nest: Any, reference: Any
) -> Any:
    """Parameters come after the inputs; buffers are copied, as a call may write to them."""
    parameters = dict(module.named_parameters())
    count = len(leaves)

    def called(target: Any) -> Callable[..., Any]:
        def call(*flat: Any) -> Any:
            state = dict(zip(parameters, flat[count:], strict=True))
            state.update({k: b.clone() for k, b in module.named_buffers()})
            return torch.func.functional_call(target, state, tuple(nest(list(flat[:count]))))

        return call

    def beside(*flat: Any) -> Any:
        return reference(*nest(list(flat[:count])), *flat[count:])

    if isinstance(reference, nn.Module):
        other: Any = called(reference)
    else:
        other = None if reference is None else beside
    return [*names, *parameters], [*leaves, *parameters.values()], called, other
