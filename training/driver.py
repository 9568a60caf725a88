"""The version of NVIDIA's driver, which torch does not tell."""

from __future__ import annotations

import subprocess

__all__ = ["driver_version"]


def driver_version() -> str | None:
    """Return the version, or None where the driver's own program is not there or says nothing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None
