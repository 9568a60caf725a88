"""Cross-entropy: one formula for every kind of target and every option.

With z = s·tanh(α·input / s) the logits (z = input by default), p = softmax(z),
lse = log Σ_k exp(z_k), ỹ_k the weight of class k in the row (`kernels.eager.targets`) and
m = Σ_k ỹ_k,

    ℓ              = m·lse − ⟨ỹ, z⟩ + λ·lse²
    ∂ℓ/∂z_s        = Σ_k ∂ℓ/∂p_k · J_ks = c·p_s − ỹ_s           with c = m + 2λ·lse

and, g being the upstream gradient of ℓ and q that of lse, both one number a row,

    dz             = a·p − g·ỹ                                  with a = g·c + q
    ∂⟨u, dz⟩/∂z    = a·J u + 2λ·g·⟨p, u⟩·p                      J u = contract(p, u)
    ∂⟨u, dz⟩/∂g    = c·⟨p, u⟩ − ⟨ỹ, u⟩       ∂⟨u, dz⟩/∂q = ⟨p, u⟩
    ∂⟨u, dz⟩/∂ỹ    = g·(⟨p, u⟩ − u)

The Hessian is symmetric, so the second line is the double backward (u a cotangent) and the forward
mode of the backward (u a tangent). Probabilities and weights get theirs from ∂ℓ/∂ỹ_k = lse − z_k.

The entropy of a row is H = −Σ_k p_k log p_k, with 0 · log 0 = 0. By the same contraction,
∂H/∂z = J (−log p), as Σ_s J_ks = 0.

Sources: softmax and its Jacobian, Bridle (1990); label smoothing, Szegedy et al. (2016); z-loss,
de Brébisson and Vincent (2016) and PaLM (Chowdhery et al., 2022, section 5); the soft cap of the
logits, Bello et al. (2017) and Gemma 2 (2024, section 2).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_unary

from custom_ops import kernels, sharded
from custom_ops.apply import apply, forward_mode_of
from custom_ops.autocast import autocast_widened
from custom_ops.checks import (
    as_index,
    check_cross_entropy_tensors,
    check_dense,
    check_dtype,
    check_inplace,
    check_input,
    check_label_weight,
    check_normalizer,
    checked_numbers,
)
from custom_ops.kernels import Options, Problem, Rows, eager
from custom_ops.kernels.eager import targets
from custom_ops.node import node, set_vjp
from custom_ops.reduction import Total, denominator
from custom_ops.row import Row, blank_ignored
from custom_ops.surroundings import is_transformed, is_watched

__all__ = ["CrossEntropyStats", "cross_entropy"]

#: The options in the node's order.
GIVEN = (
    *("ignore_index", "reduction", "label_smoothing"),
    *("z_loss", "softcap", "logit_scale", "normalizer"),
)


class CrossEntropyStats(NamedTuple):
    """What the pass over the logits also found, one a row; an ignored row has 0, −1 and 0."""

    lse: Tensor  #: log Σ_k exp(z_k), in float32 or better; differentiable
    prediction: Tensor  #: arg-max of the logits, int64
    entropy: Tensor  #: −Σ_k p_k log p_k, in float32 or better; differentiable


#: The loss; with return_stats=True, (loss, stats). Any spares a caller to ask which of them it is.
LossAndStats: TypeAlias = Tensor | Any


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: float | Tensor | None = None,
    dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
) -> LossAndStats:
    """Return the cross-entropy of softmax(input) and target, as torch.nn.functional.cross_entropy.

        ℓ = Σ_k ỹ_k (lse − z_k) + z_loss · lse²,      z = s·tanh(logit_scale · input / s)

    where ỹ_k = w_k ((1 − ε) y_k + ε/C), y is one-hot for labels, ε = label_smoothing and
    s = softcap. A class with ỹ_k = 0 adds nothing, also where z_k is −inf: 0 · log 0 = 0.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, …, dk); float64, float32, bfloat16 or float16.
        target: labels in 0 … C − 1, (), (N) or (N, d1, …, dk), of any integer dtype; or class
            probabilities in the shape of `input`, to which the gradient flows too.
        weight: w, (C,), one weight a class; 1 if None. The gradient flows to it.
        ignore_index: a label whose rows add exactly 0 to loss and gradient, whatever their logits.
        reduction: "none" (a loss a row), "sum", or "mean": the sum divided by Σ w_t over the rows
            that count (labels), or by the number of rows (probabilities).
        label_smoothing: ε in [0, 1].
        z_loss: λ ≥ 0; adds λ·lse² to the loss of a row.
        softcap: s > 0; caps the logits smoothly to (−s, s).
        logit_scale: α; multiplies the input, before the cap.
        normalizer: a number above 0 or a 0-d tensor; replaces the denominator of the mean, so that
            the losses of micro-batches add up to that of the batch.
        dtype: of the loss, and of its computation if float64; from half-precision logits, float32
            gives the loss before it is rounded, and nothing is converted in memory.
        inplace_backward: lets the gradient take the place of the logits, so that the backward needs
            no memory of its own. `input` must be the result of an operation and is lost with the
            backward: where autograd still needs it, that raises, as after any in-place operator.
            The gradient cannot be differentiated again (a RuntimeError). Under torch.func,
            forward mode, torch.compile and a mode that sees the operators, the gradient has its own
            memory all the same.
        return_stats: whether to return (loss, stats): the rows' `lse`, `prediction` and `entropy`.

    Returns:
        The loss: 0-d, or a row each for "none": (), (N) or (N, d1, …, dk). With return_stats=True,
        (loss, stats), where stats is a `CrossEntropyStats` of that second shape.

    Raises:
        IndexError: a label out of range, named with its position. On other devices than the CPU,
            where reading it would wait, the loss of that row is NaN, and on CUDA a later call
            raises this for it.
        ValueError: an option or a shape that cannot be used (also a RuntimeError, as in torch).
        NotImplementedError: the input is not of a floating-point type.
        TypeError: not a tensor.

    >>> input = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> cross_entropy(input, torch.tensor([0, 1]), reduction="none")
    tensor([0.1269, 0.6931])
    """
    given = (ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, normalizer)
    # Fast path. It accepts only arguments that would pass every check below.
    others = (*given, dtype, inplace_backward, return_stats)
    found = node("cross_entropy", input, target, weight, *others)
    if found is not None:
        return (found[0], CrossEntropyStats(*found[1:])) if return_stats else found
    named: dict[str, Any] = dict(zip(GIVEN, given, strict=True)) | {"return_stats": return_stats}
    if getattr(type(input), "is_lazy", False) and has_torch_function_unary(input):
        tensors = (input, target, weight)
        return handle_torch_function(cross_entropy, (input,), *tensors, **named, dtype=dtype)
    check_input("cross_entropy", input, None)
    check_dense("cross_entropy", input)
    check_dtype("cross_entropy", dtype)
    ignore_index = as_index("ignore_index", ignore_index)
    check_cross_entropy_tensors(input, target, weight, ignore_index)
    check_normalizer(normalizer, reduction)
    if sharded.is_sharded(input, target, weight):
        dtype = dtype or promoted(*autocast_widened(input, target, weight))
        return sharded.cross_entropy(cross_entropy, input, target, weight, **named, dtype=dtype)
    inplace = inplace_backward and not (is_transformed() or is_watched())
    if inplace:
        check_inplace(input)
    input_dtype, target, weight = autocast_widened(input, target, weight)
    result_dtype = dtype or promoted(input_dtype, target, weight)
    if not target.is_floating_point():
        check_label_weight(input_dtype, weight, result_dtype)
        if input.dim() == 1:
            target = target.reshape(())
    o = Options(
        1 if input.dim() > 1 else 0,
        kernels.statistics_dtype(result_dtype),
        ignore_index,
        **checked_numbers(reduction, label_smoothing, z_loss, logit_scale, softcap),
        stats=bool(return_stats),
        inplace=inplace,
    )
    if weight is not None:
        # here, so that its gradients from the rows and from the mean add up before they are rounded
        weight = weight.to(o.dtype)
    loss, M, L, prediction, entropy = apply(CrossEntropyFunction, input, target, weight, o)
    if reduction != "none":
        loss = apply(Total, loss)
    if reduction == "mean":
        loss = loss / denominator(input.shape[o.dim], target, weight, o, normalizer)
    loss = loss.to(result_dtype)
    return (loss, CrossEntropyStats(M + L, prediction, entropy)) if return_stats else loss


def promoted(dtype: torch.dtype, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """Return the dtype of the loss; probabilities and their weights take part in it as in torch."""
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    return dtype


class CrossEntropyFunction(Function):
    """(ℓ, M, L, prediction, H) a row. M is a constant shift: lse = M + L has the derivative of L.

    M is not marked as non-differentiable, which torch's generated vmap rule forgets and then trips
    over in forward mode; its tangent is 0 and its cotangent goes nowhere.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor | None, o: Options) -> Any:
        return tuple(kernels.cross_entropy(Problem(input, target, weight, o)))

    @staticmethod
    def algebra(input: Tensor, target: Tensor, weight: Tensor | None, o: Options) -> Any:
        input = blank_ignored(input, target, o)
        return tuple(eager.cross_entropy(Problem(input, target, weight, o)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        input, target, weight, ctx.o = inputs
        _, M, L, prediction, _ = output
        if prediction is not None:
            ctx.mark_non_differentiable(prediction)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, M, L)
        # the same list: torch's generated vmap rule keeps one record for both
        ctx.save_for_forward(input, target, weight, M, L)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any, q: Tensor | None, *rest: Any) -> Any:
        input, target, weight, M, L = ctx.saved_tensors
        e, d_input = rest[1] if ctx.o.stats else None, None
        if ctx.needs_input_grad[0]:
            g_or_0 = torch.zeros_like(L) if g is None else g
            problem = Problem(input, target, weight, ctx.o)
            d_input = _input_vjp(problem, Rows(g_or_0, q, M, L, e))
        d_target = d_weight = None
        if g is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            r = Row.of(input, target, weight, ctx.o)
            d_y = g.unsqueeze(ctx.o.dim) * r.surprisal  # ∂ℓ/∂ỹ_k = lse − z_k
            d_target, d_weight = targets.pull_back(r.share, target, weight, d_y, ctx.o)
        return d_input, d_target, d_weight, None


