"""The arguments that may be forgotten, and the subject as it would be without each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from custom_ops.testing.subject import Subject, floating

__all__ = ["Option", "alternatives"]


@dataclass
class Option:
    """An argument with its value, and the subjects in which it has another, neutral one."""

    name: str
    value: Any
    neutral: list[Any]
    replaced: Callable[[Any], Subject]

    def changed(self) -> Iterator[tuple[str, Subject]]:
        """Yield each neutral value in words, and the subject with it."""
        for value in self.neutral:
            yield _word(value), self.replaced(value)


def alternatives(subject: Subject) -> Iterator[Option]:
    """Yield the tensors, the numbers and the keywords of a partial, each as an option."""
    for i, x in enumerate(subject.inputs):
        place = functools.partial(subject.replaced, i)
        if floating(x):
            yield Option(subject.names[i], x, [torch.zeros_like(x), torch.ones_like(x)], place)
        elif x is not None and not isinstance(x, (torch.Tensor, str)):
            yield Option(subject.names[i], x, _neutral(x), place)
    if isinstance(subject.function, functools.partial):
        yield from _keywords(subject, subject.function)


def _keywords(subject: Subject, function: functools.partial[Any]) -> Iterator[Option]:
    defaults = _defaults(function.func)
    for name, value in function.keywords.items():
        neutral = [defaults[name]] if name in defaults else _neutral(value)

        def replaced(other: Any, name: str = name) -> Subject:
            changed = functools.partial(function, **{name: other})
            call = subject.around(changed)
            return replace(subject, function=changed, call=call)

        yield Option(name, value, [v for v in neutral if v is not value], replaced)


def _defaults(function: Any) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _neutral(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [type(value)(0), type(value)(1), None]
    return [None]


def _word(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "0" if not value.any() else "1"
    return repr(value)
