"""The printed lesson as Markdown: docs/lesson.md, which reads on its own."""

from __future__ import annotations

import re
import textwrap

HEAVY, LIGHT = "━", "─"
LINKS = """\
*Written by `python scripts/explain.py --markdown > docs/lesson.md`, which computes every number.
The same with sliders: [softmax.html](softmax.html), one file, which opens from disk. Five backward
passes to write yourself: [lesson/exercises](../lesson/exercises). The mathematics as code:
[custom_ops/jacobian.py](../custom_ops/jacobian.py).*

![Row vector times Jacobian, one column written out; below it what the element-wise product
gives](explain.png)"""


def markdown(text: str) -> str:
    """Set titles as headings, and what is indented as code; the rest is prose.

    >>> print(block("1. A step\\n──"), block("Prose, v * J."), block("    z = 1"), sep="\\n")
    ## 1. A step
    Prose, v \\* J.
    ```text
    z = 1
    ```
    """
    blocks = [block(lines) for lines in paragraphs(text)]
    blocks.insert(1, LINKS)
    return "\n\n".join(blocks)


def paragraphs(text: str) -> list[str]:
    """Return what empty lines separate; neighbours that are indented stay together."""
    found: list[str] = []
    for lines in filter(None, (part.strip("\n") for part in text.split("\n\n"))):
        if found and indented(found[-1]) and indented(lines):
            found[-1] += "\n\n" + lines
        else:
            found.append(lines)
    return found


def indented(lines: str) -> bool:
    """Whether it is a table, a formula or a picture."""
    return not lines.startswith("def ") and any(x.startswith(" ") for x in lines.splitlines())


def block(lines: str) -> str:
    """Return one paragraph of the text as Markdown."""
    first, *rest = lines.splitlines()
    if rest and rest[0].startswith((HEAVY, LIGHT)):
        return heading(first, rest[0])
    if first.startswith("def "):
        return f"```python\n{lines}\n```"
    if indented(lines):
        return f"```text\n{textwrap.dedent(lines)}\n```"
    return escaped(lines)


def heading(words: str, rule: str) -> str:
    """Return a title: one # for the lesson, two for a part or a step."""
    words = escaped(re.sub("(?<!:) {2,}", " · ", words.replace(":  ", ": ")))
    return f"# {words}" if rule.startswith(HEAVY) and words.startswith("HOW") else f"## {words}"


def escaped(words: str) -> str:
    """Return prose whose signs mean nothing to Markdown."""
    return words.replace("*", "\\*").replace("<", "&lt;")
