"""A LightningModule of your own with the losses of custom_ops, on scikit-learn's digits.

    python lightning_module.py

It runs from any folder and needs `custom_ops`, `pytorch_lightning` and `scikit-learn` alone.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from custom_ops import cross_entropy, linear_cross_entropy, softmax

# Lightning imports torchvision. PyPI's is built for a CUDA torch: beside a CPU torch its import
# stops at `operator torchvision::nms does not exist`. Declaring the two operators is enough; with
# a torchvision of the same origin as torch, or with none, nothing of this is needed.
try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import pytorch_lightning as pl


class Digits(pl.LightningModule):
    """Images (N, 64) to one of ten digits."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.trunk = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.last = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.last(self.trunk(images))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss, of the last layer and cross-entropy in one piece."""
        images, labels = batch
        loss = linear_cross_entropy(
            self.trunk(images), self.last.weight, labels, self.last.bias, label_smoothing=0.05
        )
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log loss and accuracy, from the logits."""
        images, labels = batch
        logits = self(images)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean())

    def predict_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the probability of each digit."""
        return softmax(self(batch[0]), dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)


def main() -> None:
    """Train, validate, and print how many of the images kept apart are read rightly."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    apart = torch.arange(len(labels)) % 5 == 0
    train = DataLoader(TensorDataset(images[~apart], labels[~apart]), 64, shuffle=True)
    val = DataLoader(TensorDataset(images[apart], labels[apart]), 64)

    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=10,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Digits()
    trainer.fit(module, train, val)
    probabilities = torch.cat(trainer.predict(module, val))
    right = int((probabilities.argmax(1) == labels[apart]).sum())
    print(f"{right} of {int(apart.sum())} images right")


if __name__ == "__main__":
    main()
