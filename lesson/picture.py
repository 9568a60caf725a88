"""The lesson as one picture: a row vector laid over one column of the Jacobian, and the result.

What shares an index shares a line: v_k stands beside row k of J, ∂C/∂z_s below its column s.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from torch import Tensor

from lesson.one_image import Comparison, OneImage

WIDTH, HEIGHT, DPI = 8.3, 5.75, 200  # inches; a README shows it 830 pixels wide
CELL, ROW = 0.4, 0.31  # a number's width and height
TOP, RIGHT_V, LEFT_J, LEFT_COLUMN = 1.3, 1.2, 1.5, 6.15  # where J begins, and the strips beside it
STRIP = 0.52
COLOURS = "PuOr_r"  # diverging: orange above zero, violet below, for every kind of colour vision
GREY, INK = "0.35", "0.1"
MARK = "#00695c"  # the column that is written out


def write_picture(case: OneImage, out: Path) -> None:
    """Draw the lesson into the PNG file `out`, creating its folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(draw(case)).print_png(str(out))


def draw(case: OneImage) -> Figure:
    """Return the picture."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    e, s = case.squared_error, case.rival
    title(figure, case)
    limit = float(e.v.abs().max())
    v = heat(figure, RIGHT_V - STRIP, TOP, e.v[:, None], limit, STRIP)
    v.set_yticks(range(10), [str(k) for k in range(10)])
    v.set_title("v = ∂C/∂a\n(10,)", size=9.5, pad=4, linespacing=1.3)
    J = heat(figure, LEFT_J, TOP, e.J, float(e.J.abs().max()))
    J.set_xticks(range(10), [str(k) for k in range(10)])
    J.set_title("J = ∂a/∂z   (10, 10),   $J_{ks} = a_k (\\delta_{ks} - a_s)$", size=9.5, pad=20)
    frame(J, s, 10)
    indices(figure)
    column(figure, J, e, s)
    results(figure, e, s)
    return figure


def title(figure: Figure, case: OneImage) -> None:
    """Say what the picture says, and what it is a picture of."""
    message = "Row vector times Jacobian: every score adds up ten products"
    figure.text(0.5, 1 - 0.3 / HEIGHT, message, ha="center", va="center", size=14, weight="bold")
    guess = int(case.factors.a.argmax())
    read = "read rightly" if guess == case.label else f"taken for a {guess}"
    words = f"softmax of ten scores, squared error; one image of a {case.label}, {read}"
    figure.text(0.5, 1 - 0.6 / HEIGHT, words, ha="center", va="center", size=9.5, color=GREY)


def indices(figure: Figure) -> None:
    """Name the two indices where they count: k down the left edge, s along the top of J."""
    for x, y, letter in (
        (RIGHT_V - STRIP - 0.1, TOP - 0.06, "k"),
        (LEFT_J - 0.12, TOP - 0.12, "s"),
    ):
        figure.text(x / WIDTH, 1 - y / HEIGHT, letter, ha="center", va="center", size=9, color=GREY)


def column(figure: Figure, J: Axes, e: Comparison, s: int) -> None:
    """Lay v over column s: two strips side by side, their products, and the sum."""
    terms = e.v * e.J[:, s]
    places = [LEFT_COLUMN + n * (STRIP + 0.18) for n in range(3)]
    strips = [
        heat(figure, places[0], TOP, e.v[:, None], float(e.v.abs().max()), STRIP, decimals=3),
        heat(figure, places[1], TOP, e.J[:, [s]], float(e.J.abs().max()), STRIP, decimals=3),
        heat(figure, places[2], TOP, terms[:, None], 0, STRIP, decimals=3),
    ]
    for axes, name in zip(strips, ("$v_k$", f"$J_{{k{s}}}$", "product"), strict=True):
        axes.set_title(name, size=9.5, pad=4)
    frame(strips[1], 0, 10)
    for n, sign in enumerate("·="):
        x = (places[n] + STRIP + 0.09) / WIDTH
        for k in range(10):
            y = 1 - (TOP + (k + 0.5) * ROW) / HEIGHT
            figure.text(x, y, sign, ha="center", va="center", size=9, color=GREY)
    for edge in (-0.5, 9.5):
        line = ConnectionPatch(
            (s + 0.5, edge), (-0.5, edge), "data", "data", axesA=J, axesB=strips[0]
        )
        line.set(color=MARK, linewidth=0.8, linestyle=(0, (2, 2)), alpha=0.6)
        figure.add_artist(line)
    x, y = (places[2] + STRIP) / WIDTH, 1 - (TOP + 10 * ROW + 0.16 + ROW / 2) / HEIGHT
    total = f"added up: ∂C/∂z$_{s}$ = {signed(float(e.right[s]), 3)}"
    figure.text(x, y, total, ha="right", va="center", size=9.5, color=MARK, weight="bold")


def results(figure: Figure, e: Comparison, s: int) -> None:
    """Draw the result below J, a number under each column, and below it the element-wise one."""
    limit = float(e.right.abs().max())
    first, second = TOP + 10 * ROW + 0.16, TOP + 11 * ROW + 0.32
    right = heat(figure, LEFT_J, first, e.right[None], limit)
    frame(right, s, 1)
    wrong = heat(figure, LEFT_J, second, e.wrong[None], limit)
    for axes, name in ((right, "∂C/∂z = v @ J"), (wrong, "v * diag(J)")):
        axes.text(-0.7, 0, f"{name}  (10,)", ha="right", va="center", size=8.5)
    kept = signed(float(e.wrong[s]), 3)
    words = f"element-wise keeps one of\nthe ten, {kept}; it is {e.relative_error:.0%} off"
    at = LEFT_COLUMN / WIDTH, 1 - (second + ROW / 2) / HEIGHT
    figure.text(*at, words, va="center", size=9.5, color=INK, linespacing=1.4)
    key = "orange above zero, violet below, each panel on its own scale; numbers are rounded"
    figure.text(LEFT_J / WIDTH, 0.16 / HEIGHT, key, size=8, color=GREY)


def heat(
    figure: Figure,
    left: float,
    top: float,
    M: Tensor,
    limit: float,
    cell: float = CELL,
    decimals: int = 2,
) -> Axes:
    """Draw a matrix with its numbers, the colours reaching as far as ±limit; 0 for none."""
    rows, columns = M.shape
    inches = left, HEIGHT - top - rows * ROW, columns * cell, rows * ROW
    axes = figure.add_axes(
        (inches[0] / WIDTH, inches[1] / HEIGHT, inches[2] / WIDTH, inches[3] / HEIGHT)
    )
    reach = limit or float("inf")
    axes.imshow((M / reach).numpy(), cmap=COLOURS, vmin=-1, vmax=1, aspect="auto")
    for r, values in enumerate(M.tolist()):
        for c, v in enumerate(values):
            ink = "white" if abs(v) > 0.7 * reach else INK
            axes.text(c, r, signed(v, decimals), ha="center", va="center", size=8, color=ink)
    axes.set(xticks=[], yticks=[])
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.tick_params(length=0, labelsize=8, labelcolor=GREY, pad=2)
    for spine in axes.spines.values():
        spine.set(color="0.6", linewidth=0.6)
    return axes


def frame(axes: Axes, column: int, rows: int) -> None:
    """Mark a column."""
    box = Rectangle((column - 0.5, -0.5), 1, rows, fill=False, color=MARK, linewidth=2)
    axes.add_patch(box).set_clip_on(False)


def signed(v: float, decimals: int) -> str:
    """Return a number that fits a cell: .15, −.06, −5.2, and 0 where it rounds to it."""
    digits = f"{abs(v):.{decimals}f}"
    if float(digits) == 0:
        return "0"
    if abs(v) >= 9.95:
        digits = f"{abs(v):.0f}" if abs(v) < 999.5 else f"{abs(v):.0e}".replace("e+0", "e")
    elif float(digits) >= 1:
        digits = f"{abs(v):.{decimals - 1}f}"
    return "−" * (v < 0) + digits.removeprefix("0")
