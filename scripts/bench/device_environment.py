"""Which device the numbers were measured on, and with what."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime
from typing import Any

import torch

import custom_ops
from bench import rivals


def describe(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": custom_ops.backend(),
        "rivals": rivals.versions(),
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
    }


def _driver() -> str | None:
    """Return the driver's version; torch does not tell it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip()
