"""The tensor that a head answers with: shape, dtype and gradient of the logits, but no numbers yet.

A function that the table has an answer for is answered from x and W. Every other one runs as torch
runs it, autograd and all, and meets this class where its operators are carried out: those of the
table make another lazy tensor, the rest gets the numbers. So the graph that autograd keeps is that
of the real logits, whoever asks; only a fused loss goes past it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_leaves, tree_map

from custom_ops.autocast import autocast_is_on
from custom_ops.fuse.form import Form, version
from custom_ops.fuse.table import NO, TABLE

__all__ = ["LazyLogits"]

aten = torch.ops.aten


class LazyLogits(Tensor):
    """Logits that are computed when something needs them."""

    is_lazy = True  #: for custom_ops.cross_entropy, which asks for nothing else
    form: Form
    shadow: Tensor  #: on the meta device: shape, strides and dtype
    sources: tuple[LazyLogits, ...]  #: what it was made from
    alias: Callable[[Tensor], Tensor] | None  #: how it lies in the memory of its source
    shared = False  #: whether another lies in its memory
    computed: Tensor | None = None  #: the numbers, if something needed them
    born = 0  #: its version at first
    taken = False  #: whether its place in the graph was asked for
    spent = False  #: whether a fused loss was taken of it, past its place in the graph

    @staticmethod
    def of(
        form: Form,
        shadow: Tensor,
        sources: tuple[LazyLogits, ...] = (),
        alias: Callable[[Tensor], Tensor] | None = None,
    ) -> LazyLogits:
        """Return the lazy tensor of `form` that looks like `shadow`."""
        z = Tensor._make_wrapper_subclass(
            LazyLogits,
            shadow.shape,
            shadow.stride(),
            shadow.storage_offset(),
            dtype=shadow.dtype,
            device=form.xs[0].device,
        )
        z.form, z.shadow, z.sources, z.alias = form, shadow, sources, alias
        if alias is not None:
            z.born, sources[0].shared = version(sources[0]), True
        return z

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    @torch._disable_dynamo
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            special = SPECIAL.get(func)
            given = special(func, args, kwargs) if special else _answered(func, args, kwargs)
            return func(*args, **kwargs) if given is NO else given

    @classmethod
    @torch._disable_dynamo
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        made = _made(func, args, kwargs)
        if made is NO:
            made = func.decompose(*args, **kwargs)
        return _computed(func, args, kwargs) if made is NO else made

    def base(self) -> LazyLogits:
        """Return the tensor in whose memory this one lies."""
        return self if self.alias is None else self.sources[0].base()

    def numbers(self) -> Tensor:
        """Return the values, without gradient; they lie in memory as views of each other do."""
        base = self.base()
        if self.alias is not None and (base.computed is not None or base.numel() == self.numel()):
            base.numbers()
            return self.alias(self.sources[0].numbers())
        if self.computed is None:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                values = self.form.dense()
                like = torch.empty_like(self.shadow)  # its strides, but for gaps
                if values.stride() != like.stride():
                    values = torch.empty_like(like, device=values.device).copy_(values)
                self.computed = values
        return self.computed

    def is_fusable(self) -> bool:
        """Whether a gradient may go to x and W past the places of this tensor in the graph.

        It may where nobody looks: no hook, no leaf, no Function of somebody else.
        """
        if version(self) != self.born:
            return False
        if not self.requires_grad:
            return True
        node = self.grad_fn
        if node is None or self.taken or self.retains_grad:
            return False
        if isinstance(node, BackwardCFunction) and type(node) is not _Linear._backward_cls:
            return False
        if self._backward_hooks and not all(map(is_signal, self._backward_hooks.values())):
            return False
        return all(z.is_fusable() for z in self.sources)

    def is_alone(self) -> bool:
        """Whether it may change in place, as nothing else lies in its memory."""
        recorded = torch.is_grad_enabled() or not self.requires_grad
        return recorded and not (self.alias or self.shared) and self.computed is None

    def fused(self, loss: Tensor) -> None:
        """Note that `loss` was taken of it; hooks that only signal go to the loss."""
        self.spent = True
        for hook in (self._backward_hooks or {}).values():
            loss.register_hook(hook)
        for z in self.sources:
            z.fused(loss)


class _Linear(Function):
    """x Wᵀ + b; the gradient that nobody fused: dx = dz W, dW = dzᵀ x, db = Σ dz."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, form: Form) -> Tensor:
        ctx.save_for_backward(x, W)
        return LazyLogits.of(form, torch.empty(form.shape(), dtype=form.dtype, device="meta"))

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        x, W = ctx.saved_tensors
        for_x, for_W, for_b, _ = ctx.needs_input_grad
        rows = dz.reshape(-1, W.shape[0])
        dx = dz @ W if for_x else None
        dW = rows.t() @ x.reshape(-1, W.shape[1]) if for_W else None
        return dx, dW, rows.sum(0) if for_b else None, None


def linear(form: Form) -> LazyLogits:
    """Return the lazy tensor of x Wᵀ + b."""
    return _Linear.apply(form.xs[0], form.Ws[0], form.b, form)


