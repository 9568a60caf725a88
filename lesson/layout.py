"""How numbers, vectors and matrices are set in a page 80 columns wide."""

from __future__ import annotations

import textwrap

from torch import Tensor

WIDTH = 80


def gap(difference: Tensor) -> str:
    """Return the largest entry: 0.295, 1e-16, or 0 if there is none."""
    d = float(difference.abs().max())
    return f"{d:.3f}" if d >= 1e-3 else f"{d:.0e}" if d else "0"


def title(words: str) -> str:
    """Return the words over a rule."""
    return f"{words}\n{'─' * WIDTH}"


def header(letter: str, indices: range = range(10)) -> str:
    """Return the line of column numbers above a `row` or `matrix`."""
    return f"{letter + ' =':>9}" + "".join(f"{i:7}" for i in indices)


def row(name: str, values: Tensor) -> str:
    """Return a name and ten numbers."""
    return f"{name:>9}" + "".join(f"{number(v):>7}" for v in values.tolist())


def matrix(M: Tensor) -> str:
    """Return ten rows, named k."""
    return "\n".join(row(f"k = {k}", values) for k, values in enumerate(M))


def number(v: float) -> str:
    """Return at most six characters: -0.056, -52.48, 12345, or a dot for an exact zero."""
    if v == 0:
        return "·"
    for decimals, limit in ((3, 10), (2, 100), (0, 99_999)):
        if abs(round(v, decimals)) < limit:
            return f"{v:.{decimals}f}"
    return f"{v:.0e}"


def image(h: Tensor) -> list[str]:
    """Return the pixels in five shades, two characters each."""
    return ["".join(2 * " ░▒▓█"[round(4 * p)] for p in line) for line in h.view(8, 8).tolist()]


def beside(left: list[str], right: list[str]) -> str:
    """Return two blocks of lines as one."""
    return "\n".join(f"{a}   {b}".rstrip() for a, b in zip(left, right, strict=True))


def wrap(words: str) -> str:
    """Fill a paragraph whose numbers' widths vary."""
    return textwrap.fill(" ".join(words.split()), WIDTH)
