"""How numbers, vectors, matrices and products are set in a page 80 columns wide."""

from __future__ import annotations

import textwrap

from torch import Tensor

WIDTH = 80
BOUNDS = 1e-12, 1e-9, 1e-6  # differences that are rounding; their digits depend on the machine
Terms = list[tuple[float, float]]


def gap(difference: Tensor) -> str:
    """Return the largest entry: 0.295, or < 1e-12 where it is rounding."""
    d = float(difference.abs().max())
    size = f"{d:.3f}" if d >= 1e-3 else f"{d:.0e}"
    return next((f"< {bound:.0e}" for bound in BOUNDS if d < bound), size)


def title(words: str) -> str:
    """Return the words over a rule."""
    return f"{words}\n{'─' * WIDTH}"


def part(words: str) -> str:
    """Return the words over a heavy rule."""
    return f"{words}\n{'━' * WIDTH}"


def header(letter: str, indices: range = range(10)) -> str:
    """Return the line of column numbers above a `row` or `matrix`."""
    return f"{letter + ' =':>10}" + "".join(f"{i:7}" for i in indices)


def row(name: str, values: Tensor) -> str:
    """Return a name and ten numbers; at least one space comes first."""
    return f"{name:>10}" + "".join(f"{number(v):>7}" for v in values.tolist())


def matrix(M: Tensor, letter: str = "k") -> str:
    """Return its rows, named k = 0, k = 1 …"""
    return "\n".join(row(f"{letter} = {k}", values) for k, values in enumerate(M))


def number(v: float) -> str:
    """Return at most six characters: -0.056, -52.48, 12345, or a dot for an exact zero."""
    if v == 0:
        return "·"
    for decimals, limit in ((3, 10), (2, 100), (0, 99_999)):
        if abs(round(v, decimals)) < limit:
            return f"{v:.{decimals}f}"
    return f"{v:.0e}"


def products(name: str, terms: Terms, result: float) -> str:
    """Write a sum of products out, with as many decimals as it takes for the result to agree."""

    def factor(v: float, negative: str) -> str:
        return "0" if v == 0 else f"{v:.{d}f}" if v > 0 else negative.format(f"{v:.{d}f}")

    d = decimals(terms, result)
    start = f"    {name} = "
    words = " + ".join(f"{factor(u, '({})')}·{factor(v, '({})')}" for u, v in terms)
    lines = textwrap.wrap(words, WIDTH - len(start), break_on_hyphens=False)
    end = f"{'=':>{len(start) - 1}} {result:.3f}"
    if len(lines) == 1 and len(start + lines[0] + end.strip()) < WIDTH:
        return f"{start}{lines[0]} {end.strip()}"
    return start + ("\n" + " " * len(start)).join(lines) + f"\n{end}"


def decimals(terms: Terms, result: float) -> int:
    """Return the fewest decimals, 3 or more, whose products add up to the result's three."""

    def agrees(d: int) -> bool:
        return f"{sum(round(u, d) * round(v, d) for u, v in terms):.3f}" == f"{result:.3f}"

    return next((d for d in range(3, 12) if agrees(d)), 12)


def image(x: Tensor) -> list[str]:
    """Return the pixels in five shades, two characters each."""
    return ["".join(2 * " ░▒▓█"[round(4 * p)] for p in line) for line in x.view(8, 8).tolist()]


def beside(left: list[str], right: list[str]) -> str:
    """Return two blocks of lines as one, indented."""
    return "\n".join(f"    {a}   {b}".rstrip() for a, b in zip(left, right, strict=True))


def wrap(words: str) -> str:
    """Fill a paragraph whose numbers' widths vary."""
    return textwrap.fill(" ".join(words.split()), WIDTH)
