#!/usr/bin/env python
"""Explain, number by number, how softmax's Jacobian meets the cost's gradient.

One image of the digits goes through one linear layer, softmax and cross-entropy. Every factor of
the chain rule is printed with its name, its shape and its numbers, in the order in which backward
meets them; beside it what the element-wise product would have given. Then the same for a batch and
for a network of two layers. A picture is written as well.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import torch

sys.path.append(str(Path(__file__).parents[1]))  # the lesson is not installed with custom_ops

from lesson.digits import digits
from lesson.markdown import markdown
from lesson.network import part_two
from lesson.one_image import one_image
from lesson.page import page
from lesson.picture import write_picture

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Print the lesson and write its picture."""
    options = parser().parse_args()
    last = len(digits().x) - 1
    if options.index is not None and not 0 <= options.index <= last:
        fail(f"--index must be from 0 to {last}, got {options.index}")
    if options.out.suffix.lower() != ".png":
        fail(f"--out must name a .png file, got {options.out}")
    torch.set_num_threads(1)  # tensors of this size only wait for a second thread
    case = one_image(options.index)
    try:
        write_picture(case, options.out)
    except OSError as error:
        fail(f"the picture cannot be written: {error}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")  # ∂ and Σ, whatever the pipe's locale
    text = page(case, part_two(case))
    print(markdown(text) if options.markdown else f"{text}\n\n{afterwards(options.out)}")


def afterwards(picture: Path) -> str:
    """Say where the picture is, and what there is to do next."""
    there = "" if Path.cwd() == ROOT else f"cd {ROOT} && "
    return f"""\
The picture of it:
{picture}

The same with sliders, in a browser:
{near(ROOT / "docs" / "softmax.html")}

Five backward passes to write yourself, and the command that grades the first:
{near(ROOT / "lesson" / "exercises")}
{there}{near(Path(sys.executable))} -m lesson.exercises.check 1"""


def near(path: Path) -> str:
    """Return the path as seen from here, if it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    new = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    new.add_argument(
        "--index",
        type=int,
        metavar="I",
        help="which of scikit-learn's digits, counted from 0 (default: of the held-out images "
        "that the layer misreads, the one it is least sure of)",
    )
    new.add_argument(
        "--out",
        type=Path,
        default=Path("runs/explain.png"),
        metavar="PNG",
        help="where the picture goes; an existing one is replaced (default: %(default)s)",
    )
    new.add_argument(
        "--markdown", action="store_true", help="print the text as Markdown: docs/lesson.md"
    )
    return new


def fail(sentence: str) -> NoReturn:
    """Leave with one line on stderr."""
    raise SystemExit(f"explain.py: error: {sentence}")


if __name__ == "__main__":
    main()
