"""Which device the numbers were measured on, and with what."""

from __future__ import annotations

import platform
from datetime import datetime
from typing import Any

import torch

import custom_ops
from benchmarks import rivals
from training.driver import driver_version


def describe(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": custom_ops.backend(),
        "rivals": rivals.versions(),
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
    }
