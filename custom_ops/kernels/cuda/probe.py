"""A kernel that does nothing, to learn whether Triton can compile and launch one here."""

import triton

__all__ = ["launch_nothing"]


@triton.jit
def nothing():
    """Has no arguments, so that no tensor need be there."""


def launch_nothing() -> None:
    """Raise what Triton raises where it cannot run: of any kind."""
    nothing[(1,)]()
