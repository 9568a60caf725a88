"""The heads in lock-step: one network each, the same initial weights, the same batches.

Two questions are asked of each head, and they are different ones.

*Along its own path*: every head trains its own copy. Rounding that differs once in the last bit
moves the weights, and training amplifies it: ReLU and max-pooling switch, and the copies part. The
built-in parts as far from its own exact answer: taking `F.cross_entropy` of the logits in float64,
rounded once, for a head, the largest difference of a gradient in an epoch on MNIST was 1.0e-1,
where the heads written by hand had 5.7e-2 and 5.8e-2.

*At the same weights*: at every `PROBE_EVERY`-th step all heads are given the built-in's logits and
each sends its gradient back through the built-in's network. Nothing can be amplified: this is the
difference that the head itself makes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training import heads
from training.lightning import LightningModule
from training.measurement import timed
from training.models import build
from training.optimizer import LEARNING_RATE, make_optimizer
from training.record import Record

PROBE_EVERY = 10


class Comparison(LightningModule):
    """A copy of one network for each head, trained side by side with manual optimization.

    Args:
        model: a name of `training.models.MODELS`.
        image_shape: (C, H, W).
        names: of the heads; the others are compared with the first.
        lr: the learning rate of the first step.
    """

    def __init__(
        self,
        model: str,
        image_shape: tuple[int, int, int],
        names: Sequence[str] = tuple(heads.HEADS),
        lr: float = LEARNING_RATE,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.names = list(names)
        first = build(model, image_shape)
        self.models = nn.ModuleDict({name: copy.deepcopy(first) for name in names})
        self.losses = {name: heads.head(name) for name in names}
        self.lr = lr
        self.record = Record(self.names)
        self.parameter_names = [name for name, _ in first.named_parameters()]
        self._scalers: dict[str, torch.amp.GradScaler] = {}

    # The steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Let each head take one step on the batch, and write down what came of it."""
        step = self.record.steps
        if step % PROBE_EVERY == 0:
            self._probe(*batch)
        turn = step % len(self.names)  # who goes first finds colder caches: take turns
        for name in self.names[turn:] + self.names[:turn]:
            seconds, loss = timed(partial(self._step, name, *batch), self.device)
            self.record.seconds[name].append(seconds)
            self.record.loss[name].append(loss.item())
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()
        self._compare_gradients()
        losses = {f"loss/{name}": self.record.loss[name][-1] for name in self.names}
        self.log_dict(losses, batch_size=len(batch[1]))
        self.log("loss", self.record.loss[self.names[0]][-1], prog_bar=True, logger=False)

    def _step(self, name: str, images: Tensor, labels: Tensor) -> Tensor:
        """Forward, backward and optimizer; return the loss."""
        optimizer, scaler = self._optimizer(name), self._scalers[name]
        optimizer.zero_grad()
        loss = self.losses[name](self.models[name](images), labels)
        with torch.autocast(self.device.type, enabled=False):  # on since before this step
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return loss.detach()

    def _compare_gradients(self) -> None:
        first, *others = (_gradients(self.models[name]) for name in self.names)
        self.record.gradient_size.append(_largest(first))
        for name, gradients in zip(self.names[1:], others, strict=True):
            differences = [p - q for p, q in zip(gradients, first, strict=True)]
            self.record.gradient_difference[name].append(_largest(differences))

    def _probe(self, images: Tensor, labels: Tensor) -> None:
        """Give every head the same logits, and compare the losses and all gradients."""
        first, *others = self.names
        parameters = list(self.models[first].parameters())
        logits = self.models[first](images)
        scale = self._scalers[first].get_scale()
        losses, gradients = {}, {}
        with torch.autocast(self.device.type, enabled=False):
            for name in self.names:
                losses[name] = self.losses[name](logits, labels)
                scaled = torch.autograd.grad(losses[name] * scale, parameters, retain_graph=True)
                gradients[name] = [gradient / scale for gradient in scaled]
        if torch.is_autocast_enabled(self.device.type):
            torch.clear_autocast_cache()  # the first head must cast its weights as the others do
        self.record.probes.append(self.record.steps)
        for name in others:
            difference = (losses[name] - losses[first]).abs().item()
            self.record.probe_loss_difference[name].append(difference)
            pairs = zip(gradients[name], gradients[first], strict=True)
            self.record.probe_gradient_difference[name].append(_largest([p - q for p, q in pairs]))

    # For what cannot be measured while training

    def step_on_a_copy(self, name: str, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        """Return a function that takes training steps of `name` and leaves this module alone."""
        model, loss = copy.deepcopy(self.models[name]).to(images.device), self.losses[name]
        optimizer, _ = make_optimizer(model.parameters(), self.lr)

        def step() -> Tensor:
            optimizer.zero_grad()
            with self.trainer.precision_plugin.train_step_context():
                result = loss(model(images), labels)
            result.backward()
            optimizer.step()
            return result.detach()

        return step

    def loss_alone(self, name: str, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        """Return a function that computes the loss of given logits and its gradient."""
        model = copy.deepcopy(self.models[name]).to(images.device)
        with torch.no_grad(), self.trainer.precision_plugin.train_step_context():
            logits = model(images)
        logits.requires_grad_()

        def gradient() -> Tensor:
            return torch.autograd.grad(self.losses[name](logits, labels), logits)[0]

        return gradient

    # The test

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log each head's accuracy and mean loss."""
        images, labels = batch
        for name in self.names:
            logits = self.models[name](images)
            metrics = {
                f"test_accuracy/{name}": (logits.argmax(-1) == labels).float().mean(),
                f"test_loss/{name}": self.losses[name](logits, labels),
            }
            self.log_dict(metrics, batch_size=len(labels))

    # Optimizers and checkpoints

    def configure_optimizers(self) -> Any:
        """Return an optimizer and a schedule per head, in the order of the names."""
        pairs = [make_optimizer(self.models[name].parameters(), self.lr) for name in self.names]
        optimizers, schedules = zip(*pairs, strict=True)
        return list(optimizers), list(schedules)

    def _optimizer(self, name: str) -> Optimizer:
        # torch's own: Lightning's wrapper would be timed with the step and, in 16 bits, would have
        # the heads share one loss scale, so that the overflow of one changes the others.
        optimizers: Any = self.optimizers(use_pl_optimizer=False)
        return optimizers[self.names.index(name)]

    def setup(self, stage: str) -> None:
        """Make a loss scale per head; it is 1 but for float16."""
        float16 = self.trainer.precision == "16-mixed"
        self._scalers = {
            name: torch.amp.GradScaler(self.device.type, enabled=float16) for name in self.names
        }

    def on_train_start(self) -> None:
        """Note where this process takes up."""
        self.record.starts.append(self.record.steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the series and the loss scales."""
        checkpoint["record"] = self.record.state_dict()
        checkpoint["scalers"] = {name: s.state_dict() for name, s in self._scalers.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        self.record.load_state_dict(checkpoint["record"])
        for name, state in checkpoint["scalers"].items():
            self._scalers[name].load_state_dict(state)


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _largest(tensors: Sequence[Tensor]) -> list[float]:
    """Return each tensor's largest |entry|, with one transfer from the device."""
    return torch.stack([tensor.abs().amax() for tensor in tensors]).tolist()
