"""The nn.Module faces: torch's classes, with our functions in `forward`.

They subclass torch's, so that constructor arguments, buffers, state dict, pickle and isinstance are
torch's own.
"""

from __future__ import annotations

import inspect
import warnings

import torch
from torch import Tensor, nn

from custom_ops.cross_entropy import CrossEntropyStats, cross_entropy
from custom_ops.softmax import log_softmax, softmax

__all__ = ["CrossEntropyLoss", "LogSoftmax", "Softmax"]


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
        defaults = inspect.signature(cross_entropy).parameters
        options = {name: getattr(self, name, None) for name in defaults if name != "weight"}
        return ", ".join(
            f"{name}={value!r}"
            for name, value in options.items()
            if value is not None and value != defaults[name].default
        )

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, *, normalizer: float | Tensor | None = None
    ) -> Tensor | tuple[Tensor, CrossEntropyStats]:
        """Return the loss, or (loss, stats) with `return_stats=True`."""
        return cross_entropy(  # type: ignore[call-overload]
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
