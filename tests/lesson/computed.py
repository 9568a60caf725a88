"""The numbers and the text of the lesson, computed once, and what is close to them."""

from functools import cache

import torch

from lesson.network import part_two
from lesson.one_image import one_image
from lesson.page import page


@cache
def case():
    return one_image()


@cache
def numbers():
    return part_two(case())


@cache
def text():
    return page(case(), numbers())


def close(got, want):
    """Equal but for the rounding of float64."""
    torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-13)
