"""Numbers of the report as they are read."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a time in words.

    >>> duration(0.01234), duration(0.0001234)
    ('12.34 ms', '123 µs')
    """
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} µs"


def size(bytes: float) -> str:
    """Return an amount of memory in words.

    >>> size(3 << 20), size(1536)
    ('3.00 MiB', '1.5 KiB')
    """
    return f"{bytes / 2**20:.2f} MiB" if bytes >= 2**20 else f"{bytes / 2**10:.1f} KiB"


def largest(value: float | None, not_finite: int, places: int) -> str:
    """Return the largest of so many differences, or at how many places there is none.

    >>> largest(1.5e-8, 0, 6), largest(0.0, 5, 6)
    ('1.5e-08', 'not finite, 5 of 6')
    """
    if not_finite:
        return f"not finite, {not_finite} of {places}"
    return f"{value:.1e}" if value else "0"


def share(value: float) -> str:
    """Return a share of the whole in per cent.

    >>> share(0.98765)
    '98.77 %'
    """
    return f"{100 * value:.2f} %"


def plain(value: float | None) -> str:
    """Return a loss.

    >>> plain(0.25), plain(None)
    ('0.250000', 'not finite')
    """
    return "not finite" if value is None else f"{value:.6f}"
