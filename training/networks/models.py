"""Three small networks from an image to ten logits, chosen by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

CLASSES = 10


class Network(nn.Module):
    """A network cut before its last layer, as a head takes the two.

    Args:
        trunk: from an input to features (..., D).
        last: from features to logits (..., C).
    """

    def __init__(self, trunk: nn.Module, last: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.last = last

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        return self.last(self.trunk(inputs))

    def accuracy(self, features: Tensor, target: Tensor) -> Tensor:
        """Return the share of labels (...) with the largest logit, of features (..., D)."""
        return (self.last(features).argmax(-1) == target).float().mean()


def linear(channels: int, height: int, width: int) -> nn.Sequential:
    """Softmax regression: one matrix, z = W x + b."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, CLASSES))


def mlp(channels: int, height: int, width: int) -> nn.Sequential:
    """One hidden layer of 128."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


def cnn(channels: int, height: int, width: int) -> nn.Sequential:
    """Two convolutions with pooling and one hidden layer: 99 % on MNIST in five epochs.

    No dropout: nothing in a step is random, so that heads can be compared step by step.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),
    )


MODELS: dict[str, Callable[[int, int, int], nn.Sequential]] = {
    "linear": linear,
    "mlp": mlp,
    "cnn": cnn,
}


def build(name: str, image_shape: tuple[int, int, int]) -> Network:
    """Return the model for images of `image_shape` (channels, H, W), freshly initialised.

    >>> build("mlp", (1, 8, 8)).last
    Linear(in_features=128, out_features=10, bias=True)
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    *trunk, last = MODELS[name](*image_shape)
    assert isinstance(last, nn.Linear)
    return Network(nn.Sequential(*trunk), last)
