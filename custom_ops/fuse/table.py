"""What each operation does to a lazy tensor: one table.

An operator of ATen that stands here makes another form of it, by a rule: rule(op, out, form, …). A
function that stands here is answered from x and W: answer(form, …). Both raise `Unknown` for
arguments that they cannot serve. Then, and for what does not stand here, the logits are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import _reduction as _Reduction

from custom_ops.autocast import HALVES
from custom_ops.cross_entropy import cross_entropy
from custom_ops.fuse.form import Form

__all__ = ["TABLE", "Unknown", "each", "need", "numbered"]

aten = torch.ops.aten
MASKS = (torch.bool, torch.uint8)


class Unknown(Exception):
    """No rule says what an operation does to a lazy tensor."""


def need(condition: Any) -> None:
    """Raise `Unknown` if a rule's condition is not met."""
    if not condition:
        raise Unknown


def each(function: Callable[[Any], Any], args: Any) -> list[Any]:
    """Return `function` of each argument, and of each in a list."""
    return [[function(t) for t in a] if isinstance(a, list) else function(a) for a in args]


# Rows and dimensions


def reshaped(op: Any, out: Any, form: Form, *_: Any) -> Form:
    """The classes are where as many entries lie before them as did."""
    shape, entries, before = list(out.shape), 1, math.prod(form.x.shape[: form.dim])
    for dim, size in enumerate(shape):
        if size == form.classes and entries == before:
            shape[dim] = form.x.shape[form.dim]
            return form._replace(x=form.x.reshape(shape), dim=dim)
        entries *= size
    raise Unknown


def moved(op: Any, out: Any, *args: Any, **kwargs: Any) -> Any:
    """What moves, cuts or joins dimensions does so to x: where C numbers were are D features."""
    forms = args[0] if isinstance(args[0], list) else [args[0]]
    first = forms[0]
    need(all(isinstance(f, Form) and (f is first or same(first, f, "W", "b")) for f in forms))
    C, D = first.W.shape
    need(C != D)
    try:
        x = op(*each(lambda a: a.x if isinstance(a, Form) else a, args), **kwargs)
    except (IndexError, RuntimeError):  # numbers or sizes that are those of the classes
        raise Unknown from None
    origins = tuple(dict.fromkeys(origin for form in forms for origin in form.origins))
    made, several = [], isinstance(out, (list, tuple))
    for z, part in zip(out, x, strict=False) if several else [(out, x)]:
        dims = [dim for dim, size in enumerate(z.shape) if (size, part.shape[dim]) == (C, D)]
        need(len(dims) == 1)
        made.append(first._replace(x=part, dim=dims[0], origins=origins))
    return made if several else made[0]


def sliced(op: Any, out: Any, form: Form, dim: int = 0, *cut: Any) -> Any:
    """Rows, or classes: then of W and b."""
    if not form.over(dim):
        return moved(op, out, form, dim, *cut)
    if out.shape[dim] == form.classes:
        return form
    need(form.kind == "logits" and out.shape[dim] > 1)
    return form.of(lambda t: op(t, 0, *cut), "W", "b")


