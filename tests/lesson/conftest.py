"""The numbers of the lesson, computed once."""

from importlib.util import find_spec

import pytest
import torch

WITHOUT = [name for name in ("sklearn", "matplotlib") if not find_spec(name)]
collect_ignore_glob = ["test_*.py"] * bool(WITHOUT)  # they need the extra [train]


@pytest.fixture(scope="session")
def case():
    from lesson.one_image import one_image

    return one_image()


@pytest.fixture(scope="session")
def numbers(case):
    from lesson.network import part_two

    return part_two(case)


@pytest.fixture(scope="session")
def text(case, numbers):
    from lesson.page import page

    return page(case, numbers)


@pytest.fixture
def close():
    """Equal but for the rounding of float64."""

    def assert_close(got, want):
        torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-13)

    return assert_close
