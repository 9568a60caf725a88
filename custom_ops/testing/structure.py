"""Arguments and results as a flat list of leaves, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["flatten"]


def flatten(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return the leaves of nested tuples, lists and dicts, and the function that nests them again.

    >>> leaves, nest = flatten((1, [2, {"a": 3}]))
    >>> leaves, nest([4, 5, 6])
    ([1, 2, 3], (4, [5, {'a': 6}]))
    """
    if isinstance(tree, dict):
        keys, children = list(tree), [flatten(value) for value in tree.values()]
    elif isinstance(tree, (tuple, list)):
        keys, children = None, [flatten(value) for value in tree]
    else:
        return [tree], lambda leaves: leaves[0]
    leaves = [leaf for child, _ in children for leaf in child]

    def nest(new: list[Any]) -> Any:
        values, start = [], 0
        for child, build in children:
            values.append(build(new[start : start + len(child)]))
            start += len(child)
        if keys is not None:
            return dict(zip(keys, values, strict=True))
        if hasattr(tree, "_fields"):
            return type(tree)(*values)
        return type(tree)(values) if type(tree) in (tuple, list) else tuple(values)

    return leaves, nest
