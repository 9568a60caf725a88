"""Images of handwritten digits as normalised tensors in memory: MNIST and scikit-learn's digits.

Inputs are images (N, 1, H, W), float32 with mean 0 and deviation 1; targets are labels (N,), int64.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from training.data import mnist
from training.data.examples import Examples


def load_mnist(data_dir: Path) -> Examples:
    """Return the 60,000 + 10,000 MNIST images, (N, 1, 28, 28), downloaded to `data_dir` if absent.

    Raise `mnist.Unavailable` or `mnist.CorruptFile`.
    """
    mnist.ensure_present(data_dir)
    train_images, train_labels, test_images, test_labels = mnist.read(data_dir)
    scale = {"mean": 33.3184, "std": 78.5675}  # of the training pixels, 0 to 255
    return Examples(
        "mnist",
        _normalised(train_images, **scale),
        train_labels.long(),
        _normalised(test_images, **scale),
        test_labels.long(),
    )


def load_digits() -> Examples:
    """Return scikit-learn's 1,797 digits, (N, 1, 8, 8): 1,437 to train on and 360 to test on.

    The split is fixed and has every digit in proportion: it belongs to the data, not to a run's
    seed. No network: the images come with the library.
    """
    import sklearn.datasets
    from sklearn.model_selection import train_test_split

    digits = sklearn.datasets.load_digits()
    train_images, test_images, train_labels, test_labels = train_test_split(
        digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    scale = {"mean": 4.8842, "std": 6.0168}  # of the pixels, 0 to 16
    return Examples(
        "digits",
        _normalised(torch.from_numpy(train_images), **scale),
        torch.from_numpy(train_labels).long(),
        _normalised(torch.from_numpy(test_images), **scale),
        torch.from_numpy(test_labels).long(),
    )


def keep_apart(images: Examples, count: int) -> Examples:
    """Return the same images with `count` of the training set as the validation set.

    The split is fixed and has every digit in proportion. Raise `ValueError` where it cannot.
    """
    from sklearn.model_selection import train_test_split

    classes, all = 10, len(images.train_targets)
    if not classes <= count <= all - classes:
        raise ValueError(
            f"validation must be from {classes} to {all - classes} of the {all} training images of "
            f"{images.name}, got {count}"
        )
    train, val = train_test_split(
        torch.arange(all), test_size=count, stratify=images.train_targets, random_state=0
    )
    return images._replace(
        train_inputs=images.train_inputs[train],
        train_targets=images.train_targets[train],
        val_inputs=images.train_inputs[val],
        val_targets=images.train_targets[val],
    )


def _normalised(pixels: Tensor, mean: float, std: float) -> Tensor:
    """(N, H, W) of any dtype to (N, 1, H, W) float32 with mean 0 and deviation 1."""
    return pixels.float().sub_(mean).div_(std).unsqueeze(1)
