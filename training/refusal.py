"""The exception for what was asked for and cannot be had."""

from __future__ import annotations


class Refused(RuntimeError):
    """A request that cannot be met; the message is one line that says what and why."""