def _input_vjp(problem: Problem, rows: Rows) -> Tensor:
    """The gradient of the input: differentiable, or in the input's place."""
    if not problem.options.inplace:
        return apply(CrossEntropyVjpFunction, *problem.tensors, *rows, problem.options)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "inplace_backward=True: the gradient takes the place of the logits, so it cannot be "
            "differentiated; expected a backward without create_graph"
        )
    return kernels.cross_entropy_vjp_(problem, rows)


def _node_vjp(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
    """The same for the C++ node, whose options come flat.

    g is the upstream gradient of its loss: of a row's, of their sum, or of that divided.
    """
    g, q, M, L, e, divisor, *flat, inplace = rest
    o = replace(Options.of(*flat), inplace=inplace)
    g = g.to(o.dtype)
    g = (g if divisor is None else g / divisor).expand(L.shape)
    return _input_vjp(Problem(input, target, weight, o), Rows(g, q, M, L, e))


set_vjp("cross_entropy", _node_vjp)


@forward_mode_of(CrossEntropyFunction)
class _CrossEntropyWithJvp(CrossEntropyFunction):
    @staticmethod
    def jvp(ctx: Any, input_t: Any, target_t: Any, weight_t: Any, _: None) -> Any:
        input, target, weight, _, _ = ctx.saved_tensors
        r = Row.of(input, target, weight, ctx.o)
        y_t = targets.push_forward(r.share, weight, target_t, weight_t, ctx.o)
        loss_t, L_t, H_t = r.loss_jvp(input_t, y_t)
        return loss_t, torch.zeros_like(L_t), L_t, None, H_t if ctx.o.stats else None


class CrossEntropyVjpFunction(Function):
    """dz pulled back to the input, z' ⊙ dz, whose derivative goes through the contraction.

    M and L only save the kernel a pass: p is a function of the input, so they receive nothing.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
        *rows, o = rest
        return kernels.cross_entropy_vjp(Problem(input, target, weight, o), Rows(*rows))

    @staticmethod
    def algebra(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
        g, q, _, _, e, o = rest
        r = Row.of(input, target, weight, o)
        return r.gradient(r.upstream(g, q, e)).to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, _, _, e, ctx.o = inputs
        tensors.append(e)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        input, target, weight, *rows = ctx.saved_tensors
        r = Row.of(input, target, weight, ctx.o)
        d = r.gradient_vjp(v, r.upstream(*rows))
        d_rows = (
            None if x is None else d_x.squeeze(ctx.o.dim)
            for x, d_x in zip(rows, (d.g, d.q, d.e), strict=True)
        )
        d_target = d_weight = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_target, d_weight = targets.pull_back(r.share, target, weight, d.y, ctx.o)
        d_g, d_q, d_e = d_rows
        return d.input.to(input.dtype), d_target, d_weight, d_g, d_q, None, None, d_e, None


@forward_mode_of(CrossEntropyVjpFunction)
class _CrossEntropyVjpWithJvp(CrossEntropyVjpFunction):
    @staticmethod
    def jvp(ctx: Any, input_t: Any, target_t: Any, weight_t: Any, *rest: Any) -> Tensor:
        input, target, weight, *rows = ctx.saved_tensors
        r = Row.of(input, target, weight, ctx.o)
        y_t = targets.push_forward(r.share, weight, target_t, weight_t, ctx.o)
        out = r.gradient_jvp(input_t, y_t, r.upstream(*rows), r.upstream(rest[0], rest[1], rest[4]))
        return out.to(input.dtype)
