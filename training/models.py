"""Three small networks from an image to ten logits, chosen by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

CLASSES = 10


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


def build(name: str, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Return the model for images of `image_shape` (channels, H, W), freshly initialised.

    >>> build("linear", (1, 8, 8))[1]
    Linear(in_features=64, out_features=10, bias=True)
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](*image_shape)
