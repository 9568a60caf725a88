"""What a lazy tensor stands for, and the questions that are answered from it without N × C numbers.

    z = s · tanh(α (x Wᵀ + b)),  or without a cap  z = α (x Wᵀ + b)

is `linear_cross_entropy`'s with softcap = s and logit_scale = α s. The sum of two heads is one
whose features lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["Form", "Origin", "version"]

#: No label has this value, so that none is ignored: −100 is out of range, as in `gather`.
NONE_IGNORED = 2**62
#: What may be made of logits.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "log_probs": lambda z: z.log_softmax(-1),
    "probs": lambda z: z.softmax(-1),
    "plogp": lambda z: z.softmax(-1) * z.log_softmax(-1),
}


def version(t: Tensor) -> int:
    """How often a tensor was written to."""
    return 0 if t.is_inference() else t._version


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


class Form(NamedTuple):
    """The tensors and numbers of a lazy tensor."""

    x: Tensor  #: in the layout of the logits, the features in place of the classes
    W: Tensor  #: (C, D)
    b: Tensor | None  #: (C,)
    origins: tuple[Origin, ...]
    dim: int  #: of the classes
    dtype: torch.dtype
    scale: float = 1.0  #: α
    cap: float | None = None  #: s
    kind: str = "logits"  #: or one of KINDS
    factor: float = 1.0  #: of these
    widened: bool = False  #: whether autocast takes losses in float32

    @property
    def classes(self) -> int:
        """C."""
        return self.W.shape[0]

    def shape(self, classes: int) -> tuple[int, ...]:
        """The shape of the logits, with this number of classes."""
        return (*self.x.shape[: self.dim], classes, *self.x.shape[self.dim + 1 :])

    def over(self, dim: int) -> bool:
        """Whether this dimension is that of the classes."""
        return dim % self.x.dim() == self.dim

    def of(self, function: Callable[[Tensor], Tensor], *names: str) -> Form:
        """Return the form with `function` of these tensors."""
        given = {name: getattr(self, name) for name in names}
        changed: Any = {n: t if t is None else function(t) for n, t in given.items()}
        return self._replace(**changed)

    def dense(self) -> Tensor:
        """Return the numbers."""
        return self._numbers(self._rows()).movedim(-1, self.dim)

    def cross_entropy(
        self, target: Tensor | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> Any:
        """Return `linear_cross_entropy` of the rows; of any labels without a target."""
        x = self._rows()
        if target is None:
            target = x.new_zeros((), dtype=torch.int64).expand(x.shape[:-1])
        scale = self.scale if self.cap is None else self.scale * self.cap
        options = {"softcap": self.cap, "logit_scale": scale} | options
        dtype = dtype or (None if self.dtype == x.dtype else self.dtype)
        return linear_cross_entropy(x, self.W, target, self.b, dtype=dtype, **options)

    def stats(self) -> Any:
        """Return lse, prediction and entropy of the rows."""
        return self.cross_entropy(reduction="none", return_stats=True)[1]

    def picked(self, labels: Tensor) -> Tensor:
        """Return the entry of each row's label, of logits or log-probabilities."""
        if self.kind == "log_probs":
            none: Any = {"reduction": "none", "ignore_index": NONE_IGNORED}
            return self.cross_entropy(labels, **none) * -self.factor
        z = (self._rows() * F.embedding(labels, self.W)).sum(-1)
        return self._bent(z if self.b is None else z + self.b[labels])

    def summed(self) -> Tensor:
        """Return the sum over the classes, of log p or p log p."""
        if self.kind == "log_probs":
            smooth = self.cross_entropy(reduction="none", label_smoothing=1.0)
            return smooth * (-self.factor * self.classes)
        return self.stats().entropy.to(self.dtype) * -self.factor

    def _rows(self) -> Tensor:
        """The rows of x, the features last."""
        for origin in self.origins:
            origin.check()
        return self.x if self.x.dim() == self.dim + 1 else self.x.movedim(self.dim, -1)

    def _numbers(self, x: Tensor) -> Tensor:
        z = self._bent(F.linear(x, self.W, self.b))
        return KINDS[self.kind](z) * self.factor if self.kind in KINDS else z

    def _bent(self, z: Tensor) -> Tensor:
        """Cast, scaled and capped."""
        z = z.to(self.dtype)
        if self.cap is None:
            return z if self.scale == 1 else z * self.scale
        return (z * self.scale).tanh() * self.cap
