"""How a check ends other than by passing: each way an exception with a sentence."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Fault", "NotApplicable", "TorchFault"]


@dataclass
class Fault(Exception):
    """What is wrong, in a sentence, with what shows it.

    Args:
        sentence: what is wrong, and where a mistake was recognised, which.
        mistake: the recognised mistake's short name, or "".
        shown: lines that show it: the input, expected beside observed.
        location: file:line of the user's code, or "".
        final: whether no other check can be run, as each would raise the same.
    """

    sentence: str
    mistake: str = ""
    shown: tuple[str, ...] = ()
    location: str = ""
    final: bool = False

    def __str__(self) -> str:
        return self.sentence


class NotApplicable(Exception):
    """Why a check has nothing to say about this function."""


class TorchFault(Exception):
    """A wrong answer that torch gives for every such function; not the function's fault."""
