"""The kernels as torch.library knows them: custom_ops_cuda::…, with the schemas of the C++ ones."""

from collections.abc import Callable
from typing import Any

import torch

from custom_ops.kernels import fakes
from custom_ops.kernels.cuda.check import (
    check_hvp,
    check_pair,
    check_problem,
    check_softmax,
    check_vjp,
)
from custom_ops.kernels.cuda.contract import contract, log_softmax_jvp, log_softmax_vjp
from custom_ops.kernels.cuda.cross_entropy import cross_entropy
from custom_ops.kernels.cuda.gradient import cross_entropy_vjp, cross_entropy_vjp_
from custom_ops.kernels.cuda.hessian import cross_entropy_hvp_
from custom_ops.kernels.cuda.labels import report
from custom_ops.kernels.cuda.node import backward, forward
from custom_ops.kernels.cuda.probe import launch_nothing
from custom_ops.kernels.cuda.reduction import FEW, total
from custom_ops.kernels.cuda.softmax import softmax

__all__ = [
    "FEW",
    "backward",
    "contract",
    "cross_entropy",
    "cross_entropy_hvp_",
    "cross_entropy_vjp",
    "cross_entropy_vjp_",
    "forward",
    "launch_nothing",
    "log_softmax_jvp",
    "log_softmax_vjp",
    "report",
    "softmax",
    "total",
]

_NUMBERS = (
    "int ignore_index, float label_smoothing, float z_loss, float logit_scale, float? softcap"
)
_VJP = (
    f"Tensor target, Tensor? weight, Tensor g, Tensor? h, Tensor M, Tensor L, int dim, {_NUMBERS}"
)
_HVP = (
    "Tensor target, Tensor? weight, Tensor(b!) u, Tensor g, Tensor? h, Tensor M, Tensor L, "
    "int ignore_index, float label_smoothing, float z_loss"
)
_SCHEMAS: dict[Any, str] = {
    softmax: "(Tensor input, int dim, bool log) -> Tensor",
    contract: "(Tensor p, Tensor v, int dim) -> Tensor",
    log_softmax_vjp: "(Tensor y, Tensor v, int dim) -> Tensor",
    log_softmax_jvp: "(Tensor y, Tensor v, int dim) -> Tensor",
    cross_entropy: (
        f"(Tensor input, Tensor target, Tensor? weight, int dim, ScalarType dtype, {_NUMBERS}, "
        "bool predict) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    cross_entropy_vjp: f"(Tensor input, {_VJP}) -> Tensor",
    cross_entropy_vjp_: f"(Tensor(a!) input, {_VJP}) -> ()",
    cross_entropy_hvp_: f"(Tensor(a!) z, {_HVP}) -> (Tensor, Tensor)",
}

_CHECKS: dict[Any, Callable[..., None]] = {
    softmax: check_softmax,
    contract: check_pair,
    log_softmax_vjp: check_pair,
    log_softmax_jvp: check_pair,
    cross_entropy: check_problem,
    cross_entropy_vjp: check_vjp,
    cross_entropy_vjp_: check_vjp,
    cross_entropy_hvp_: check_hvp,
}


def _checked(launch: Callable[..., Any]) -> Callable[..., Any]:
    check = _CHECKS[launch]

    def operator(*args: Any) -> Any:
        check(*args)
        return launch(*args)

    return operator


_library = torch.library.Library("custom_ops_cuda", "DEF")
for function, schema in _SCHEMAS.items():
    _library.define(function.__name__ + schema, tags=(torch.Tag.needs_fixed_stride_order,))
    for device in ("CUDA", "CPU"):  # on CPU tensors in Triton's interpreter alone
        _library.impl(function.__name__, _checked(function), device)
fakes.register("custom_ops_cuda")
