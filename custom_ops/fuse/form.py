"""What a lazy tensor stands for, and the questions that are answered from it without N × C numbers.

    z = s · tanh(α (Σ_i x_i W_iᵀ + b)),  or without a cap  z = α (Σ_i x_i W_iᵀ + b)

is one layer whose features lie side by side, x = (x_1, x_2, …) and W = (W_1, W_2, …): one call of
`linear_cross_entropy` with softcap = s and logit_scale = α s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from custom_ops.last_layer.layer import Blocks
from custom_ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["Form", "Origin"]

#: No label has this value, so that none is ignored: −100 is out of range, as in `gather`.
NONE_IGNORED = 2**62


class Origin:
    """A call of a head: who made it, and in what state its tensors were."""

    def __init__(self, head: Any, layer: nn.Module, *tensors: Tensor) -> None:
        self.head, self.layer, self.tensors = head, layer, tensors
        self.state = self._state()

    def check(self) -> None:
        """Raise if x, W or b is another by now; gather again what FSDP has freed meanwhile."""
        if any(t.numel() and not t.untyped_storage().nbytes() for t in self.tensors):
            if not hasattr(self.layer, "unshard"):
                raise RuntimeError(
                    "the weight of the head was freed between the head and its loss: expected "
                    "fully_shard(head), a group of its own, or reshard_after_forward=False for the "
                    "group that holds it"
                )
            self.layer.unshard()  # type: ignore[operator]
        if self._state() != self.state:
            raise RuntimeError(
                "the input or a parameter of the head was changed in place before its logits were "
                "used, which are not computed yet: expected their use before, or a model after "
                "custom_ops.unfuse"
            )

    def _state(self) -> list[Any]:
        return [(t.shape, version(t)) for t in self.tensors]


def version(t: Tensor) -> int:
    """How often a tensor was written to."""
    return 0 if t.is_inference() else t._version


class Form(NamedTuple):
    """The tensors and numbers of a lazy tensor."""

    xs: tuple[Tensor, ...]  #: in the layout of the logits, the features in place of the classes
    Ws: tuple[Tensor, ...]  #: (C, D_i)
    b: Tensor | None  #: (C,)
    dim: int  #: of the classes
    dtype: torch.dtype
    origins: tuple[Origin, ...]
    scale: float = 1.0  #: α
    cap: float | None = None  #: s
    kind: str = "logits"  #: or "log_probs", "probs", "plogp": p log p
    factor: float = 1.0  #: of all kinds but logits
    widened: bool = False  #: whether autocast takes losses in float32

    @property
    def classes(self) -> int:
        """C."""
        return len(self.Ws[0])

    def shape(self, classes: int | None = None) -> tuple[int, ...]:
        """The shape of the logits, or with another number of classes."""
        shape = self.xs[0].shape
        return (*shape[: self.dim], classes or self.classes, *shape[self.dim + 1 :])

    def detach(self) -> Form:
        """Return the form whose tensors get no gradient."""
        xs, Ws = (tuple(t.detach() for t in ts) for ts in (self.xs, self.Ws))
        return self._replace(xs=xs, Ws=Ws, b=None if self.b is None else self.b.detach())

    def dense(self) -> Tensor:
        """Return the numbers."""
        return self._numbers(*self._rows()).movedim(-1, self.dim)

    def cross_entropy(self, target: Tensor, **options: Any) -> Any:
        """Return `linear_cross_entropy` of the rows, the classes of `target` last."""
        xs = self._rows()
        x, W = (xs[0], self.Ws[0]) if len(xs) == 1 else (torch.cat(xs, -1), torch.cat(self.Ws, -1))
        b = None if self.b is None else self.b.to(x.dtype)
        scale = self.scale if self.cap is None else self.scale * self.cap
        options = {"softcap": self.cap, "logit_scale": scale} | options
        dtype = None if self.dtype == x.dtype else self.dtype
        return linear_cross_entropy(x, W, target, b, dtype=dtype, **options)

    def stats(self) -> Any:
        """Return lse and prediction of the rows."""
        _, stats = self.cross_entropy(self._labels(), reduction="none", return_stats=True)
        return stats

    def picked(self, labels: Tensor) -> Tensor:
        """Return the entry of each row's label, of logits or log-probabilities."""
        if self.kind == "log_probs":
            none = {"reduction": "none", "ignore_index": NONE_IGNORED}
            return self.cross_entropy(labels, **none) * -self.factor
        z: Any = 0 if self.b is None else self.b[labels]
        for x, W in zip(self._rows(), self.Ws, strict=True):
            z = z + torch.einsum("...d,...d->...", x, F.embedding(labels, W))
        return self._bent(z)

    def summed(self) -> Tensor:
        """Return the sum over the classes, of log p or p log p; blocks of p are taken again."""
        if self.kind == "log_probs":
            smooth = self.cross_entropy(self._labels(), reduction="none", label_smoothing=1.0)
            return smooth * (-self.factor * self.classes)
        rows = [x.flatten(0, -2) if x.dim() > 1 else x[None] for x in self._rows()]
        size = Blocks().size(rows[0], 4 * self.classes * self.dtype.itemsize)
        blocks = zip(*(x.split(size) for x in rows), strict=True)
        sums = [
            checkpoint(lambda *xs: self._numbers(*xs).sum(-1), *xs, use_reentrant=False)
            for xs in blocks
        ]
        return torch.cat(sums).reshape(self._labels().shape)

    def _rows(self) -> list[Tensor]:
        """x_i with the features last."""
        for origin in self.origins:
            origin.check()
        return [x.movedim(self.dim, -1) for x in self.xs]

    def _labels(self) -> Tensor:
        """A label for each row; any will do."""
        shape = self.xs[0].movedim(self.dim, -1).shape[:-1]
        return torch.zeros((), dtype=torch.int64, device=self.xs[0].device).expand(shape)

    def _numbers(self, *xs: Tensor) -> Tensor:
        z = F.linear(xs[0], self.Ws[0], self.b)
        for x, W in zip(xs[1:], self.Ws[1:], strict=True):
            z = z + F.linear(x, W)
        z = self._bent(z)
        if self.kind == "logits":
            return z
        log_p = z.log_softmax(-1)
        p_log_p = {"log_probs": log_p, "probs": log_p.exp(), "plogp": log_p.exp() * log_p}
        return p_log_p[self.kind] * self.factor

    def _bent(self, z: Tensor) -> Tensor:
        """Scaled, capped and cast."""
        z = z.to(self.dtype)
        if self.cap is None:
            return z if self.scale == 1 else z * self.scale
        return (z * self.scale).tanh() * self.cap
