"""The pytest plugin: the seed of the battery's tests."""

from __future__ import annotations

import random

import pytest

__all__ = ["pytest_addoption", "pytest_configure", "pytest_report_header"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --battery-seed."""
    parser.addoption(
        "--battery-seed",
        default="0",
        metavar="N",
        help="seed of custom_ops.testing's checks: a number, or 'random' (default: 0)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Draw the seed once, if it is to be random; raise UsageError if it is no number."""
    given = str(config.getoption("--battery-seed"))
    if given == "random":
        given = str(random.randrange(2**31))
    if not given.isdecimal():
        raise pytest.UsageError(
            f"--battery-seed must be a number, 0 or more, or 'random', got {given!r}"
        )
    config.option.battery_seed = int(given)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say the seed, unless it is the usual one."""
    seed = config.option.battery_seed
    return [f"battery: --battery-seed={seed}"] if seed else []
