"""One network with one head, trained by Lightning's automatic optimization."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import custom_ops
from training.lightning import LightningModule
from training.networks import heads
from training.networks.models import build
from training.networks.optimizer import LEARNING_RATE, make_optimizer


class Classifier(LightningModule):
    """Images (N, C, H, W) to logits (N, 10).

    Args:
        model: a name of `training.networks.models.MODELS`.
        head: a name of `training.networks.heads.HEADS`.
        image_shape: (C, H, W).
        lr: the learning rate of the first step.
    """

    def __init__(
        self,
        model: str,
        head: str,
        image_shape: tuple[int, int, int],
        lr: float = LEARNING_RATE,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = build(model, image_shape)
        self.head = heads.head(head)
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of the batch."""
        images, labels = batch
        loss = self.head(self.model.trunk(images), self.model.last, labels)
        self.log("loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `val_accuracy` and `val_loss`, the mean; each example counts once in either."""
        self._log_answers("val", *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `test_accuracy` and `test_loss`, the mean; each example counts once in either."""
        self._log_answers("test", *batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the probability of each digit (N, 10); the answer is the largest."""
        images, _ = batch
        return custom_ops.softmax(self(images), dim=1)

    def _log_answers(self, stage: str, images: Tensor, labels: Tensor) -> None:
        features = self.model.trunk(images)
        metrics = {
            f"{stage}_accuracy": self.model.accuracy(features, labels),
            f"{stage}_loss": self.head(features, self.model.last, labels),
        }
        self.log_dict(metrics, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule, a step a batch."""
        optimizer, schedule = make_optimizer(self.parameters(), self.lr)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
