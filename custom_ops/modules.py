"""The nn.Module faces: torch's classes, with our functions in `forward`.

They subclass torch's, so that constructor arguments, buffers, state dict, pickle and isinstance are
torch's own. (Not LinearCrossEntropyLoss: torch has that class only of late. Its constructor and
state dict are torch's all the same.)
"""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _WeightedLoss

from custom_ops.checks import check_linear_module
from custom_ops.cross_entropy import CrossEntropyStats, cross_entropy
from custom_ops.linear_cross_entropy import linear_cross_entropy
from custom_ops.softmax import log_softmax, softmax

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss", "LogSoftmax", "Softmax"]


def _chosen_dim(name: str, dim: int | None, input: Tensor) -> int:
    """The dimension; None is torch's deprecated choice, with torch's warning."""
    if dim is not None:
        return dim
    warnings.warn(
        f"Implicit dimension choice for {name} has been deprecated. "
        "Change the call to include dim=X as an argument.",
        stacklevel=5,
    )
    return 0 if input.dim() in (0, 1, 3) else 1


def _changed_options(module: nn.Module, function: Any) -> str:
    defaults = inspect.signature(function).parameters
    options = {name: getattr(module, name, None) for name in defaults if name != "weight"}
    return ", ".join(
        f"{name}={value!r}"
        for name, value in options.items()
        if value is not None and value != defaults[name].default
    )


class Softmax(nn.Softmax):
    """Softmax over `dim`: `torch.nn.Softmax` with `custom_ops.softmax` inside.

    >>> Softmax(dim=1)(torch.zeros(1, 2))
    tensor([[0.5000, 0.5000]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return probabilities in the shape of `input`."""
        return softmax(input, _chosen_dim("softmax", self.dim, input))


class LogSoftmax(nn.LogSoftmax):
    """Log-softmax over `dim`: `torch.nn.LogSoftmax` with `custom_ops.log_softmax` inside.

    >>> LogSoftmax(dim=1)(torch.zeros(1, 2))
    tensor([[-0.6931, -0.6931]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return log-probabilities in the shape of `input`."""
        return log_softmax(input, _chosen_dim("log_softmax", self.dim, input))


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross-entropy: `torch.nn.CrossEntropyLoss` with `custom_ops.cross_entropy` inside.

    The positional arguments are torch's (`size_average` and `reduce` with torch's deprecation
    warning); the keyword-only ones are those of `custom_ops.cross_entropy`. `normalizer` belongs to
    a batch and is therefore an argument of the call.

    >>> loss = CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
    >>> loss
    CrossEntropyLoss(label_smoothing=0.1, z_loss=0.0001)
    >>> loss(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6932)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        dtype: torch.dtype | None = None,
        inplace_backward: bool = False,
        return_stats: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.dtype = dtype
        self.inplace_backward = inplace_backward
        self.return_stats = return_stats

    def extra_repr(self) -> str:
        """Name the options that are not the default."""
        return _changed_options(self, cross_entropy)

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, *, normalizer: float | Tensor | None = None
    ) -> Tensor | tuple[Tensor, CrossEntropyStats]:
        """Return the loss, or (loss, stats) with `return_stats=True`."""
        return cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            normalizer=normalizer,
            dtype=self.dtype,
            inplace_backward=self.inplace_backward,
            return_stats=self.return_stats,
        )


class LinearCrossEntropyLoss(_WeightedLoss):
    """The last layer and its loss: `torch.nn.LinearCrossEntropyLoss` without the N × C logits.

    The arguments up to `options` are torch's, and so are the names in the state dict
    (`linear.weight`, `linear.bias`, `weight`); `dtype` is that of the layer, `loss_dtype` that of
    the loss. The others are those of `custom_ops.linear_cross_entropy`. `from_linear` takes a layer
    that exists.

    Wrapped in FSDP, shard this module and not its `linear`, whose forward is not called.

    >>> loss = LinearCrossEntropyLoss(4, 10, label_smoothing=0.1)
    >>> loss
    LinearCrossEntropyLoss(
      label_smoothing=0.1
      (linear): Linear(in_features=4, out_features=10, bias=False)
    )
    >>> loss(torch.zeros(2, 4), torch.tensor([0, 9])).item()  # log 10
    2.3025851249694824
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        loss_dtype: torch.dtype | None = None,
        memory: int | None = None,
        block_rows: int | None = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__(weight, None, None, reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.linear = nn.Linear(
            in_features, math.prod(out_features, start=num_classes), bias, device, dtype
        )
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.loss_dtype = loss_dtype
        self.memory = memory
        self.block_rows = block_rows
        self.return_stats = return_stats

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> LinearCrossEntropyLoss:
        """Return the loss of a layer that exists; its parameters stay the ones they are.

        So a weight that is tied to an embedding stays tied. `options` are the constructor's.

        >>> embedding, layer = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False)
        >>> layer.weight = embedding.weight
        >>> LinearCrossEntropyLoss.from_linear(layer, z_loss=1e-4).linear.weight is embedding.weight
        True

        A layer that does more than x Wᵀ + b is refused, as the loss reads W and b and never calls
        it: one with hooks (pruning and the older weight_norm are hooks), or whose forward is not
        nn.Linear's (an adapter). A parametrized layer is taken: reading its weight computes it.
        """
        check_linear_module(linear)
        loss = cls(linear.in_features, linear.out_features, device="meta", **options)
        loss.linear = linear
        return loss

    def extra_repr(self) -> str:
        """Name the options that are not the default."""
        return _changed_options(self, linear_cross_entropy)

    def forward(
        self, input: Tensor, target: Tensor, *, normalizer: float | Tensor | None = None
    ) -> Tensor | tuple[Tensor, CrossEntropyStats]:
        """Return the loss, or (loss, stats) with `return_stats=True`."""
        check_linear_module(self.linear)
        shape = (self.num_classes, *self.out_features)
        W, b = self.linear.weight, self.linear.bias
        return linear_cross_entropy(
            input,
            W.reshape(*shape, W.shape[-1]) if self.out_features else W,
            target,
            b.reshape(shape) if self.out_features and b is not None else b,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            normalizer=normalizer,
            dtype=self.loss_dtype,
            memory=self.memory,
            block_rows=self.block_rows,
            return_stats=self.return_stats,
        )
