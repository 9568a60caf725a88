"""Right Functions, random compositions of them, and one mutation of one backward."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class Exp(Function):
    @staticmethod
    def forward(ctx, x):
        y = (0.5 * x).exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def terms(saved, v):
        y = saved[0]
        return [[0.5 * v * y]]


class Sin(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def terms(saved, v):
        return [[v * saved[0].cos()]]


class Square(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def terms(saved, v):
        return [[saved[0] * v, saved[0] * v]]


class Softmax(Function):
    @staticmethod
    def forward(ctx, x):
        p = x.softmax(1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def terms(saved, v):
        p = saved[0]
        return [[p * v, -p * (p * v).sum(1, keepdim=True)]]


class Tanh(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def terms(saved, v):
        return [[v, -v * saved[0] ** 2]]


class Product(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def terms(saved, v):
        x, y = saved
        return [[v * y], [v * x]]


class Matrices(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x @ y

    @staticmethod
    def terms(saved, v):
        x, y = saved
        return [[v @ y.T], [x.T @ v]]


class Weighted(Function):
    """x + sin x · y."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x + x.sin() * y

    @staticmethod
    def terms(saved, v):
        x, y = saved
        return [[v, v * y * x.cos()], [v * x.sin()]]


UNARY = (Exp, Sin, Square, Softmax, Tanh)
BINARY = (Product, Matrices, Weighted)
MUTATIONS = ("sign", "factor", "transpose", "dropped term", "detach")


def right(function: type[Function]) -> type[Function]:
    """The Function with the sum of its terms as backward."""
    return _with_backward(function, "", 0, 0, 1.0)


def mutated(function: type[Function], mutation: str, random: random.Random) -> type[Function]:
    """The Function with one mutation of one term of one input's gradient."""
    tensors = [torch.rand(3, 3) for _ in range(2)]
    counts = [len(t) for t in function.terms(tensors, tensors[0])]  # type: ignore[attr-defined]
    i = random.randrange(len(counts))
    factor = random.choice([0.5, 2.0, 3.0, 1.1, 0.9])
    return _with_backward(function, mutation, i, random.randrange(counts[i]), factor)


def _with_backward(function: Any, mutation: str, i: int, k: int, factor: float) -> type[Function]:
    def backward(ctx: Any, v: Tensor) -> Any:
        saved = ctx.saved_tensors
        if mutation == "detach":
            saved = [t.detach() for t in saved]
        terms = function.terms(saved, v)
        if mutation == "sign":
            terms[i][k] = -terms[i][k]
        elif mutation == "factor":
            terms[i][k] = factor * terms[i][k]
        elif mutation == "transpose":
            terms[i][k] = terms[i][k].T
        elif mutation == "dropped term":
            terms[i][k] = torch.zeros_like(terms[i][k])
        sums = [sum(t[1:], t[0]) for t in terms]
        return sums[0] if len(sums) == 1 else tuple(sums)

    return type(function.__name__, (function,), {"backward": staticmethod(backward)})


def composition(
    random: random.Random, mutation: str | None = None
) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """A function of two 3 × 3 matrices through 2 to 4 Functions, and its text."""
    steps: list[tuple[type[Function], Sequence[int]]] = []
    for n in range(random.randint(2, 4)):
        family = random.choice([UNARY, BINARY])
        function = random.choice(family)
        last = n + 1  # every step uses the one before, so that all reach the result
        others = [last] if family is UNARY else [last, random.randrange(last)]
        random.shuffle(others)
        steps.append((function, others))
    at = random.randrange(len(steps)) if mutation else -1
    functions = [
        mutated(f, mutation, random) if n == at and mutation else right(f)
        for n, (f, _) in enumerate(steps)
    ]

    def call(x: Tensor, y: Tensor) -> Tensor:
        values = [x, y]
        for function, (_, inputs) in zip(functions, steps, strict=True):
            values.append(function.apply(*[values[i] for i in inputs]))
        return values[-1]

    text = " ; ".join(f"{f.__name__}{tuple(inputs)}" for f, inputs in steps)
    return call, f"{text}, {mutation} in step {at}" if mutation else text
