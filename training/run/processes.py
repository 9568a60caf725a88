"""Which process of a run this is: the one that was started, or one that it has launched itself.

The variables that launchers leave (LOCAL_RANK, SLURM_NTASKS and others) outlive them in a shell or
a job script. A process believes those alone that its own parent, a process of the same run, has
set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RUN = "CUSTOM_OPS_RUN"

# What Lightning reads to find its place among processes.
_PLACES = (
    *("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


def launched_in() -> Path | None:
    """Return the run's folder if a process of the run has launched this one."""
    parent, _, folder = os.environ.get(_RUN, "").partition(" ")
    return Path(folder) if parent == str(os.getppid()) else None


@contextmanager
def announced(folder: Path) -> Iterator[None]:
    """Let the processes that this one launches know their parent and the run's folder."""
    os.environ[_RUN] = f"{os.getpid()} {folder}"
    try:
        yield
    finally:
        del os.environ[_RUN]


def forget_places() -> None:
    """Drop what an earlier launcher has left, unless this process was launched by the run."""
    if launched_in() is None:
        for name in _PLACES:
            os.environ.pop(name, None)