def is_signal(hook: Any) -> bool:
    """Whether a hook only waits for the backward: FSDP's, which gather the parameters of it."""
    module = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return module.startswith("torch.distributed.fsdp.")


def _answered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function of the table answers."""
    answer = TABLE.get(func)
    if answer is None:
        return NO
    z, *rest = args if args else (kwargs.get("input"),)
    if not isinstance(z, LazyLogits) or not z.is_fusable() or not z.numel():
        return NO
    form, options = _form(z), {name: v for name, v in kwargs.items() if name != "input"}
    if autocast_is_on(z):
        with torch.autocast(z.device.type, enabled=False):
            given = answer(form._replace(widened=True), *rest, **options)
    else:
        given = answer(form, *rest, **options)
    if given is not NO:
        z.form.origins[0].head.fused += 1
        loss = given[0] if isinstance(given, tuple) else given
        if loss.requires_grad:
            z.fused(loss)
    return given


def _made(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The lazy tensor, or several, that a rule of the table makes."""
    rule, inplace = TABLE.get(func), func._schema.is_mutable
    if rule is None:
        return NO
    given = args[0] if isinstance(args[0], list) else args
    sources = tuple([z for z in given if isinstance(z, LazyLogits)])
    if not sources or any(version(z) != z.born or not z.numel() for z in sources):
        return NO
    first = sources[0]
    if inplace and not (first is args[0] and first.is_alone()):
        return NO
    out = None if func is aten.index.Tensor else func(*_each(_shadow, args), **kwargs)
    with enable_reentrant_dispatch():
        made = rule(out, *_each(_form, args), **kwargs)
    if made is NO or isinstance(made, Tensor):
        return made
    if inplace:
        first.form, first.born = made._replace(dtype=first.form.dtype), first.born + 1
        return first

    def lazy(form: Form, shadow: Tensor, i: int | None = None) -> LazyLogits:
        def alias(t: Tensor) -> Tensor:
            lies = func(t, *args[1:], **kwargs)
            return lies if i is None else lies[i]

        form = form._replace(dtype=shadow.dtype)
        return LazyLogits.of(form, shadow, sources, alias if func.is_view else None)

    if out is None:
        out = torch.empty(made.shape(), dtype=made.dtype, device="meta")
    if not isinstance(made, list):
        return lazy(made, out)
    return [lazy(form, shadow, i) for i, (form, shadow) in enumerate(zip(made, out, strict=True))]


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator does to the numbers."""
    if torch.Tag.inplace_view in func.tags:
        raise RuntimeError(
            f"{func} changes the shape of logits in place: expected one that does not"
        )
    lazies = [z for z in tree_leaves((args, kwargs)) if isinstance(z, LazyLogits)]
    for z in lazies:
        for origin in z.form.origins:
            origin.head.tell(func, z.shape)
        if func.is_view or func._schema.is_mutable:  # the others in its memory see what is written
            z.base().numbers()
    numbers = {id(z): z.numbers() for z in lazies}
    if func is aten.alias_copy.default:
        return numbers[id(args[0])]
    args, kwargs = tree_map(lambda t: numbers.get(id(t), t), (args, kwargs))
    out = func(*args, **kwargs)
    if not func._schema.is_mutable:
        return out
    written = {id(numbers[id(z)]): z for z in lazies}
    return tree_map(lambda t: written.get(id(t), t), out)


def _each(function: Callable[[Any], Any], args: Iterable[Any]) -> list[Any]:
    return [[function(t) for t in a] if isinstance(a, list) else function(a) for a in args]


def _shadow(z: Any) -> Any:
    if isinstance(z, LazyLogits):
        return z.shadow
    return torch.empty_like(z, device="meta") if isinstance(z, Tensor) else z


def _form(z: Any) -> Any:
    """The form of z; without gradient where z has none, or where none is recorded."""
    if not isinstance(z, LazyLogits):
        return z
    return z.form if z.requires_grad and torch.is_grad_enabled() else z.form.detach()


def _of_memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(aten.alias_copy(args[0]), *args[1:], **kwargs)


def _of_node(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args[0].taken = True  # there may be a hook on the node from now on
    return NO


def _of_gradient(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = tree_leaves((args, kwargs))
    spent = any(isinstance(z, LazyLogits) and z.spent for z in given)
    if spent and not any(map(is_signal, given)):
        raise RuntimeError(
            "the loss was taken without the logits, which so have no gradient: expected "
            f"{func.__name__} before the loss, or a model after custom_ops.unfuse"
        )
    return NO


#: Functions that are no operator.
SPECIAL: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        [getattr(Tensor, n) for n in ["numpy", "tolist", "data_ptr", "storage", "untyped_storage"]]
        + [getattr(Tensor, f"__{n}__") for n in ["array", "dlpack", "deepcopy", "reduce_ex"]],
        _of_memory,
    ),
    vars(torch._C.TensorBase)["data"].__get__: lambda func, args, kwargs: args[0].detach(),
    vars(torch._C.TensorBase)["grad_fn"].__get__: _of_node,
    **dict.fromkeys([Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad], _of_gradient),
}
