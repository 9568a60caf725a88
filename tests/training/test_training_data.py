from __future__ import annotations

import pytest
import torch

pytest.importorskip("training.lightning", reason="needs the extra [train]")

from training.data import DigitData


@pytest.fixture(scope="module")
def data() -> DigitData:
    return DigitData("digits", batch_size=100, seed=1)


def test_digits_are_split_and_normalised(data: DigitData):
    images = data.examples
    assert images.name == "digits"
    assert images.train_inputs.shape == (1437, 1, 8, 8)
    assert images.test_inputs.shape == (360, 1, 8, 8)
    assert images.train_inputs.dtype == torch.float32
    assert images.train_targets.dtype == torch.int64
    assert abs(images.train_inputs.mean()) < 0.02
    assert abs(images.train_inputs.std() - 1) < 0.02
    assert data.image_shape == (1, 8, 8)


def test_both_parts_have_every_digit_in_proportion(data: DigitData):
    train, test = data.examples.train_targets, data.examples.test_targets
    torch.testing.assert_close(
        train.bincount() / len(train), test.bincount() / len(test), atol=5e-3, rtol=0
    )


def test_the_split_belongs_to_the_data_and_not_to_the_seed(data: DigitData):
    other = DigitData("digits", seed=2).examples
    assert torch.equal(data.examples.test_inputs, other.test_inputs)


def test_training_batches_are_shuffled_and_the_test_set_is_whole_and_in_order(data: DigitData):
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (100, 1, 8, 8)
    assert not torch.equal(labels, data.examples.train_targets[:100])
    again = next(iter(DigitData("digits", batch_size=100, seed=1).train_dataloader()))
    assert torch.equal(images, again[0])
    tested = torch.cat([labels for _, labels in data.test_dataloader()])
    assert torch.equal(tested, data.examples.test_targets)


def test_unknown_data_names_the_known_ones():
    with pytest.raises(ValueError, match="data must be one of auto, mnist, digits, got 'cifar'"):
        DigitData("cifar")


@pytest.mark.parametrize("count", [10, 144, 1427])
def test_a_validation_set_is_apart_in_proportion_and_the_same_for_every_seed(count: int):
    whole = DigitData("digits").examples
    a, b = (DigitData("digits", seed=seed, validation=count).examples for seed in range(2))
    assert len(a.val_targets) == count
    assert len(a.train_targets) == 1437 - count
    together = torch.cat([a.train_inputs, a.val_inputs]).flatten(1)
    assert torch.equal(together.sort(0).values, whole.train_inputs.flatten(1).sort(0).values)
    assert torch.equal(a.val_inputs, b.val_inputs)
    expected = whole.train_targets.bincount() * count / 1437
    assert (a.val_targets.bincount(minlength=10) - expected).abs().max() <= 1
    assert torch.equal(a.test_inputs, whole.test_inputs)


@pytest.mark.parametrize("count", [1, 9, 1428, 2000, -5])
def test_a_validation_set_that_cannot_be_is_refused(count: int):
    with pytest.raises(ValueError, match=f"from 10 to 1427 of the 1437 .* got {count}"):
        _ = DigitData("digits", validation=count).examples


def test_without_a_validation_set_there_is_no_validation(data: DigitData):
    assert data.val_dataloader() == []
