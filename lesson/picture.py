"""The lesson as one picture: the Jacobian as a heat map between the two vectors."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lesson.numbers import Lesson

WIDTH, HEIGHT, CELL = 17.4, 7.0, 0.44  # inches
LEFT, MIDDLE, RIGHT = 0.7, 6.5, 12.3  # where ∂C/∂a, J and ∂C/∂z begin
BOTTOM = 0.85  # of J
COLOURS = "PuOr_r"  # diverging: orange above zero, violet below, for every kind of colour vision
GREY = "0.35"


def write_picture(x: Lesson, out: Path) -> None:
    """Draw the lesson into the PNG file `out`, creating its folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=110, facecolor="white")
    sentence = "Softmax's gradient is row vector times Jacobian: every score gathers ten products."
    figure.text(0.5, 0.94, sentence, ha="center", size=20, weight="bold")
    the_case(figure, x)
    vector_times_matrix(figure, x)
    mistake(figure, x)
    one_score(figure, x)
    FigureCanvasAgg(figure).print_png(str(out))


def the_case(figure: Figure, x: Lesson) -> None:
    """Show the image in the corner, and what the layer makes of it."""
    axes = place(figure, LEFT, 4.4, 1.5, 1.5)
    axes.imshow(x.h.view(8, 8), cmap="gray_r", vmin=0, vmax=1)
    guess = int(x.g.a.argmax())
    words = f"a {x.label}; a linear layer\nand softmax read a {guess}\n\n"
    words += f"$a_{x.label}$ = {x.g.a[x.label]:.2f}"
    words += f",  $a_{guess}$ = {x.g.a[guess]:.2f}" if guess != x.label else ""
    axes.text(1.12, 0.5, words, transform=axes.transAxes, va="center", size=14)


def vector_times_matrix(figure: Figure, x: Lesson) -> None:
    """Draw ∂C/∂a × J = ∂C/∂z, each with its shape."""
    level = BOTTOM + 4.5 * CELL
    vector = heat(figure, LEFT, level, x.g.dC_da[None], "k")
    label(vector, "v = ∂C/∂a", "(10,), a vector: $-y_k / a_k$")
    J = heat(figure, MIDDLE, BOTTOM, x.g.J, "s")
    J.set_yticks(range(10), [str(k) for k in range(10)])
    J.set_ylabel("k", rotation=0, size=13, color=GREY, labelpad=8)
    label(J, "J = ∂a/∂z", "(10, 10), a matrix: $J_{ks} = a_k (\\delta_{ks} - a_s)$")
    product = heat(figure, RIGHT, level, x.g.dC_dz[None], "s")
    label(
        product, "∂C/∂z", "(10,), a vector: $\\Sigma_k\\ \\partial C/\\partial a_k \\cdot J_{ks}$"
    )
    for left, sign in ((LEFT, "×"), (MIDDLE, "=")):
        gap = (MIDDLE - LEFT - 10 * CELL) / 2
        at = (left + 10 * CELL + gap - 0.1) / WIDTH, (level + CELL / 2) / HEIGHT
        figure.text(*at, sign, ha="center", va="center", size=34)


def mistake(figure: Figure, x: Lesson) -> None:
    """Draw what the element-wise product gives, below the right result."""
    e = x.cross_entropy
    wrong = heat(figure, RIGHT, BOTTOM, e.wrong[None], "s", like=e.right)
    label(wrong, "", f"wrong: element-wise, {e.relative_error:.0%} off, {e.angle:.0f}° askew")
    wrong.set_title("v * diag(J)", size=15, family="monospace", pad=24)


def one_score(figure: Figure, x: Lesson) -> None:
    """Write one entry of ∂C/∂z out, and say what the colours mean."""
    s, k = int((x.g.a - 2 * x.y).argmax()), x.label
    v, J = float(x.g.dC_da[k]), float(x.g.J[k, s])
    product = f"({v:.3f}) · ({J:.3f}) = {x.g.dC_dz[s]:.3f}".replace("-", "−")
    words = f"Score {s}: the vector runs down column {s}.\nOf ten products, "
    words += f"nine are 0, one is left:\n{product}"
    figure.text(LEFT / WIDTH, 1.3 / HEIGHT, words, size=14, va="center", linespacing=1.5)
    scale = "orange: above zero; violet: below; each panel's scale its own"
    figure.text(LEFT / WIDTH, 0.3 / HEIGHT, scale, size=11, color=GREY)


def heat(
    figure: Figure, left: float, bottom: float, M: Tensor, index: str, like: Tensor | None = None
) -> Axes:
    """Draw a matrix with its numbers, the colours reaching as far as `like`'s largest entry."""
    rows, columns = M.shape
    axes = place(figure, left, bottom, columns * CELL, rows * CELL)
    limit = float((M if like is None else like).abs().max())
    axes.imshow(M, cmap=COLOURS, vmin=-limit, vmax=limit, aspect="auto")
    for r, values in enumerate(M.tolist()):
        for c, v in enumerate(values):
            ink = "white" if abs(v) > 0.7 * limit else "black" if abs(v) >= 0.005 else "0.6"
            axes.text(c, r, short(v), ha="center", va="center", size=12, color=ink)
    axes.set_xticks(range(columns), [str(c) for c in range(columns)])
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.tick_params(length=0, labelsize=11, labelcolor=GREY)
    axes.text(-0.75, -0.85, index, ha="center", va="center", size=13, color=GREY)
    return axes


def label(axes: Axes, name: str, shape: str) -> None:
    """Write a factor's name above it and its shape below."""
    axes.set_title(name, size=18, pad=10)
    axes.set_xlabel(shape, size=14, labelpad=8)


def place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Return bare axes at a place given in inches."""
    inches = (left / WIDTH, bottom / HEIGHT, width / WIDTH, height / HEIGHT)
    axes = figure.add_axes(inches)
    axes.set(xticks=[], yticks=[])
    return axes


def short(v: float) -> str:
    """Return a number that fits a cell: .15, −.06, −5.2, .00, and 0 where it is exactly that."""
    if v == 0:
        return "0"
    digits = f"{abs(v):.2f}".lstrip("0") if abs(v) < 0.995 else f"{abs(v):.1f}"
    if abs(v) >= 9.95:
        digits = f"{abs(v):.0f}" if abs(v) < 999.5 else f"{abs(v):.0e}".replace("e+0", "e")
    return "−" * (v <= -0.005) + digits
