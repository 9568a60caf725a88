"""One warning in a process where kernels are there and cannot run, so that others answer."""

from __future__ import annotations

import warnings

from custom_ops.surroundings import constant

__all__ = ["warn_once"]

_told: set[str] = set()


@constant  # a call that Dynamo traces warns while it is traced
def warn_once(reason: str) -> None:
    """Warn of `reason` if it is not empty and was not told before."""
    if reason and reason not in _told:
        _told.add(reason)
        warnings.warn(f"custom_ops uses plain ATen operators: {reason}", stacklevel=2)
