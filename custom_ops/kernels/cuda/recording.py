"""What a call launches, written down so that it can be launched again for other tensors.

Triton's compiled kernel is asked for its handle, its shared memory and the types of its parameters.
It is launched with those of its arguments that are not compiled into it (None, 1 and what is
constexpr are), tuples taken apart, and behind them with two addresses of scratch memory that no
kernel here needs. Its PTX says how large each parameter is, which must agree.
"""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Tape", "current", "recorded"]

#: The bytes of a number, by Triton's name of its type.
FORMATS = {"i32": "<i", "i64": "<q", "u64": "<Q", "fp32": "<f", "fp64": "<d"}
SIZES = {"32": 4, "64": 8}
SCRATCH = [struct.pack("<Q", 0)] * 2


class Launch(NamedTuple):
    """A launch as it was made."""

    kernel: Any  #: Triton's compiled one
    programs: int
    warps: int
    args: tuple[Any, ...]


class Tape:
    """The launches of one call, and the memory that it allocated for them."""

    def __init__(self, given: tuple[Tensor | None, ...]) -> None:
        self.given, self.fresh, self.launches = given, list[Tensor](), list[Launch]()
        self.watched: Tensor | None = None  #: the record of bad labels

    def recording(self, results: tuple[Tensor | None, ...], made: Callable[..., Any]) -> Any:
        """Return `made` of all this, or None where something other than these launches was done.

        That shows in memory that is neither the call's nor known to be fresh: a copy, or the result
        of an operator of torch's. `made` is the C++ library's Recording.
        """
        places: dict[int, int] = {}
        for place, t in enumerate((*self.given, *self.fresh)):
            if t is not None:
                address = t.data_ptr()
                if address == 0 or places.setdefault(address, place) != place:
                    return None  # nothing in it, or two tensors that a later call may tell apart
        try:
            allocated = self._as_returned(results)
            found = [-1 if t is None else places[t.data_ptr()] for t in results]
            watched = 0 if self.watched is None else self.watched.data_ptr()
            recording = made(allocated, found, watched)
            for launch in self.launches:
                recording.add_launch(*self._described(launch, places))
        except (AttributeError, KeyError):
            return None
        return recording

    def _as_returned(self, results: tuple[Tensor | None, ...]) -> list[Tensor]:
        """Return the fresh memory, in the shape in which it is a result if it is one."""
        shapes = {t.data_ptr(): t for t in results if t is not None}
        return [shapes.get(t.data_ptr(), t) for t in self.fresh]

    def _described(self, launch: Launch, places: dict[int, int]) -> tuple[Any, ...]:
        """Return the arguments of `Recording.add_launch`; KeyError for what it has no form for."""
        kernel, programs, warps, args = launch
        about = kernel.metadata
        plain = (about.num_ctas, about.global_scratch_size, about.profile_scratch_size) == (1, 0, 0)
        if not plain or about.launch_cooperative_grid or about.launch_pdl:
            raise KeyError("a launch of another kind")
        signature = kernel.src.signature.values()
        parameters = [*self._parameters(args, signature, places), *SCRATCH]
        sizes = [len(p) if isinstance(p, bytes) else 8 for p in parameters]
        if sizes != _sizes(kernel.asm["ptx"]):
            raise KeyError("parameters of another Triton")
        return kernel.function, programs, 32 * warps, about.shared, parameters

    def _parameters(self, args: Any, signature: Any, places: dict[int, int]) -> Iterator[Any]:
        """Yield the place of each tensor and the bytes of each number that the kernel takes."""
        for arg, kind in zip(args, signature, strict=True):
            if isinstance(kind, tuple):
                yield from self._parameters(arg, kind, places)
            elif kind == "constexpr":
                continue
            elif not isinstance(arg, Tensor):
                yield struct.pack(FORMATS[kind], arg)
            elif arg is self.watched:
                yield struct.pack("<Q", arg.data_ptr())
            else:
                yield places[arg.data_ptr()]


def _sizes(ptx: str) -> list[int]:
    """Return how many bytes each parameter of the kernel takes."""
    entry = ptx.partition(".entry")[2].partition(")")[0]
    return [SIZES[bits] for bits in re.findall(r"\.param \.[a-z](\d+)", entry)]


_here = threading.local()


def current() -> Tape | None:
    """Return the tape that this thread writes on, if any."""
    return getattr(_here, "tape", None)


@contextmanager
def recorded(given: tuple[Tensor | None, ...]) -> Iterator[Tape]:
    """Write what is launched for these tensors on a tape."""
    _here.tape = Tape(given)
    try:
        yield _here.tape
    finally:
        _here.tape = None
