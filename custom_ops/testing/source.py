"""Where the user's code stands, and how it calls what it saves."""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from custom_ops.testing.subject import Subject

__all__ = ["applies_functions", "attribute_tensors", "function_calls", "location", "saved_names"]


def location(function: Any, method: str = "backward") -> str:
    """Return "file:line in Name.method", or "" where there is no source."""
    target, label = function, getattr(function, "__name__", type(function).__name__)
    if isinstance(function, type) and issubclass(function, Function):
        for name in (method, "vjp", "forward"):
            target = getattr(function, name)
            if target is not getattr(Function, name, None):
                label = f"{function.__name__}.{name}"
                break
    elif isinstance(function, nn.Module):
        target, label = type(function).forward, f"{type(function).__name__}.forward"
    try:
        target = inspect.unwrap(target)
        path = inspect.getsourcefile(target)
        lines, line = inspect.getsourcelines(target)
    except (TypeError, OSError):
        return ""
    line += next((k for k, text in enumerate(lines) if text.lstrip().startswith("def ")), 0)
    here = os.path.relpath(path or "")
    return f"{path if here.startswith('..') else here}:{line} in {label}"


def saved_names(function: type[Function]) -> list[str]:
    """Return how `ctx.save_for_backward(...)` calls its arguments in the source."""
    for method in (function.setup_context, function.forward):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (TypeError, OSError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "save_for_backward"
            ):
                return [ast.unparse(argument) for argument in node.args]
    return []


def attribute_tensors(node: Any) -> dict[str, Any]:
    """Return the tensors that a Function has put on ctx as attributes."""
    return {k: v for k, v in vars(node).items() if isinstance(v, Tensor)}


@contextmanager
def function_calls() -> Iterator[list[tuple[type[Function], tuple[Any, ...]]]]:
    """Record each Function that is applied, with its arguments."""
    calls: list[tuple[type[Function], tuple[Any, ...]]] = []
    plain: Callable[..., Any] = Function.__dict__["apply"].__func__

    def apply(cls: type[Function], *args: Any, **options: Any) -> Any:
        if not options:
            calls.append((cls, args))
        return plain(cls, *args, **options)

    Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    try:
        yield calls
    finally:
        Function.apply = classmethod(plain)  # type: ignore[method-assign,assignment]


def applies_functions(subject: Subject) -> bool:
    """Whether a Function, which its writer can mend, is among what the subject runs."""
    with function_calls() as calls:
        subject.outputs(*subject.fresh())
    return bool(calls) or subject.written_function() is not None
