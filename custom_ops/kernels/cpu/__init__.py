"""The door of the CPU: the C++ kernels beside this file, where they were built.

They answer where nothing is differentiated: in the forward of a Function, and in a backward that is
not differentiated itself. The derivatives of the registered operators are in
`custom_ops.derivatives`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from custom_ops.kernels import built
from custom_ops.kernels.labels import checked_labels
from custom_ops.kernels.operators import Operators, define
from custom_ops.kernels.plain import is_plain
from custom_ops.kernels.problem import Found, Problem, Rows
from custom_ops.kernels.warning import warn_once

__all__ = ["capability", "kernels", "library", "missing", "takes"]

capability = torch.backends.cpu.get_cpu_capability()


def _load() -> tuple[ModuleType | None, str, str]:
    """Return the library for the vector set that torch uses here, or why there is none.

    The last is what to warn of at the first use: kernels that are there and cannot be used.
    """
    found = built.find(built.read(), torch.__version__, capability)
    library, missing, unusable = None, found.missing, found.unusable
    if found.name:
        try:
            library = importlib.import_module(f"custom_ops.kernels.{found.name}")
        except ImportError as error:
            missing, unusable = f"they cannot be loaded ({error}): {built.REINSTALL}", True
    return library, missing, f"no C++ kernels: {missing}" if unusable else ""


library, missing, _warning = _load()
_defined = None if library is None else define("custom_ops")


def takes(*tensors: Tensor | None) -> bool:
    """Whether the C++ kernels can answer for these: plain CPU tensors, not differentiated here."""
    if library is None:
        warn_once(_warning)
        return False
    return all(t is None or is_plain(t, "cpu") for t in tensors)


class _Kernels(Operators):
    """The operators, given what the C++ kernels read: labels of int64, and few dtypes."""

    def cross_entropy(self, problem: Problem) -> Found:
        target, o = problem.target, problem.options
        if not (problem.soft or target.dtype == torch.int64):
            target = checked_labels(target, problem.classes, o.ignore_index)
        return super().cross_entropy(_readable(problem._replace(target=target)))

    def cross_entropy_vjp(self, problem: Problem, rows: Rows) -> Tensor:
        return super().cross_entropy_vjp(_readable(problem), rows).to(problem.input.dtype)

    def cross_entropy_vjp_(self, problem: Problem, rows: Rows) -> Tensor:
        problem = problem._replace(input=problem.input.detach())
        readable = _readable(problem)
        if readable.input is problem.input:
            return super().cross_entropy_vjp_(readable, rows)
        return problem.input.copy_(super().cross_entropy_vjp(readable, rows))

    def cross_entropy_vjp_out(self, problem: Problem, rows: Rows, out: Tensor) -> None:
        readable = _readable(problem)
        if readable.input is problem.input:
            super().cross_entropy_vjp_out(readable, rows, out)
        else:
            out.copy_(super().cross_entropy_vjp(readable, rows))

    def cross_entropy_hvp_(self, problem: Problem, u: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return super().cross_entropy_hvp_(_readable(problem), u, rows)


def _readable(problem: Problem) -> Problem:
    """Return the problem in types that the kernels for its dtype read.

    These are the dtype itself and, where it is float32, the half types.
    """
    dtype = problem.options.dtype

    def cast(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.to(torch.int64)
        half = dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)
        return x if half else x.to(dtype)

    return problem._replace(input=cast(problem.input), target=cast(problem.target))


kernels = _Kernels("custom_ops", lambda: library and library.direct)
