"""Which layers answer with lazy logits, and when."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from custom_ops.autocast import autocast_is_on, autocast_linear
from custom_ops.fuse.form import Form, Origin
from custom_ops.fuse.lazy import Linear
from custom_ops.fuse.table import Unknown, need
from custom_ops.surroundings import is_plain, is_watched, tree_map

__all__ = ["Materialized", "fuse", "materialized", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)
Heads = nn.Module | str | Iterable[nn.Module | str] | None

#: Lines in these folders are not the user's.
OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


class Materialized(NamedTuple):
    """Logits that were computed."""

    operation: str  #: that needed them
    line: str  #: of the code that called it, "file:number"
    shape: tuple[int, ...]


def fuse(model: Model, head: Heads = None, *, evaluation: bool = False) -> Model:
    """Let `model` train without its N × C logits; its code and its loss stay as they are.

    The last layer then answers, while training, with logits that are not computed yet. A
    cross-entropy of them is `linear_cross_entropy`, with what the model or the caller does to
    logits on the way (scale, soft cap, bias, casts, cuts, reshapes). So is log-softmax with what is
    picked from it. Anything else gets the real logits, and a warning says once which line asked
    (`materialized` has the list).

    Only hooks are added: class, parameters, state dict and saving stay, and `unfuse` takes them
    away. PEFT's adapters are to be there before.

    Args:
        model: a model or a layer; one of transformers', of Lightning, of your own.
        head: the `nn.Linear` that makes the logits, its name in the model, or several of them. A
            module with linear layers inside, as PEFT's, counts for those with as many outputs as
            the widest. None is for the model itself if it is linear, or for what a model of
            transformers inside it gives as `get_output_embeddings()`.
        evaluation: whether to do the same when not training, for a loss without memory there.

    Returns:
        `model`.

    Raises:
        ValueError: there is no such layer, or none is found.
        TypeError: it is not an `nn.Linear`, and has none inside.

    >>> import custom_ops
    >>> head = custom_ops.fuse(torch.nn.Linear(4, 10))
    >>> logits = head(torch.zeros(2, 3, 4))
    >>> logits.shape
    torch.Size([2, 3, 10])
    >>> F.cross_entropy(logits.flatten(0, 1), torch.zeros(6, dtype=torch.long)).dim()
    0
    """
    for layer in _layers(model, head):
        unfuse(layer)
        layer.register_forward_pre_hook(Head(evaluation), with_kwargs=True)
    return model


def unfuse(model: Model) -> Model:
    """Take away what `fuse` added to `model`.

    Returns:
        `model`, which was fused or not.

    >>> unfuse(fuse(torch.nn.Linear(4, 10)))
    Linear(in_features=4, out_features=10, bias=True)
    """
    for layer, key, _ in _heads(model):
        del layer._forward_pre_hooks[key], layer._forward_pre_hooks_with_kwargs[key]
    return model


def materialized(model: nn.Module) -> dict[Materialized, int]:
    """Tell what made the heads of `model` compute their logits.

    Returns:
        How often, by operation, line of code ("file:number") and shape of the logits; empty where
        no logits were needed.

    >>> head = fuse(torch.nn.Linear(4, 10))
    >>> F.cross_entropy(head(torch.zeros(2, 4)), torch.tensor([0, 9])).backward()
    >>> materialized(head)
    {}
    """
    return dict(sum((head.materialized for *_, head in _heads(model)), Counter[Materialized]()))


class Head:
    """The hook on a layer: marks its input, so that `F.linear` of it answers with lazy logits."""

    def __init__(self, evaluation: bool) -> None:
        self.evaluation = evaluation
        self.fused = 0  #: losses and other answers without logits
        self.materialized: Counter[Materialized] = Counter()

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments of the layer's forward, or None to leave them."""
        if not (torch.is_grad_enabled() if layer.training else self.evaluation):
            return None
        x: Any = args[0] if args else kwargs.get("input")
        fits = isinstance(x, Tensor) and x.is_floating_point() and x.device.type in ("cpu", "cuda")
        if not fits or is_watched() or not is_plain(x, x.device.type):
            return None
        every = every_module._global_backward_hooks, every_module._global_backward_pre_hooks
        if any(every) or layer._backward_hooks or layer._backward_pre_hooks:
            self.tell("a backward hook on the head", x.shape)
            return None
        marked = x.as_subclass(Features)
        marked.origin = self, layer, x
        return ((marked, *args[1:]), kwargs) if args else (args, kwargs | {"input": marked})

    def tell(self, operation: Any, shape: tuple[int, ...]) -> None:
        """Note that something needs the logits; warn of each line once."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(OURS):
            frame = frame.f_back
        file, number = frame.f_code.co_filename, frame.f_lineno
        found = Materialized(str(operation), f"{file}:{number}", tuple(shape))
        self.materialized[found] += 1
        if self.materialized[found] == 1:
            message = f"custom_ops.fuse: {operation} of {tuple(shape)} needs the logits"
            registry = frame.f_globals.setdefault("__warningregistry__", {})
            warnings.warn_explicit(message, UserWarning, file, number, registry=registry)


class Features(Tensor):
    """The input of a head; its product with the weight is a lazy tensor."""

    origin: tuple[Head, nn.Module, Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            need(func is F.linear)
            return _linear(*args, **kwargs or {})
        except Unknown:
            if func is F.linear and isinstance(args[0], Features):
                args[0].origin[0].tell("F.linear with this weight", args[0].shape)
        given = (args, kwargs or {})
        args, kwargs = tree_map(lambda t: t.origin[2] if isinstance(t, Features) else t, given)
        return func(*args, **kwargs)


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    """x Wᵀ + b, if these are what the last layer in one piece takes."""
    need(isinstance(input, Features))
    origin = Origin(*input.origin, *((weight,) if bias is None else (weight, bias)))
    x, *parameters = origin.tensors
    for t in parameters:
        need(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided)
        need(t.device == x.device and not hasattr(t, "ds_id"))
    need(weight.dim() == 2 and len(weight) > 1 and x.shape[-1:] == weight.shape[1:] and x.numel())
    need(bias is None or bias.shape == weight.shape[:1])
    if autocast_is_on(x):
        x, *parameters = map(autocast_linear, origin.tensors)
    need(all(t.dtype == x.dtype for t in parameters))
    b = parameters[1] if len(parameters) > 1 else None
    form = Form(x, parameters[0], b, (origin,), x.dim() - 1, x.dtype)
    return Linear.apply(x, form.W, b, form)


def _layers(model: nn.Module, head: Heads) -> Iterator[nn.Linear]:
    if head is None:
        head = model if isinstance(model, nn.Linear) else _output_embeddings(model)
    for one in [head] if isinstance(head, (nn.Module, str)) else head:
        module = dict(model.named_modules()).get(one) if isinstance(one, str) else one
        if module is None:
            raise ValueError(f"{type(model).__name__} has no layer {one!r}")
        linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise TypeError(f"the head must be an nn.Linear or hold one, got {module!r}")
        widest = max(layer.out_features for layer in linear)
        yield from (layer for layer in linear if layer.out_features == widest)


def _output_embeddings(model: nn.Module) -> nn.Module:
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        last = get() if callable(get) else None
        if isinstance(last, nn.Module):
            return last
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    raise ValueError(
        f"{type(model).__name__} has no get_output_embeddings(): expected head=, the name of one "
        f"of its linear layers, {', '.join(names) or 'of which it has none'}"
    )


def _heads(model: nn.Module) -> list[tuple[nn.Module, int, Head]]:
    """The hooks of ours, each with its layer and its key there."""
    hooks = (
        (layer, *item) for layer in model.modules() for item in layer._forward_pre_hooks.items()
    )
    return [(layer, key, head) for layer, key, head in hooks if isinstance(head, Head)]
