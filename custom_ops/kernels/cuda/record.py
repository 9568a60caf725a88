"""A bad label found on a device, told to the host without a synchronisation.

A kernel that meets one writes it into a record in pinned host memory, which a device reaches by
itself: where every label is a class this costs nothing, and inside a captured graph it works as
outside. The next call looks there, at plain memory, and raises the IndexError of the earlier one.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

__all__ = [
    "CLASSES",
    "DIMS",
    "IGNORE_INDEX",
    "LABEL",
    "POSITION",
    "READY",
    "TAKEN",
    "Record",
    "record_of",
]

READY, POSITION, LABEL, CLASSES, IGNORE_INDEX, DIMS, TAKEN = range(7)


class Record:
    """What the kernels on one device say about the first bad label that they met.

    TAKEN is set by the program that writes the record, so that only one does. It lies with the rest
    in the host's memory: device memory might be allocated while a graph is captured, and be its.
    """

    def __init__(self, device: torch.device) -> None:
        self.host = torch.zeros(7, dtype=torch.int64, pin_memory=device.type == "cuda")
        # a tensor's item would cost a microsecond at every call
        self._fields = (ctypes.c_int64 * 7).from_address(self.host.data_ptr())

    def check(self) -> None:
        """Raise IndexError if an earlier call has met a bad label and the device has said so."""
        if not self._fields[READY]:
            return
        message = _sentence(*self._fields[POSITION:TAKEN])
        self._fields[READY] = 0
        self._fields[TAKEN] = 0  # from here on another program may write
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
