"""Lightning runs in this process, on the digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("training.lightning", reason="needs the extra [train]")

from torch import Tensor, nn

from training.classifier import Classifier
from training.comparison.lockstep import PROBE_EVERY, Comparison
from training.data import DigitData
from training.lightning import LightningModule, ModelCheckpoint, Trainer, seed_everything
from training.networks import heads
from training.networks.models import build
from training.networks.optimizer import make_optimizer

SHAPE = (1, 8, 8)
PATHS = [*heads.HEADS, heads.YARDSTICK]

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
    return lambda: Comparison(build(model, SHAPE), partial(make_optimizer, lr=0.05), yardstick=True)


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
    for path in PATHS:
        assert len(record.loss[path]) == len(record.seconds[path]) == 30
        assert min(record.seconds[path]) > 0
        assert [len(step[path]) for step in record.gradients] == [parameters] * 30
        assert [len(probe[path]) for probe in record.probe_gradients] == [parameters] * 3
    for path in PATHS[1:]:
        assert [len(step[path]) for step in record.gradient_differences] == [parameters] * 30
        assert [len(probe[path]) for probe in record.probe_differences] == [parameters] * 3


def test_every_answer_of_the_test_is_kept(compared: Any):
    together, metrics = compared
    assert together.targets == DigitData("digits").examples.test_targets.tolist()
    for path in PATHS:
        pairs = zip(together.predictions[path], together.targets, strict=True)
        right = sum(answer == target for answer, target in pairs)
        assert right / 360 == pytest.approx(metrics[f"test_accuracy/{path}"])


def test_at_the_same_weights_the_heads_differ_by_rounding(compared: Any):
    record = compared[0].record
    for path in PATHS[1:]:
        for losses, gradients in zip(record.probe_losses, record.probe_differences, strict=True):
            assert abs(losses[path] - losses["builtin"]) < 1e-6
            assert max(gradients[path]) < 1e-6
        assert max(record.gradient_differences[0][path]) < 1e-6  # the first step amplifies nothing


def test_a_head_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch):
    right = heads.HEADS["builtin"]

    def wrong(features: Tensor, layer: nn.Linear, target: Tensor) -> Tensor:
        return 1.001 * right(features, layer, target)

    monkeypatch.setitem(heads.HEADS, "custom", wrong)
    record = fit(comparison("mlp"), epochs=1)[0].record
    losses = record.probe_losses[0]
    assert abs(losses["custom"] - losses["builtin"]) > 1e-4
    assert abs(losses["jacobian"] - losses["builtin"]) < 1e-6
    assert max(record.gradient_differences[0]["custom"]) > 1e-6


def test_what_is_not_finite_stays_on_record(monkeypatch: pytest.MonkeyPatch):
    right, calls = heads.HEADS["builtin"], []

    def broken(features: Tensor, layer: nn.Linear, target: Tensor) -> Tensor:
        calls.append(1)
        return right(features, layer, target) * (1.0 if len(calls) == 1 else float("nan"))

    monkeypatch.setitem(heads.HEADS, "custom", broken)
    record = fit(comparison("mlp"), epochs=2)[0].record
    losses = [probe["custom"] for probe in record.probe_losses]
    assert [math.isfinite(loss) for loss in losses] == [True, False, False]
    assert all(math.isfinite(probe["jacobian"]) for probe in record.probe_losses)
    assert not math.isfinite(max(record.probe_gradients[2]["custom"]))


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


def test_a_classifier_comes_back_from_its_checkpoint_and_predicts(tmp_path):
    data = DigitData("digits", batch_size=100, validation=100)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
    trained = Classifier("mlp", "custom-fused", data.image_shape, lr=0.1)
    trainer.fit(trained, data)
    trainer.save_checkpoint(tmp_path / "my.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "my.ckpt")
    assert same_weights(trained, loaded)
    assert loaded.lr == 0.1
    predicted = Trainer(accelerator="cpu", **quiet, enable_checkpointing=False).predict(
        loaded, data
    )
    probabilities = torch.cat(predicted)
    assert probabilities.shape == (360, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(360))
    with torch.no_grad():
        expected = trained.eval()(data.examples.test_inputs).softmax(1)
    torch.testing.assert_close(probabilities, expected)


def test_a_validation_set_is_seen_each_epoch_and_the_best_is_kept(tmp_path):
    data = DigitData("digits", batch_size=100, validation=100)
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[best],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier("mlp", "custom", data.image_shape), data)
    assert 0 < trainer.callback_metrics["val_accuracy"] <= 1
    assert best.best_model_score == trainer.callback_metrics["val_loss"]
