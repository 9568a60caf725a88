"""Where the numbers were measured."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import custom_ops


def describe() -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "machine": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # above 0.5 or so, others were at work
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        # They decide what memory costs that is written for the first time.
        "huge_pages": _chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": custom_ops.backend(),
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
    }


def _processor() -> str:
    """Return the processor's name; platform.processor() has none on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def _chosen(setting: Path) -> str | None:
    """Return the word that Linux puts into brackets; None elsewhere."""
    word = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return word[1] if word else None
