"""The docstrings as Markdown: they are plain text, to be read in a terminal.

Formulas stand in indented blocks, which Markdown keeps as they are. What it would spoil is mended
here: `>>>` would be a quotation, and the `#:` beside a field would be lost.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
_FIELD = re.compile(r"#: (.+)$")


class Docstrings(griffe.Extension):
    """Fences around doctests, and the comments of fields as their docstrings."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Mend the docstring of an object."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub(_fenced, obj.docstring.value)
            obj.docstring.value = text

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Take the comment beside a field."""
        if attr.docstring is None and attr.lineno is not None:
            comment = _FIELD.search(attr.source)
            if comment:
                attr.docstring = griffe.Docstring(comment[1], parent=attr)


def _fenced(example: re.Match[str]) -> str:
    return f"```pycon\n{example[0]}\n```"