def numbered(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Return the numbers that masks stand for, so that the result's shape is known without data."""
    return [
        number
        for i in indices
        for number in (i.nonzero(as_tuple=True) if i is not None and i.dtype in MASKS else [i])
    ]


def indexed(op: Any, out: Tensor, form: Form, indices: list[Tensor | None]) -> Form:
    """Rows by their numbers; the classes stay last."""
    need(form.over(-1) and len(indices) <= form.dim)
    return form._replace(x=op(form.x, indices), dim=out.dim() - 1)


def same(a: Form, b: Form, *names: str) -> bool:
    """Whether two forms agree in all numbers and in these tensors."""

    def key(t: Tensor | None) -> Any:
        return id(t) if t is None or t.requires_grad else (t.data_ptr(), t.shape, t.stride())

    return a[4:] == b[4:] and all(key(getattr(a, n)) == key(getattr(b, n)) for n in names)


# Each number


def cast(op: Any, out: Any, form: Form, **to: Any) -> Form:
    need(to.get("device") in (None, form.x.device) and to.get("layout") in (None, torch.strided))
    need(out.dtype.is_floating_point)
    return form


def scaled(op: Any, out: Any, form: Any, by: Any) -> Form:
    """Times a number, or a tensor that holds one; p times log p."""
    if not isinstance(form, Form):
        form, by = by, form
    if isinstance(by, Form):
        need({form.kind, by.kind} == {"probs", "log_probs"})
        product = {"kind": "plogp", "factor": form.factor * by.factor}
        form, by = form._replace(**product), by._replace(**product)
        need(same(form, by, "x", "W", "b"))
        return form
    if isinstance(by, Tensor):
        need(not by.dim() and form.kind == "logits" and form.cap is None and narrow(by, form))
        return form.of(lambda t: t * by, "x", "b")
    need(not isinstance(by, complex) and math.isfinite(by))
    if form.kind != "logits":
        return form._replace(factor=form.factor * by)
    if form.cap is None:
        return form._replace(scale=form.scale * by)
    need(by > 0)
    return form._replace(cap=form.cap * by)


def divided(op: Any, out: Any, form: Any, by: Any) -> Form:
    need(isinstance(form, Form))
    need(by.is_floating_point() if isinstance(by, Tensor) else isinstance(by, (int, float)) and by)
    return scaled(op, out, form, 1 / by)


def added(op: Any, out: Any, form: Any, other: Any, *, alpha: float = 1) -> Form:
    """The sum with logits of another layer on the same rows, or with a number for each class."""
    if not isinstance(form, Form):
        form, other = other, form
    need(alpha == 1 and form.kind == "logits" and form.cap is None and form.scale)
    if isinstance(other, Form):
        need((other.kind, other.cap, other.dim) == ("logits", None, form.dim))
        need(other.shape(other.classes) == form.shape(form.classes))
        other = other.of(lambda t: t * (other.scale / form.scale), "x", "b")
        x, W = torch.cat((form.x, other.x), form.dim), torch.cat((form.W, other.W), -1)
        form, b = form._replace(x=x, W=W, origins=form.origins + other.origins), other.b
    else:
        need(form.over(-1) and isinstance(other, Tensor) and narrow(other, form))
        need(other.numel() == other.shape[-1:].numel() == form.classes)
        need(out.dim() == form.x.dim())
        b = other.reshape(-1) / form.scale
    bs = [t.to(form.W.dtype) for t in (form.b, b) if t is not None]
    return form._replace(b=sum(bs[1:], bs[0]) if bs else None)


def narrow(other: Tensor, form: Form) -> bool:
    """Whether `other` loses nothing in the dtype of the layer."""
    return torch.promote_types(other.dtype, form.W.dtype) == form.W.dtype


def capped(op: Any, out: Any, form: Form) -> Form:
    need(form.kind == "logits" and form.cap is None)
    return form._replace(cap=1.0)


def normalised(op: Any, out: Any, form: Form, dim: int, _: bool, *, kind: str) -> Form:
    need(form.kind == "logits" and form.over(dim))
    return form._replace(kind=kind)


def exponential(op: Any, out: Any, form: Form) -> Form:
    need((form.kind, form.factor) == ("log_probs", 1))
    return form._replace(kind="probs")


def like(op: Any, out: Any, form: Form, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    """Shape and dtype only."""
    blank = torch.empty(form.shape(form.classes), dtype=form.dtype, device="meta")
    return op(blank, *args, device=device or form.x.device, **kwargs)


# Answers


def loss(form: Form, *args: Any, kind: str = "logits", **kwargs: Any) -> Any:
    """Cross-entropy of logits, torch's or ours; F.nll_loss of log-probabilities."""
    options = dict(zip(NAMES.split(), args, strict=False)) | kwargs
    legacy = options.pop("size_average", None), options.pop("reduce", None)
    if legacy != (None, None):
        options["reduction"] = _Reduction.legacy_get_string(*legacy, emit_warning=False)
    target, weight, dtype = (options.pop(n, None) for n in ("target", "weight", "dtype"))
    need(type(target) in (Tensor, nn.Parameter))
    need(form.kind == kind and form.factor == 1 and form.over(min(1, form.x.dim() - 1)))
    if form.widened:
        dtype = dtype or (torch.float32 if form.dtype in HALVES else None)
        target, weight = (
            t.float() if t is not None and t.dtype in HALVES else t for t in (target, weight)
        )
    if target.is_floating_point() and target.shape == form.shape(form.classes):
        need(kind == "logits" and options.pop("ignore_index", -100) < 0)
        target = target.movedim(form.dim, -1)
    bent: dict[str, Any] = {n: options.pop(n) for n in ("softcap", "logit_scale") if n in options}
    if bent not in ({}, {"softcap": None, "logit_scale": 1}):
        need((form.cap, form.scale) == (None, 1))
        options |= bent
    return form.cross_entropy(target, dtype, weight=weight, **options)


def over_classes(answer: Callable[[Form], Any], *kinds: str) -> Callable[..., Any]:
    """Answer for a function that reduces the dimension of the classes."""

    def reduced(form: Form, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        (dim,) = dim if isinstance(dim, (tuple, list)) and len(dim) == 1 else (dim,)
        need(isinstance(dim, int) and form.over(dim) and form.kind in kinds)
        need(dtype in (None, torch.float32, torch.float64))
        result = answer(form._replace(dtype=dtype or form.dtype))
        return result.unsqueeze(form.dim) if keepdim else result

    return reduced


def prediction(form: Form) -> Any:
    need(form.factor > 0)
    return form._replace(kind="logits").of(Tensor.detach, "x", "W", "b").stats().prediction


def gathered(form: Form, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    need(form.over(dim) and index.shape == form.shape(1) and form.kind in ("logits", "log_probs"))
    return form.picked(index.squeeze(form.dim)).unsqueeze(form.dim)


def got(form: Form, index: Any) -> Tensor:
    """z[rows, labels]."""
    need(isinstance(index, tuple) and len(index) == form.x.dim() and form.over(-1))
    need(all(isinstance(i, Tensor) and i.dtype == torch.int64 for i in index))
    need(form.kind in ("logits", "log_probs"))
    *at, label = torch.broadcast_tensors(*index)
    form = form._replace(x=form.x[tuple(at)], dim=label.dim())
    return form.picked(torch.where(label < 0, label + form.classes, label))


def operators(rules: dict[str, Any]) -> dict[Any, Callable[..., Any]]:
    """Return the operators of ATen of these names, an overload after a dot, with their rules."""
    named = [(name.partition("."), r) for names, r in rules.items() for name in names.split()]
    return {getattr(getattr(aten, n), overload or "default"): r for (n, _, overload), r in named}


def functions(answers: dict[str, Any]) -> dict[Any, Callable[..., Any]]:
    """Return the functions and the methods of these names, with their answers."""
    owners = (torch, Tensor)
    return {getattr(o, name): a for name, a in answers.items() for o in owners if hasattr(o, name)}


NAMES = "target weight size_average ignore_index reduce reduction label_smoothing"
TABLE: dict[Any, Callable[..., Any]] = {
    # rules: dimensions and rows, each number, shape and dtype only
    **operators(
        {
            "view _unsafe_view squeeze squeeze.dim squeeze.dims": reshaped,
            "unsqueeze transpose.int t permute": moved,
            "select.int split.Tensor split_with_sizes unbind.int index_select cat stack": moved,
            "slice.Tensor": sliced,
            "index.Tensor": indexed,
            "alias detach clone": lambda op, out, form, **_: form,
            "_to_copy": cast,
            "mul.Tensor mul_.Tensor": scaled,
            "div.Tensor div_.Tensor": divided,
            "neg neg_": partial(scaled, by=-1),
            "add.Tensor add_.Tensor": added,
            "tanh tanh_": capped,
            "_log_softmax": partial(normalised, kind="log_probs"),
            "_softmax": partial(normalised, kind="probs"),
            "exp": exponential,
            "empty_like zeros_like ones_like full_like rand_like randn_like": like,
            "new_empty new_zeros new_ones new_full": like,
        }
    ),
    # answers from x and W
    F.cross_entropy: loss,
    F.nll_loss: partial(loss, kind="log_probs"),
    cross_entropy: loss,
    **functions(
        {
            "__getitem__": got,
            "gather": gathered,
            "sum": over_classes(Form.summed, "log_probs", "plogp"),
            "mean": over_classes(lambda form: form.summed() / form.classes, "log_probs"),
            "logsumexp": over_classes(lambda form: form.stats().lse.to(form.dtype), "logits"),
            "argmax": over_classes(prediction, "logits", "log_probs", "probs"),
        }
    ),
}
