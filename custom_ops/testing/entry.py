"""A check as data: a name, its kind, and the function that runs it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from custom_ops.testing.report import FAILED, NOT_APPLICABLE, PASSED, TORCH, Row
from custom_ops.testing.source import applies_functions, location
from custom_ops.testing.subject import Subject
from custom_ops.testing.verdict import Fault, NotApplicable, TorchFault

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """A named check.

    Args:
        kind: the group it belongs to.
        name: what `only=`, `skip=` and pytest's -k go by.
        run: takes the subject, and returns what it measured, in a few words, or None. It raises
            Fault, NotApplicable or TorchFault.
        asked: whether it runs only where `only=` names it.
        after: checks whose failure would be found here once more: it is then left out.
    """

    kind: str
    name: str
    run: Callable[[Subject], str | None]
    asked: bool = False
    after: tuple[str, ...] = ()

    def _raised(self, subject: Subject, error: Exception) -> tuple[str, Fault]:
        """What an exception means that no check has expected."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if self.kind == "values":
            return NOT_APPLICABLE, Fault(f"such values are refused: {text}")
        if self.kind == "torch.func" and not applies_functions(subject):
            return TORCH, Fault(f"torch's own operators raise {text}")
        where = location(subject.function, self._method())
        return FAILED, Fault(f"raises {text}", location=where)

    def _method(self) -> str:
        """Which half of a Function the check is about."""
        forward = ("call", "reference", "layouts", "dtypes", "values", "errors")
        return "forward" if self.kind in forward else "backward"

    def row(self, subject: Subject) -> Row:
        """Run the check; whatever it raises becomes a row."""
        start = time.perf_counter()
        status, fault = PASSED, Fault("")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fault = Fault(self.run(subject) or "")
        except NotApplicable as reason:
            status, fault = NOT_APPLICABLE, Fault(str(reason))
        except TorchFault as reason:
            status, fault = TORCH, Fault(str(reason))
        except Fault as found:
            status, fault = FAILED, found
            fault.location = fault.location or location(subject.function, self._method())
        except Exception as error:
            status, fault = self._raised(subject, error)
        return Row(
            self.kind,
            self.name,
            status,
            fault.sentence,
            fault.mistake,
            fault.shown,
            fault.location,
            time.perf_counter() - start,
            fault.final or (self.kind == "call" and status != PASSED),
        )
