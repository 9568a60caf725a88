"""What each operation does to a lazy tensor: one table.

An operator of ATen that stands here makes another form of it, by a rule: rule(out, form, …), where
`out` is what the result looks like. A function that stands here is answered from x and W:
answer(form, …). Both say `NO` to arguments that they cannot serve. Then, and for whatever does not
stand here, the logits are computed.
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

__all__ = ["NO", "TABLE"]

aten = torch.ops.aten
NO = NotImplemented


def reshaped(out: Tensor, form: Form, *_: Any) -> Any:
    """The classes are where as many entries lie before them as did."""
    shape, before = out.shape, form.xs[0].shape[: form.dim].numel()
    for dim, size in enumerate(shape):
        if size == form.classes and shape[:dim].numel() == before:
            xs = [x.reshape(*shape[:dim], x.shape[form.dim], *shape[dim + 1 :]) for x in form.xs]
            return form._replace(xs=tuple(xs), dim=dim)
    return NO


def rows(operator: Any) -> Callable[..., Any]:
    """Rule for an operator that moves, cuts or joins dimensions: x moves as the logits do.

    Its classes are in the one dimension that follows their number, unless it cuts them.
    """

    def rule(out: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        forms, outs = (v if isinstance(v, list) else [v] for v in (given, out))
        first = forms[0]
        if not all(isinstance(f, Form) and same(first, f) for f in forms):
            return NO

        def moved(tensors: Any) -> Any:
            result = operator(tensors if forms is given else tensors[0], *args, **kwargs)
            return result if outs is out else [result]

        try:
            wider = moved([torch.empty(f.shape(f.classes + 1), device="meta") for f in forms])
        except RuntimeError:  # sizes that are those of the classes
            return NO
        dims = []
        for one, other in zip(outs, wider, strict=False):
            found = [d for d, n in enumerate(one.shape) if n != other.shape[d]]
            if len(outs) != len(wider) or len(found) != 1 or one.shape[found[0]] != first.classes:
                return NO
            dims += found
        columns = zip(
            *(moved(list(xs)) for xs in zip(*(f.xs for f in forms), strict=True)), strict=True
        )
        origins = tuple({id(o): o for f in forms for o in f.origins}.values())
        made = [
            first._replace(xs=xs, dim=dim, origins=origins)
            for xs, dim in zip(columns, dims, strict=True)
        ]
        return made if outs is out else made[0]

    return rule


def sliced(out: Tensor, form: Form, dim: int = 0, *cut: Any) -> Any:
    """Rows, or classes: then of W and b."""
    if dim % len(form.shape()) != form.dim or out.shape[form.dim] == form.classes:
        return rows(aten.slice.Tensor)(out, form, dim, *cut)
    if form.kind != "logits" or out.shape[form.dim] < 2:
        return NO
    Ws = tuple(aten.slice.Tensor(W, 0, *cut) for W in form.Ws)
    return form._replace(Ws=Ws, b=None if form.b is None else aten.slice.Tensor(form.b, 0, *cut))


def indexed(out: None, form: Form, indices: list[Tensor | None]) -> Any:
    """Rows by their numbers or by a mask; the classes stay last."""
    masks = (torch.bool, torch.uint8)
    taken = sum(1 if i is None or i.dtype not in masks else i.dim() for i in indices)
    if form.dim != len(form.shape()) - 1 or taken > form.dim:
        return NO
    xs = tuple(aten.index.Tensor(x, indices) for x in form.xs)
    return form._replace(xs=xs, dim=xs[0].dim() - 1)


def same(a: Form, b: Form, *, rows_too: bool = False) -> bool:
    """Whether two forms differ in their rows at most."""

    def parts(form: Form) -> list[Any]:
        tensors = (*form.Ws, form.b, *(form.xs if rows_too else ()))
        return [form._replace(xs=(), Ws=(), b=None, origins=()), *map(key, tensors)]

    def key(t: Tensor | None) -> Any:
        return id(t) if t is None or t.requires_grad else (t.data_ptr(), t.shape, t.stride())

    return parts(a) == parts(b)


def kept(out: Tensor, form: Form, **_: Any) -> Form:
    return form


def cast(out: Tensor, form: Form, *, device: Any = None, layout: Any = None, **_: Any) -> Any:
    here = device in (None, form.xs[0].device) and layout in (None, torch.strided)
    return form if here and out.dtype.is_floating_point else NO


def scaled(out: Tensor, form: Any, by: Any) -> Any:
    """Times a number, or a tensor that holds one; p times log p."""
    if not isinstance(form, Form):
        form, by = by, form
    if isinstance(by, Form):
        p, q = (form, by) if form.kind == "probs" else (by, form)
        alike = same(p, q._replace(kind="probs", factor=p.factor), rows_too=True)
        if (p.kind, q.kind) != ("probs", "log_probs") or not alike:
            return NO
        return p._replace(kind="plogp", factor=p.factor * q.factor)
    if isinstance(by, Tensor):
        if by.dim() or form.kind != "logits" or form.cap is not None or not _narrow(by, form):
            return NO
        b = None if form.b is None else form.b * by
        return form._replace(xs=tuple(x * by for x in form.xs), b=b)
    if isinstance(by, complex) or not math.isfinite(by):
        return NO
    if form.kind != "logits":
        return form._replace(factor=form.factor * by)
    if form.cap is None:
        return form._replace(scale=form.scale * by)
    return form._replace(cap=form.cap * by) if by > 0 else NO


def divided(out: Tensor, form: Any, by: Any) -> Any:
    if isinstance(by, Tensor) and by.is_floating_point():
        return scaled(out, form, by.reciprocal()) if isinstance(form, Form) else NO
    return scaled(out, form, 1 / by) if isinstance(by, (int, float)) and by else NO


def added(out: Tensor, form: Any, other: Any, *, alpha: float = 1) -> Any:
    """The sum with logits of another layer on the same rows, or with a number for each class."""
    if not isinstance(form, Form):
        form, other = other, form
    if alpha != 1 or form.kind != "logits" or form.cap is not None or not form.scale:
        return NO
    if isinstance(other, Form):
        if other.kind != "logits" or other.cap is not None or other.shape() != form.shape():
            return NO
        by = other.scale / form.scale
        xs, b = (*form.xs, *(x * by for x in other.xs)), None if other.b is None else other.b * by
        form = form._replace(
            xs=xs, Ws=(*form.Ws, *other.Ws), origins=(*form.origins, *other.origins)
        )
    else:
        last = form.dim == len(form.shape()) - 1 and isinstance(other, Tensor)
        if not last or out.shape != form.shape() or not _narrow(other, form):
            return NO
        if other.shape[-1:].numel() != other.numel() or other.numel() != form.classes:
            return NO
        other = other.reshape(-1)
        b = other.to(form.Ws[0].dtype) / form.scale
    return form._replace(b=form.b if b is None else b if form.b is None else form.b + b)


def _narrow(other: Tensor, form: Form) -> bool:
    """Whether `other` loses nothing in the dtype of the layer."""
    return torch.promote_types(other.dtype, form.Ws[0].dtype) == form.Ws[0].dtype


def capped(out: Tensor, form: Form) -> Any:
    return form._replace(cap=1.0) if form.kind == "logits" and form.cap is None else NO


def normalised(out: Tensor, form: Form, dim: int, _: bool, *, kind: str) -> Any:
    fits = form.kind == "logits" and dim % len(form.shape()) == form.dim
    return form._replace(kind=kind) if fits else NO


def exponential(out: Tensor, form: Form) -> Any:
    return form._replace(kind="probs") if (form.kind, form.factor) == ("log_probs", 1) else NO


def like(operator: Any) -> Callable[..., Any]:
    """Rule for an operator that asks for shape and dtype only."""

    def rule(out: Tensor, form: Form, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        blank = torch.empty(form.shape(), dtype=form.dtype, device="meta")
        return operator(blank, *args, device=device or form.xs[0].device, **kwargs)

    return rule


def loss_of_torch(form: Form, *args: Any, kind: str, **kwargs: Any) -> Any:
    """F.cross_entropy of logits, or F.nll_loss of log-probabilities."""
    names = ("target", "weight", "size_average", "ignore_index", "reduce", "reduction")
    given = dict(zip((*names, "label_smoothing"), args, strict=False)) | kwargs
    averaged, reduced = given.pop("size_average", None), given.pop("reduce", None)
    if averaged is not None or reduced is not None:
        given["reduction"] = _Reduction.legacy_get_string(averaged, reduced, emit_warning=False)
    if form.kind != kind or (kind == "log_probs" and (form.factor != 1 or soft(form, **given))):
        return NO
    return loss(form._replace(kind="logits"), **given)


def loss(
    form: Form,
    target: Any,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """custom_ops.cross_entropy."""
    of_classes = form.kind == "logits" and form.dim == min(1, len(form.shape()) - 1)
    if not of_classes or type(target) not in (Tensor, nn.Parameter):
        return NO
    if (softcap, logit_scale) != (None, 1):
        if (form.cap, form.scale) != (None, 1):
            return NO
        options |= {"softcap": softcap, "logit_scale": logit_scale}
    if form.widened:
        dtype = dtype or (torch.float32 if form.dtype in HALVES else None)
        target, weight = (
            t.float() if t is not None and t.dtype in HALVES else t for t in (target, weight)
        )
    if soft(form, target):
        if ignore_index >= 0:
            return NO
        target = target.movedim(form.dim, -1)
    else:
        options["ignore_index"] = ignore_index
    options |= {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    return form._replace(dtype=dtype or form.dtype).cross_entropy(target, **options)


def soft(form: Form, target: Any, **_: Any) -> bool:
    """Whether the target holds probabilities."""
    return target.is_floating_point() and target.shape == form.shape()


def over_classes(answer: Callable[[Form], Any], *kinds: str) -> Callable[..., Any]:
    """Answer for a function that reduces the dimension of the classes."""

    def reduced(form: Form, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        (dim,) = dim if isinstance(dim, (tuple, list)) and len(dim) == 1 else (dim,)
        fits = isinstance(dim, int) and dim % len(form.shape()) == form.dim and form.kind in kinds
        if not fits or dtype not in (None, torch.float32, torch.float64):
            return NO
        result = answer(form._replace(dtype=dtype or form.dtype))
        return result.unsqueeze(form.dim) if keepdim and result is not NO else result

    return reduced


def prediction(form: Form) -> Any:
    return form._replace(kind="logits").detach().stats().prediction if form.factor > 0 else NO


def gathered(form: Form, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    one_a_row = dim % len(form.shape()) == form.dim and index.shape == form.shape(1)
    if not one_a_row or form.kind not in ("logits", "log_probs"):
        return NO
    return form.picked(index.squeeze(form.dim)).unsqueeze(form.dim)


def got(form: Form, index: Any) -> Any:
    """z[rows, labels]."""
    labels = isinstance(index, tuple) and len(index) == len(form.shape()) == form.dim + 1
    if not labels or form.kind not in ("logits", "log_probs"):
        return NO
    if not all(isinstance(i, Tensor) and i.dtype == torch.int64 for i in index):
        return NO
    *at, label = torch.broadcast_tensors(*index)
    form = form._replace(xs=tuple(x[tuple(at)] for x in form.xs), dim=label.dim())
    return form.picked(torch.where(label < 0, label + form.classes, label))


def operators(rules: dict[str, Any]) -> dict[Any, Callable[..., Any]]:
    """Return the operators of ATen of these names, an overload after a dot, with their rules."""
    named = [
        (f"{n}.default".split(".")[:2], r) for names, r in rules.items() for n in names.split()
    ]
    found = [(getattr(getattr(aten, packet), overload), r) for (packet, overload), r in named]
    return {op: r(op) if r in (rows, like) else r for op, r in found}


def functions(answers: dict[str, Any]) -> dict[Any, Callable[..., Any]]:
    """Return the functions and the methods of these names, with their answers."""
    owners = (torch, Tensor)
    return {getattr(o, name): a for name, a in answers.items() for o in owners if hasattr(o, name)}


TABLE: dict[Any, Callable[..., Any]] = {
    **operators(
        {
            # dimensions and rows
            "view _unsafe_view squeeze squeeze.dim squeeze.dims": reshaped,
            "unsqueeze transpose.int t permute": rows,
            "select.int split.Tensor split_with_sizes unbind.int index_select cat stack": rows,
            "slice.Tensor": sliced,
            "index.Tensor": indexed,
            # each logit
            "alias detach clone": kept,
            "_to_copy": cast,
            "mul.Tensor mul_.Tensor": scaled,
            "div.Tensor div_.Tensor": divided,
            "neg neg_": partial(scaled, by=-1),
            "add.Tensor add_.Tensor": added,
            "tanh tanh_": capped,
            "_log_softmax": partial(normalised, kind="log_probs"),
            "_softmax": partial(normalised, kind="probs"),
            "exp": exponential,
            # shape and dtype only
            "empty_like zeros_like ones_like full_like rand_like randn_like": like,
            "new_empty new_zeros new_ones new_full": like,
        }
    ),
    # answers from x and W
    F.cross_entropy: partial(loss_of_torch, kind="logits"),
    F.nll_loss: partial(loss_of_torch, kind="log_probs"),
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
