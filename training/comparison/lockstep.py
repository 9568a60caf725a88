"""The heads in lock-step: one network each, the same initial weights, the same batches.

Two questions are asked of each head, and they are different ones.

*Along its own path*: every head trains its own copy. Rounding that differs once in the last bit
moves the weights, and training amplifies it: ReLU and max-pooling switch, and the copies part. The
built-in parts as far from its own exact answer: the yardstick, `F.cross_entropy` of the logits in
float64, rounded once, trains a copy as well.

*At the same weights*: at every `PROBE_EVERY`-th step all heads are given the features and the last
layer of the built-in's network, and each sends its gradient back through that network. Nothing can
be amplified: this is the difference that the head itself makes, beside the yardstick's.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.comparison.record import Record
from training.lightning import LightningModule
from training.measurement import timed
from training.networks import heads
from training.networks.models import Network
from training.networks.optimizer import MakeOptimizer

PROBE_EVERY = 10

# There is nothing to validate: the comparison chooses nothing, and tests the last weights.
warnings.filterwarnings("ignore", message=r".*have no `validation_step`.*")


class Comparison(LightningModule):
    """A copy of one network for each head, trained side by side with manual optimization.

    Args:
        network: what each head gets a copy of.
        make_optimizer: from parameters to an optimizer and its schedule.
        names: of the heads; the others are compared with the first.
        yardstick: whether the exact answer trains a copy too.

    Attributes:
        paths: the names of all that are trained: of the heads, and maybe the yardstick's.
        record: the series of the training.
        predictions: per path, the class answered for each target of the test.
        targets: of the test.
    """

    def __init__(
        self,
        network: Network,
        make_optimizer: MakeOptimizer,
        names: Sequence[str] = tuple(heads.HEADS),
        *,
        yardstick: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.names = list(names)
        self.paths = [*names, heads.YARDSTICK] if yardstick else list(names)
        self.networks = nn.ModuleDict({name: copy.deepcopy(network) for name in self.paths})
        self.heads = {name: heads.head(name) for name in self.paths}
        self.make_optimizer = make_optimizer
        self.record = Record(self.paths)
        self.predictions: dict[str, list[int]] = {}
        self.targets: list[int] = []
        self.parameter_names = [name for name, _ in network.named_parameters()]
        self._scalers: dict[str, torch.amp.GradScaler] = {}

    # The steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Let each path take one step on the batch, and write down what came of it."""
        step = self.record.steps
        if step % PROBE_EVERY == 0:
            self._probe(*batch)
        turn = step % len(self.paths)  # who goes first finds colder caches: take turns
        for name in self.paths[turn:] + self.paths[:turn]:
            seconds, loss = timed(partial(self._step, name, *batch), self.device)
            self.record.seconds[name].append(seconds)
            self.record.loss[name].append(loss.item())
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()
        self._compare_gradients()
        losses = {f"loss/{name}": self.record.loss[name][-1] for name in self.paths}
        self.log_dict(losses, batch_size=len(batch[0]))
        self.log("loss", self.record.loss[self.names[0]][-1], prog_bar=True, logger=False)

    def loss(self, name: str, network: Network, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss that the head called `name` gives the network."""
        return self.heads[name](network.trunk(inputs), network.last, targets)

    def _step(self, name: str, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward, backward and optimizer; return the loss."""
        optimizer, scaler = self._optimizer(name), self._scalers[name]
        optimizer.zero_grad()
        loss = self.loss(name, self._network(name), inputs, targets)
        with torch.autocast(self.device.type, enabled=False):  # on since before this step
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return loss.detach()

    def _compare_gradients(self) -> None:
        gradients = {name: _gradients(self._network(name)) for name in self.paths}
        self.record.gradients.append({name: _largest(g) for name, g in gradients.items()})
        self.record.gradient_differences.append(self._differences(gradients))

    def _differences(self, gradients: dict[str, list[Tensor]]) -> dict[str, list[float]]:
        """Each parameter's largest |difference| from the first head's gradient, per other path."""
        first = gradients[self.paths[0]]
        return {
            name: _largest([p - q for p, q in zip(gradients[name], first, strict=True)])
            for name in self.paths[1:]
        }

    def _probe(self, inputs: Tensor, targets: Tensor) -> None:
        """Give every head the same features and layer, and compare the losses and all gradients."""
        network = self._network(self.paths[0])
        parameters = list(network.parameters())
        features = network.trunk(inputs)
        scale = self._scalers[self.paths[0]].get_scale()
        losses, gradients = {}, {}
        for name in self.paths:
            loss = self.heads[name](features, network.last, targets)
            with torch.autocast(self.device.type, enabled=False):
                scaled = torch.autograd.grad(loss * scale, parameters, retain_graph=True)
            losses[name] = loss.item()
            gradients[name] = [gradient / scale for gradient in scaled]
        if torch.is_autocast_enabled(self.device.type):
            torch.clear_autocast_cache()  # the first head must cast its weights as the others do
        self.record.probes.append(self.record.steps)
        self.record.probe_losses.append(losses)
        self.record.probe_gradients.append({name: _largest(g) for name, g in gradients.items()})
        self.record.probe_differences.append(self._differences(gradients))

    # For what cannot be measured while training

    def step_on_a_copy(self, name: str, inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
        """Return a function that takes training steps of `name` and leaves this module alone."""
        network = self._copy(name, inputs.device)
        optimizer, _ = self.make_optimizer(network.parameters())

        def step() -> Tensor:
            with self.trainer.precision_plugin.train_step_context():
                loss = self.loss(name, network, inputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()  # so that the next step's peak has the gradients in it
            return loss.detach()

        return step

    def head_alone(
        self, name: str, inputs: Tensor, targets: Tensor
    ) -> Callable[[], tuple[Tensor, ...]]:
        """Return a function from given features to the loss and its gradients.

        They are those of the features and of the last layer's parameters: what the last layer and
        its loss cost together, as a head that is one piece has no cost of the loss alone.
        """
        network = self._copy(name, inputs.device)
        last, context = network.last, self.trainer.precision_plugin.train_step_context
        with torch.no_grad(), context():
            features = network.trunk(inputs)
        features.requires_grad_()

        def gradients() -> tuple[Tensor, ...]:
            with context():
                loss = self.heads[name](features, last, targets)
            return torch.autograd.grad(loss, (features, *last.parameters()))

        return gradients

    def _copy(self, name: str, device: torch.device) -> Network:
        return copy.deepcopy(self._network(name)).to(device)

    def _network(self, name: str) -> Network:
        network = self.networks[name]
        assert isinstance(network, Network)
        return network

    # The test

    def on_test_start(self) -> None:
        """Forget the answers of an earlier test."""
        self.predictions = {name: [] for name in self.paths}
        self.targets = []

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log each path's accuracy and mean loss, and keep its answers."""
        inputs, targets = batch
        self.targets += targets.flatten().tolist()
        for name in self.paths:
            network = self._network(name)
            features = network.trunk(inputs)
            answers = network.last(features).argmax(-1)
            self.predictions[name] += answers.flatten().tolist()
            metrics = {
                f"test_accuracy/{name}": (answers == targets).float().mean(),
                f"test_loss/{name}": self.heads[name](features, network.last, targets),
            }
            self.log_dict(metrics, batch_size=len(inputs))

    # Optimizers and checkpoints

    def configure_optimizers(self) -> Any:
        """Return an optimizer and a schedule per path, in their order."""
        pairs = [self.make_optimizer(self.networks[name].parameters()) for name in self.paths]
        optimizers, schedules = zip(*pairs, strict=True)
        return list(optimizers), list(schedules)

    def _optimizer(self, name: str) -> Optimizer:
        # torch's own: Lightning's wrapper would be timed with the step and, in 16 bits, would have
        # the heads share one loss scale, so that the overflow of one changes the others.
        optimizers: Any = self.optimizers(use_pl_optimizer=False)
        return optimizers[self.paths.index(name)]

    def setup(self, stage: str) -> None:
        """Make a loss scale per head; it is 1 but for float16."""
        float16 = self.trainer.precision == "16-mixed"
        self._scalers = {
            name: torch.amp.GradScaler(self.device.type, enabled=float16) for name in self.paths
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


def _gradients(network: nn.Module) -> list[Tensor]:
    return [p.grad for p in network.parameters() if p.grad is not None]


def _largest(tensors: Sequence[Tensor]) -> list[float]:
    """Return each tensor's largest |entry|, with one transfer from the device."""
    return torch.stack([tensor.abs().amax() for tensor in tensors]).tolist()
