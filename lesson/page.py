"""The lesson as text, 80 columns wide: what it asks, and its two parts."""

from __future__ import annotations

from lesson.layout import part
from lesson.network import Numbers
from lesson.one_image import OneImage
from lesson.part_one import part_one
from lesson.part_two import part_two_steps


def page(case: OneImage, numbers: Numbers) -> str:
    """Return the whole lesson."""
    return "\n\n\n".join([opening(), *part_one(case), *part_two_steps(case, numbers)])


def opening() -> str:
    """Ask the question and answer it."""
    return f"""\
{part("HOW A VECTOR MEETS A MATRIX: a backward pass through softmax, with its numbers")}

Softmax's derivative is a Jacobian, a matrix. The cost's gradient is a vector.
How are they multiplied? Row vector times matrix; never element by element.

Part one follows one image from its scores to ∂C/∂W. Part two does the same for
a batch and for a network of two layers, whose code is ten lines. Letters:

    x  a layer's input     W, b  its weights     z  scores     a  probabilities
    y  target              C     the cost        v  ∂C/∂a      J  ∂a/∂z
    k  index of a probability     s  index of a score     i, j  W's row, column"""
