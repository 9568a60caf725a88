"""What is printed never ends a run: a stream that cannot take the text gets less of it."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

#: In place of characters that the stream's encoding lacks.
_PLAIN = {"µ": "u", "×": "x", "±": "+-", "–": "-", "−": "-", "·": ".", "…": "...", "⁻": "-"}


@contextmanager
def lasting() -> Iterator[None]:
    """Let stdout and stderr take any text, and outlive a reader that has gone or a full disk."""
    codecs.register_error("plain", _in_plain_characters)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # while its failure still has no consequence
        sys.stdout, sys.stderr = before


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lost = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in lost), error.end


class _Lasting:
    """A text stream whose writes do not fail; after the first that would, they go nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._leave()

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _lasting(stream: Any) -> Any:
    # None where the descriptor was closed from the start; print and rich know that case.
    if stream is None or isinstance(stream, _Lasting):
        return stream
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="plain")
    return _Lasting(stream)
