"""A battery for anyone's Function: what is wrong with it, in a sentence.

>>> import torch
>>> from custom_ops.testing import check
>>> check(torch.sigmoid, torch.randn(3), only=["gradient"]).passed
True
"""

from custom_ops.testing.battery import battery
from custom_ops.testing.report import Report, Row
from custom_ops.testing.run import check

__all__ = ["Report", "Row", "battery", "check"]
