"""The Triton kernels by the schemas of `kernels.operators`, called directly or by torch.ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from custom_ops.kernels import operators
from custom_ops.kernels.cuda import check, cross_entropy, gradient, hessian
from custom_ops.kernels.cuda.contract import contract, log_softmax_jvp, log_softmax_vjp
from custom_ops.kernels.cuda.labels import report
from custom_ops.kernels.cuda.probe import launch_nothing
from custom_ops.kernels.cuda.reduction import total
from custom_ops.kernels.cuda.softmax import softmax
from custom_ops.kernels.problem import Options, Problem, Rows

__all__ = ["direct", "launch_nothing", "report"]


def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, *flat: Any
) -> tuple[Tensor, ...]:
    found = cross_entropy.cross_entropy(Problem(input, target, weight, Options.of(*flat)))
    loss, M, L, prediction, entropy = found
    none = M.new_empty(0)
    return (
        *(loss, M, L, none.long() if prediction is None else prediction),
        none if entropy is None else entropy,
    )


def _vjp_of(launch: Callable[[Problem, Rows], Any]) -> Callable[..., Any]:
    def operator(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> Tensor | None:
        g, q, M, L, *flat = rest
        o = Options.of(*flat)
        return launch(Problem(input, target, weight, o), Rows(g, q, M, L))

    return operator


def _hvp(
    input: Tensor, target: Tensor, weight: Tensor | None, u: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    g, q, M, L, *flat = rest
    o = Options.of(*flat)
    return hessian.cross_entropy_hvp_(Problem(input, target, weight, o), u, Rows(g, q, M, L))


def _vjp_out(*args: Any) -> None:
    input, target, weight, g, q, M, L, *flat, out = args
    o = Options.of(*flat)
    gradient.cross_entropy_vjp_out(Problem(input, target, weight, o), Rows(g, q, M, L), out)


class direct:
    """The operators without torch's dispatcher."""

    softmax = staticmethod(softmax)
    contract = staticmethod(contract)
    log_softmax_vjp = staticmethod(log_softmax_vjp)
    log_softmax_jvp = staticmethod(log_softmax_jvp)
    cross_entropy = staticmethod(_cross_entropy)
    cross_entropy_vjp = staticmethod(_vjp_of(gradient.cross_entropy_vjp))
    cross_entropy_vjp_ = staticmethod(_vjp_of(gradient.cross_entropy_vjp_))
    cross_entropy_vjp_out = staticmethod(_vjp_out)
    cross_entropy_hvp_ = staticmethod(_hvp)
    total = staticmethod(total)


_CHECKS: dict[str, Callable[..., None]] = {
    "softmax": check.check_softmax,
    "contract": check.check_pair,
    "log_softmax_vjp": check.check_pair,
    "log_softmax_jvp": check.check_pair,
    "cross_entropy": check.check_problem,
    "cross_entropy_vjp": check.check_vjp,
    "cross_entropy_vjp_": check.check_vjp,
    "cross_entropy_hvp_": check.check_hvp,
}


def _checked(name: str) -> Callable[..., Any]:
    def operator(*args: Any) -> Any:
        if name in _CHECKS:
            _CHECKS[name](*args)
        return getattr(direct, name)(*args)

    return operator


_library = operators.define("custom_ops_cuda")
for _name in operators.OPERATORS:
    for _device in ("CUDA", "CPU"):  # on CPU tensors in Triton's interpreter alone
        _library.impl(_name, _checked(_name), _device)
