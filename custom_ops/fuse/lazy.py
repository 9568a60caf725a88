"""The tensor that a head answers with: shape, dtype and gradient of the logits, but no numbers yet.

A function that the table has an answer for is answered from x and W. Every other one runs as torch
runs it, autograd and all, and meets this class where its operators are carried out: those of the
table make another lazy tensor, the rest gets the numbers. So the graph that autograd keeps is that
of the real logits, whoever asks; only a fused loss goes past it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction
from torch.overrides import enable_reentrant_dispatch

from custom_ops.autocast import autocast_is_on
from custom_ops.fuse.form import Form, version
from custom_ops.fuse.table import TABLE, Unknown, each, need, numbered
from custom_ops.surroundings import tree_leaves, tree_map, untraced, without_torch_function

__all__ = ["LazyLogits", "Linear"]

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
aten = torch.ops.aten


class LazyLogits(Tensor):
    """Logits that are computed when something needs them."""

    is_lazy = True  #: for custom_ops.cross_entropy, which asks for nothing else
    form: Form
    shadow: Tensor  #: on the meta device: shape, strides and dtype
    sources: tuple[LazyLogits, ...]  #: what it was made from
    base: LazyLogits | None = None  #: in whose memory it lies
    shared = False  #: whether another lies in its memory
    computed: Tensor | None = None  #: the numbers, if something needed them
    born = 0  #: its version at first
    asked = False  #: whether somebody may look at its gradient
    spent = False  #: whether a fused loss was taken of it, past its place in the graph

    @staticmethod
    def of(form: Form, shadow: Tensor, sources: Any = (), view: bool = False) -> LazyLogits:
        """Return the lazy tensor of `form` that looks like `shadow`."""
        lies = shadow.shape, shadow.stride(), shadow.storage_offset()
        kind: dict[str, Any] = {"dtype": shadow.dtype, "device": form.x.device}
        z = Tensor._make_wrapper_subclass(LazyLogits, *lies, **kind)
        z.form = form if form.dtype is shadow.dtype else form._replace(dtype=shadow.dtype)
        z.shadow, z.sources = shadow, sources
        if view:
            z.base, z.born = sources[0].root(), version(sources[0])
            z.base.shared = True
        return z

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    @untraced
    def __torch_function__(cls, func: Any, types: Any, args: Args = (), kwargs: Any = None) -> Any:
        with without_torch_function():
            answer = FUNCTIONS.get(func)
            return answer(func, args, kwargs or {}) if answer else func(*args, **kwargs or {})

    @classmethod
    @untraced
    def __torch_dispatch__(cls, func: Any, types: Any, args: Args = (), kwargs: Any = None) -> Any:
        try:
            return _made(func, args, kwargs or {})
        except Unknown:
            made = func.decompose(*args, **kwargs or {})
        return _computed(func, args, kwargs or {}) if made is NotImplemented else made

    def root(self) -> LazyLogits:
        """Return the tensor in whose memory it lies: itself, if it is no view."""
        return self if self.base is None else self.base

    def numbers(self) -> Tensor:
        """Return the values, without gradient; they lie in memory as views of each other do."""
        base = self.root()
        if base is not self and (base.computed is not None or base.numel() == self.numel()):
            return base.numbers().as_strided(self.shape, self.stride(), self.storage_offset())
        if self.computed is None:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                values = self.form.dense()
            dense = torch.empty_like(self.shadow).stride()  # without the gaps of a view
            sizes = zip(self.shape, self.stride(), dense, strict=True)
            strides = tuple([own if size == 1 else stride for size, own, stride in sizes])
            if values.stride() != strides:
                values = values.new_empty_strided(self.shape, strides).copy_(values)
            self.computed = values
        return self.computed

    def is_fusable(self) -> bool:
        """Whether a gradient may go to x and W past the places of this tensor in the graph.

        It may where nobody looks: no hook, no leaf, no Function of somebody else.
        """
        node, looked_at = self.grad_fn, self.asked or self.is_leaf
        looked_at |= isinstance(node, BackwardCFunction) and type(node) is not Linear._backward_cls
        if self.requires_grad and (looked_at or not all(z.is_fusable() for z in self.sources)):
            return False
        return version(self) == self.born

    def spend(self, loss: Tensor) -> None:
        """Note that `loss` was taken of it; hooks that only signal go to the loss."""
        self.spent = True
        for hook in (self._backward_hooks or {}).values():
            loss.register_hook(hook)
        for z in self.sources:
            z.spend(loss)


class Linear(Function):
    """The lazy tensor of x Wᵀ + b; unless it is fused, dx = dz W, dW = dzᵀ x, db = Σ dz."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, form: Form) -> Tensor:
        """Return z."""
        ctx.save_for_backward(x, W)
        shape = form.shape(form.classes)
        return LazyLogits.of(form, torch.empty(shape, dtype=form.dtype, device="meta"))

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        """Return dx, dW and db."""
        x, W = ctx.saved_tensors
        for_x, for_W, for_b, _ = ctx.needs_input_grad
        rows = dz.reshape(-1, W.shape[0])
        dW = rows.t() @ x.reshape(-1, W.shape[1]) if for_W else None
        return dz @ W if for_x else None, dW, rows.sum(0) if for_b else None, None


