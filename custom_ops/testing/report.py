"""What a run of the battery found: rows, a table for the terminal, one assertion."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

__all__ = ["FAILED", "NOT_APPLICABLE", "PASSED", "TORCH", "Report", "Row"]

PASSED, FAILED, NOT_APPLICABLE, TORCH = "passed", "failed", "not applicable", "torch's fault"
WIDTH = 80
MARKS = {PASSED: "ok", FAILED: "FAILED", NOT_APPLICABLE: "-", TORCH: "torch"}


@dataclass(frozen=True)
class Row:
    """One check's outcome.

    Args:
        kind: the group that the check belongs to, "derivatives" …
        check: its name.
        status: "passed", "failed", "not applicable" or "torch's fault".
        sentence: what was found; the reason where the check is not applicable.
        mistake: the short name of a recognised mistake, or "".
        shown: lines that show a fault.
        location: file:line of the user's code.
        seconds: what the check took.
        final: whether the checks that follow were left out.
    """

    kind: str
    check: str
    status: str
    sentence: str = ""
    mistake: str = ""
    shown: tuple[str, ...] = ()
    location: str = ""
    seconds: float = 0.0
    final: bool = False

    @property
    def failed(self) -> bool:
        """Whether the check found a fault of the function."""
        return self.status == FAILED


@dataclass(frozen=True)
class Report:
    """The rows of one function, in the order of the table of checks."""

    name: str
    seed: int
    rows: list[Row] = field(default_factory=list)

    @property
    def failures(self) -> list[Row]:
        """The rows that failed."""
        return [row for row in self.rows if row.failed]

    @property
    def passed(self) -> bool:
        """Whether no check found a fault."""
        return not self.failures

    @property
    def mistakes(self) -> list[str]:
        """The short names of the recognised mistakes."""
        return [row.mistake for row in self.failures if row.mistake]

    def assert_(self) -> None:
        """Raise AssertionError with the report, unless every check passed."""
        if self.failures:
            raise AssertionError("\n" + str(self))

    def table(self) -> str:
        """Return every row in 80 columns."""
        lines = [self._head()]
        for kind in dict.fromkeys(row.kind for row in self.rows):
            lines.append(kind)
            for row in self.rows:
                if row.kind == kind:
                    label = f"  {row.check:<26.26} {MARKS[row.status]:<6} "
                    rest = " " * len(label)
                    lines += _wrapped(row.sentence, label, rest) or [label.rstrip()]
        return "\n".join(lines)

    def __str__(self) -> str:
        """Return the head, what failed, and a line for each kind: a screen."""
        lines = [self._head()]
        for row in self.failures:
            lines += ["", *_wrapped(f"{row.check}: {row.sentence}", "✗ ", "  ")]
            lines += [f"    {line}"[:WIDTH] for line in row.shown]
            if row.location:
                lines.append(f"    at {row.location}")
        if self.rows:
            lines.append("")
        for status in (PASSED, FAILED, TORCH, NOT_APPLICABLE):
            lines += _wrapped(_counts(self.rows, status), f"  {status:<16}", " " * 18)
        return "\n".join(lines)

    def _head(self) -> str:
        seconds = sum(row.seconds for row in self.rows)
        tried = [row for row in self.rows if row.status in (PASSED, FAILED)]
        what = (
            f"{len(self.failures)} of {len(tried)} checks failed"
            if self.failures
            else (f"{len(tried)} checks passed")
        )
        return f"{self.name}: {what} (seed {self.seed}, {seconds:.1f} s)"


def _counts(rows: list[Row], status: str) -> str:
    """How many rows of each kind have the status."""
    kinds = [row.kind for row in rows if row.status == status]
    return ", ".join(f"{kind} {kinds.count(kind)}" for kind in dict.fromkeys(kinds))


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest)
