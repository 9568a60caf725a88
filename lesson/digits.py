"""The images of the lesson: scikit-learn's digits, 8 × 8 pixels each."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

TRAINED = 1600  #: the first so many are learned from, the others held out


class Digits(NamedTuple):
    """All images in float64: pixels from 0 to 1, labels, and one-hot targets."""

    x: Tensor  #: (1797, 64)
    label: Tensor  #: (1797,)
    y: Tensor  #: (1797, 10)


@cache
def digits() -> Digits:
    """Load the digits; they come with scikit-learn, nothing is fetched."""
    data = load_digits()
    label = torch.as_tensor(data.target).long()
    return Digits(torch.as_tensor(data.data) / 16, label, F.one_hot(label, 10).double())


def misread(scores: Tensor) -> Tensor:
    """Return the held-out images whose largest score (1797, 10) is not their label's: indices."""
    wrong = scores.argmax(-1) != digits().label
    wrong[:TRAINED] = False
    return wrong.nonzero().flatten()