# Functions


def _answered(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """What a function of the table answers; else what it does to a tensor."""
    z: Any = args[0] if args else kwargs.get("input")
    options = {name: value for name, value in kwargs.items() if name != "input"}
    try:
        need(isinstance(z, LazyLogits) and z.is_fusable() and z.numel())
        wide = autocast_is_on(z)
        with torch.autocast(z.device.type, enabled=False) if wide else nullcontext():
            given = TABLE[func](_form(z)._replace(widened=wide), *args[1:], **options)
    except Unknown:
        return func(*args, **kwargs)
    z.form.origins[0].head.fused += 1
    loss = given[0] if isinstance(given, tuple) else given
    if loss.requires_grad:
        z.spend(loss)
    return given


def _of_memory(func: Any, args: Args, kwargs: Kwargs) -> Any:
    return func(aten.alias_copy(args[0]), *args[1:], **kwargs)


def _of_gradient(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Somebody may look at the gradient from now on."""
    given = tree_leaves((args, kwargs))
    for z in () if any(map(is_signal, given)) else given:
        if getattr(z, "spent", False) and func != GRAD_FN:
            raise RuntimeError(
                "the loss was taken without the logits, which so have no gradient: expected "
                f"{func.__name__} before the loss, or a model after custom_ops.unfuse"
            )
        if isinstance(z, LazyLogits):
            z.asked = True
    return func(*args, **kwargs)


def is_signal(hook: Any) -> bool:
    """Whether a hook only waits for the backward: FSDP's, which gather the parameters of it."""
    module = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return module.startswith("torch.distributed.fsdp.")


GRAD_FN, DATA = (getattr(Tensor, name).__get__ for name in ("grad_fn", "data"))
GRADIENT = [GRAD_FN, Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad]
MEMORY = ["numpy", "tolist", "data_ptr", "storage", "untyped_storage", "__array__", "__dlpack__"]
#: What runs in place of a function: of the table, or one that is no operator.
FUNCTIONS: dict[Any, Callable[[Any, Args, Kwargs], Any]] = {
    **dict.fromkeys(TABLE, _answered),
    **{getattr(Tensor, name): _of_memory for name in [*MEMORY, "__deepcopy__", "__reduce_ex__"]},
    **dict.fromkeys(GRADIENT, _of_gradient),
    DATA: lambda func, args, kwargs: args[0].detach(),
}


# Operators


def _made(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The lazy tensor, or several, that a rule of the table makes."""
    rule: Any = TABLE.get(func)
    need(rule)
    inplace, given = func._schema.is_mutable, args[0] if isinstance(args[0], list) else args
    sources = tuple([z for z in given if isinstance(z, LazyLogits)])
    need(sources and all(version(z) == z.born and z.numel() for z in sources))
    first = sources[0]
    if inplace:  # nothing else lies in its memory, and autograd follows
        need(first is args[0] and not first.shared and first.base is first.computed is None)
        need(torch.is_grad_enabled() or not first.requires_grad)
    if func is aten.index.Tensor:
        args = first, numbered(args[1])
    out = func(*each(_shadow, args), **kwargs)
    with enable_reentrant_dispatch():
        made = rule(func, out, *each(_form, args), **kwargs)
    if isinstance(made, Tensor):
        return made
    if inplace:
        first.form, first.born = made._replace(dtype=first.form.dtype), first.born + 1
        return first
    if isinstance(made, list):
        pairs = zip(made, out, strict=True)
        return [LazyLogits.of(form, shadow, sources, func.is_view) for form, shadow in pairs]
    return LazyLogits.of(made, out, sources, func.is_view)


def _computed(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """What an operator does to the numbers."""
    if torch.Tag.inplace_view in func.tags:
        raise RuntimeError(
            f"{func} changes the shape of logits in place: expected a copy or a view"
        )
    lazies = [z for z in tree_leaves((args, kwargs)) if isinstance(z, LazyLogits)]
    for z in lazies:
        for origin in z.form.origins:
            origin.head.tell(func, z.shape)
        if func.is_view or func._schema.is_mutable:  # the others in its memory see what is written
            z.root().numbers()
    numbers = {id(z): z.numbers() for z in lazies}
    if func is aten.alias_copy.default:
        return numbers[id(args[0])]
    args, kwargs = tree_map(lambda t: numbers.get(id(t), t), (args, kwargs))
    return func(*args, **kwargs)


def _shadow(z: Any) -> Any:
    if isinstance(z, LazyLogits):
        return z.shadow
    return torch.empty_like(z, device="meta") if isinstance(z, Tensor) else z


def _form(z: Any) -> Any:
    """The form of z; without gradient where z has none, or where none is recorded."""
    if not isinstance(z, LazyLogits):
        return z
    recorded = z.requires_grad and torch.is_grad_enabled()
    return z.form if recorded else z.form.of(Tensor.detach, "x", "W", "b")
