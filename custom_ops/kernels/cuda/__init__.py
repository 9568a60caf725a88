"""The door of a GPU: the Triton kernels beside this file, where Triton and a device are there.

They are opaque to autograd and to torch.func, so they answer where nothing is differentiated: in
the forward of a Function, and in a backward that is not differentiated itself. With
TRITON_INTERPRET=1, as the tests without a device run them, they take CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from custom_ops.kernels import eager
from custom_ops.kernels.labels import labels_reported, set_report
from custom_ops.kernels.operators import Operators
from custom_ops.kernels.plain import is_plain
from custom_ops.kernels.problem import Found, Problem, Rows
from custom_ops.kernels.warning import warn_once
from custom_ops.surroundings import constant

__all__ = [
    "interpreted",
    "kernels",
    "library",
    "missing",
    "running",
    "set_launched",
    "takes",
    "version",
    "when_running",
    "where",
]


def wants_interpreter() -> bool:
    """Whether Triton will interpret its kernels, read from the environment as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


interpreted = wants_interpreter()
device, where = ("cpu", "interpreted on the CPU") if interpreted else ("cuda", "on CUDA")
_ABSENT = "Triton is not installed"


def _load() -> tuple[ModuleType | None, str, str]:
    """Return the operators and Triton's version, or why a device here goes without.

    Triton is imported only where there is a device: it takes a second.
    """
    if not interpreted and (torch.version.cuda is None or torch.cuda.device_count() == 0):
        return None, "", ""
    if find_spec("triton") is None:
        return None, "", _ABSENT
    try:
        import triton

        from custom_ops.kernels.cuda import operators
    except Exception as error:  # of any kind: plain ATen operators answer instead
        return None, "", f"Triton cannot be imported ({type(error).__name__}: {error})"
    return operators, triton.__version__, ""


library, version, missing = _load()
# What to warn of at the first use: Triton is there and does not run.
_warning = "" if missing in ("", _ABSENT) else f"no Triton kernels: {missing}"
_tried = interpreted
_waiting: list[Callable[[], None]] = []


def running() -> ModuleType | None:
    """Return the operators if Triton can run them, as an empty kernel shows at the first call.

    Without a C compiler, or for a device that is too old, Triton is imported without an error and
    fails at its first launch. The launch starts CUDA, so ask only where a CUDA tensor is there.
    """
    global library, missing, _warning, _tried
    if library is not None and not _tried:
        _tried = True
        try:
            library.launch_nothing()
        except Exception as error:  # of any kind, as above
            missing = f"Triton cannot run here ({type(error).__name__}: {error})"
            library, _warning = None, f"no Triton kernels: {missing}"
        else:
            for start in _waiting:
                start()
    return library


@constant
def _runs_or_warns() -> bool:
    if running() is None:
        warn_once(_warning)
    return library is not None


def takes(*tensors: Tensor | None) -> bool:
    """Whether the Triton kernels can answer for these: plain tensors, not differentiated here."""
    if library is None and not _warning:
        return False
    return all(t is None or is_plain(t, device) for t in tensors) and _runs_or_warns()


#: What launches a kind of call that was met before, by a function's name, tensors and numbers.
_launched: Callable[[str, tuple[Any, ...], tuple[Any, ...]], list[Any]] | None = None


def set_launched(launched: Callable[[str, tuple[Any, ...], tuple[Any, ...]], list[Any]]) -> None:
    """Have the kernels of a cross-entropy launched by `launched`, without Python's frames."""
    global _launched
    _launched = launched


class _Kernels(Operators):
    """The operators; a kernel launched by hand tells autograd nothing of what it wrote over."""

    def cross_entropy(self, problem: Problem) -> Found:
        if _launched is None or not self._direct() or problem.input.numel() == 0:
            return super().cross_entropy(problem)
        o = problem.options
        numbers = (*o.flat(), o.stats, labels_reported())
        return Found(*_launched("rows", problem.tensors, numbers))

    def cross_entropy_vjp(self, problem: Problem, rows: Rows) -> Tensor:
        if _launched is None or not self._direct():
            return super().cross_entropy_vjp(problem, rows)
        return self._vjp(problem, rows, None, False)

    def cross_entropy_vjp_(self, problem: Problem, rows: Rows) -> Tensor:
        problem = problem._replace(input=problem.input.detach())
        if _launched is None or not self._direct():
            super().cross_entropy_vjp_(problem, rows)
        else:
            self._vjp(problem, rows, None, True)
        self._raise_versions(problem.input)
        return problem.input

    def cross_entropy_vjp_out(self, problem: Problem, rows: Rows, out: Tensor) -> None:
        if _launched is None:
            super().cross_entropy_vjp_out(problem, rows, out)
        else:
            self._vjp(problem, rows, out, False)

    def _vjp(self, problem: Problem, rows: Rows, out: Tensor | None, inplace: bool) -> Any:
        assert _launched is not None
        tensors, numbers = (*problem.tensors, *rows.flat, out), problem.options.flat()
        return _launched("rows_vjp", tensors, (*numbers, inplace))[0]

    def cross_entropy_hvp_(self, problem: Problem, u: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        found = super().cross_entropy_hvp_(problem, u, rows)
        self._raise_versions(problem.input, u)
        return found

    def total(self, x: Tensor) -> Tensor:
        # of a batch's rows in one launch, else as torch adds, which is in one order too
        return super().total(x) if self._direct() else eager.total(x)

    def _raise_versions(self, *tensors: Tensor) -> None:
        if self._direct():
            torch.autograd.graph.increment_version(tensors)

    def _direct(self) -> bool:
        return library is not None and self.now() is library.direct


kernels = _Kernels("custom_ops_cuda", lambda: library and library.direct)


def _report(target: Tensor, classes: int, ignore_index: int) -> None:
    """Have the device write a bad label down."""
    if running() is not None and library is not None:
        library.report(target, classes, ignore_index)


set_report("cuda", _report)


def when_running(start: Callable[[], None]) -> None:
    """Call `start` once the kernels are known to run: now, or at their first use."""
    if interpreted and library is not None:
        start()
    else:
        _waiting.append(start)
