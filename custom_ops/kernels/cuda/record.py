"""A bad label found on a device, told to the host without a synchronisation.

A kernel that meets one writes it into a record in pinned host memory, which a device reaches by
itself: where every label is a class this costs nothing, and inside a captured graph it works as
outside. The next call looks there, at plain memory, and raises the IndexError of the earlier one.
Of the programs that meet one the first writes, as a flag in the device's own memory decides: not
every device has atomic operations on the host's.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CLASSES",
    "DIMS",
    "IGNORE_INDEX",
    "LABEL",
    "POSITION",
    "READY",
    "Memory",
    "Record",
    "record_of",
]

READY, POSITION, LABEL, CLASSES, IGNORE_INDEX, DIMS = range(6)


class Memory(NamedTuple):
    """Where kernels write."""

    host: Tensor  #: the record, in the host's memory
    taken: Tensor  #: whether a program writes it or has: one int32 in the device's memory


class Record:
    """What the kernels on one device say about the first bad label that they met."""

    def __init__(self, device: torch.device) -> None:
        host = torch.zeros(6, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.memory = Memory(host, torch.zeros(1, dtype=torch.int32, device=device))
        # a tensor's item would cost a microsecond at every call
        self._fields = (ctypes.c_int64 * 6).from_address(host.data_ptr())

    def check(self) -> None:
        """Raise IndexError if an earlier call has met a bad label and the device has said so."""
        if not self._fields[READY]:
            return
        message = _sentence(*self._fields[POSITION:])
        self._fields[READY] = 0
        self.memory.taken.zero_()  # launched, not waited for: from there on another may write
        raise IndexError(message)


def _sentence(position: int, label: int, classes: int, ignore_index: int, dims: int) -> str:
    where = f"target.flatten()[{position}]" if dims > 1 else "target" + f"[{position}]" * dims
    return (
        f"{where} is {label}, out of range for {classes} classes (0 to {classes - 1}, or "
        f"ignore_index={ignore_index}), in an earlier call of cross_entropy on this device"
    )


_records: dict[torch.device, Record] = {}


def record_of(target: Tensor) -> Record:
    """Return the record of the target's device."""
    record = _records.get(target.device)
    # of two threads that come first at once, both take the same
    return record or _records.setdefault(target.device, Record(target.device))
