"""Torch's sentences for what a function does not support: a reason, not a fault."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from custom_ops.testing.verdict import NotApplicable, TorchFault

__all__ = ["refusals"]

REFUSED = re.compile(
    r"must override the setup_context|once_differentiable|not implemented|vmap support"
    r"|must implement the jvp|does not support it|Batching rule not implemented|data-dependent"
    r"|calling \.item\(\)|vmap: |in-place operation|randomness|double backwards?|is not supported"
    r"|not supported|Unsupported|does not have a derivative|not differentiable|NYI|Unimplemented",
    re.IGNORECASE,
)


@contextmanager
def refusals() -> Iterator[None]:
    """Turn an error in which torch, or the function, refuses into NotApplicable."""
    try:
        yield
    except (NotApplicable, TorchFault):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, NotImplementedError) or REFUSED.search(text):
            raise NotApplicable(f"refused: {text[:150]}") from error
        raise
