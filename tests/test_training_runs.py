"""Lightning runs in this process, on the digits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("training.lightning", reason="needs the extra [train]")

from torch import Tensor, nn

from training import heads
from training.classifier import Classifier
from training.comparison import PROBE_EVERY, Comparison
from training.data import DigitData
from training.lightning import LightningModule, Trainer, seed_everything
from training.models import build
from training.optimizer import make_optimizer

SHAPE = (1, 8, 8)
OTHERS = list(heads.HEADS)[1:]

# Lightning's own use of torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


def fit(make: Callable[[], LightningModule], epochs: int = 2, seed: int = 0) -> Any:
    """Train for a few epochs of 15 batches and test; return the module and its metrics."""
    seed_everything(seed, verbose=False)
    module, data = make(), DigitData("digits", batch_size=100, seed=seed)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    return module, metrics


def classifier(head: str, model: str = "cnn") -> Callable[[], Classifier]:
    return lambda: Classifier(model, head, SHAPE)


def comparison(model: str = "cnn") -> Callable[[], Comparison]:
    return lambda: Comparison(build(model, SHAPE), partial(make_optimizer, lr=0.05))


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def test_each_head_ends_with_the_same_loss_to_rounding():
    # The linear model: its loss is convex, so that training does not amplify rounding.
    losses = {head: fit(classifier(head, "linear"))[1]["test_loss"] for head in heads.HEADS}
    assert losses["builtin"] < 0.5
    for loss in losses.values():
        assert loss == pytest.approx(losses["builtin"], rel=1e-5)


def test_a_run_is_determined_by_its_seed():
    once, again = fit(classifier("custom"))[0], fit(classifier("custom"))[0]
    other = fit(classifier("custom"), seed=1)[0]
    assert same_weights(once, again)
    assert not same_weights(once, other)


@pytest.fixture(scope="module")
def compared() -> Any:
    return fit(comparison())


@pytest.mark.parametrize("head", heads.HEADS)
def test_in_lock_step_each_head_trains_as_it_does_alone(compared: Any, head: str):
    together, metrics = compared
    alone, alone_metrics = fit(classifier(head))
    assert same_weights(together.networks[head], alone.model)
    assert metrics[f"test_accuracy/{head}"] == alone_metrics["test_accuracy"]


def test_every_step_and_every_parameter_is_on_record(compared: Any):
    record = compared[0].record
    assert record.steps == 30
    assert record.starts == [0]
    assert record.probes == list(range(0, 30, PROBE_EVERY))
    parameters = len(compared[0].parameter_names)
    for head in heads.HEADS:
        assert len(record.loss[head]) == len(record.seconds[head]) == 30
        assert min(record.seconds[head]) > 0
    for head in OTHERS:
        assert [len(row) for row in record.gradient_difference[head]] == [parameters] * 30
        assert [len(row) for row in record.probe_gradient_difference[head]] == [parameters] * 3


def test_at_the_same_weights_the_heads_differ_by_rounding(compared: Any):
    record = compared[0].record
    for head in OTHERS:
        assert max(record.probe_loss_difference[head]) < 1e-6
        assert max(max(row) for row in record.probe_gradient_difference[head]) < 1e-6
        assert max(record.gradient_difference[head][0]) < 1e-6  # the first step: nothing amplified


def test_a_head_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch):
    right = heads.HEADS["builtin"]

    def wrong(features: Tensor, layer: nn.Linear, target: Tensor) -> Tensor:
        return 1.001 * right(features, layer, target)

    monkeypatch.setitem(heads.HEADS, "custom", wrong)
    together, _ = fit(comparison("mlp"), epochs=1)
    assert together.record.probe_loss_difference["custom"][0] > 1e-4
    assert max(together.record.gradient_difference["custom"][0]) > 1e-6
    assert max(together.record.probe_loss_difference["jacobian"]) < 1e-6


@pytest.mark.parametrize("head", heads.HEADS)
def test_measuring_leaves_the_trained_weights_alone(compared: Any, head: str):
    together, _ = compared
    before = {name: value.clone() for name, value in together.state_dict().items()}
    images, labels = next(iter(DigitData("digits").train_dataloader()))
    step = together.step_on_a_copy(head, images, labels)
    first, second = step(), step()
    assert second != first  # it does train, a copy
    gradients = together.head_alone(head, images, labels)()
    assert [gradient.shape for gradient in gradients] == [(128, 64), (10, 64), (10,)]
    after = together.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
