from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

pytest.importorskip("training.lightning", reason="needs the extra [train]")

from training.data.batches import Batches, make_batches
from training.lightning import LightningModule, Trainer

IMAGES = torch.arange(23).float().view(23, 1, 1, 1)
LABELS = torch.arange(23)

# Lightning's own use of torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


def epoch(batches: Iterable, number: int | None = None) -> list[int]:
    if number is not None:
        batches.sampler.set_epoch(number)
    return torch.cat([labels for _, labels in batches]).tolist()


def test_an_epoch_has_every_example_once_and_images_keep_their_labels():
    batches = make_batches(IMAGES, LABELS, 5, seed=0)
    got = list(batches)
    assert [len(labels) for _, labels in got] == [5, 5, 5, 5, 3]
    assert len(got) == len(batches)
    assert sorted(torch.cat([labels for _, labels in got]).tolist()) == list(range(23))
    assert all(torch.equal(images.flatten().long(), labels) for images, labels in got)


def test_every_epoch_and_every_seed_has_its_own_order():
    orders = [
        tuple(epoch(make_batches(IMAGES, LABELS, 5, seed=seed), number))
        for seed in range(3)
        for number in range(3)
    ]
    assert len(set(orders)) == 9
    assert epoch(make_batches(IMAGES, LABELS, 5, seed=1), 2) == list(orders[5])


def test_no_seed_keeps_the_order():
    assert epoch(make_batches(IMAGES, LABELS, 5)) == list(range(23))


def test_the_order_is_not_touched_by_other_random_numbers():
    torch.manual_seed(1)
    a = epoch(make_batches(IMAGES, LABELS, 5, seed=0))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert epoch(make_batches(IMAGES, LABELS, 5, seed=0)) == a
    assert torch.equal(torch.get_rng_state(), state)


def test_an_iteration_that_was_broken_off_leaves_no_trace():
    batches = make_batches(IMAGES, LABELS, 5)
    for _, _ in batches:
        break
    assert epoch(batches) == list(range(23))


@pytest.mark.parametrize("served", range(11))
def test_a_loaded_state_goes_on_where_it_was_saved(served: int):
    def stream(batches: Batches, first: int, count: int) -> list[list[int]]:
        """The next batches, epoch after epoch from the one that `first` is in."""
        taken: list[list[int]] = []
        for number in range(first // 5, 3):
            batches.sampler.set_epoch(number)
            for _, labels in batches:
                if len(taken) == count:
                    return taken
                taken.append(labels.tolist())
                state.update(batches.state_dict())
        return taken

    state = {"epoch": 0, "served": 0}
    expected = stream(make_batches(IMAGES, LABELS, 5, seed=3), 0, 15)
    state = {"epoch": 0, "served": 0}
    stream(make_batches(IMAGES, LABELS, 5, seed=3), 0, served)
    after = make_batches(IMAGES, LABELS, 5, seed=3)
    after.load_state_dict(dict(state))
    assert stream(after, served, 15 - served) == expected[served:]


def test_a_state_moves_the_start_once_and_in_its_own_epoch_alone():
    batches = make_batches(IMAGES, LABELS, 5, seed=0)
    whole = epoch(batches, 1)
    batches.load_state_dict({"epoch": 1, "served": 2})
    assert epoch(batches) == whole[10:]
    assert epoch(batches) == whole
    batches.load_state_dict({"epoch": 0, "served": 2})
    assert epoch(batches, 1) == whole


def test_processes_share_an_epoch_without_overlap_and_with_equally_many_batches():
    parts = [make_batches(IMAGES, LABELS, 5, seed=0, rank=r, world_size=2) for r in range(2)]
    assert len(parts[0]) == len(parts[1]) == 3
    first, second = (epoch(part) for part in parts)
    assert len(first) == len(second) == 11
    assert not set(first) & set(second)


class Seen(LightningModule):
    """Writes down the labels that Lightning hands on, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.labels: dict[str, list[list[int]]] = {"train": [], "val": [], "predict": []}

    def training_step(self, batch, index):
        self.labels["train"].append(batch[1].tolist())
        return self.weight * 1

    def validation_step(self, batch, index):
        self.labels["val"].append(batch[1].tolist())

    def predict_step(self, batch, index):
        self.labels["predict"].append(batch[1].tolist())
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def plain(seed: int | None) -> DataLoader:
    """A DataLoader that knows nothing of states, in the same order."""
    data = TensorDataset(IMAGES, LABELS)
    sampler = DistributedSampler(
        data, 1, 0, shuffle=seed is not None, seed=1_000_003 * (seed or 0), drop_last=True
    )
    return DataLoader(data, 5, sampler=sampler)


def seen(train: Iterable, val: Iterable, **flags: object) -> Seen:
    """The labels of two fits of the same loaders, and of a prediction."""
    module = Seen()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu"}
    for _ in range(2):
        trainer = Trainer(**({"max_epochs": 3} | quiet | flags))
        trainer.fit(module, train, val)
    Trainer(**quiet).predict(module, val)
    return module


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"num_sanity_val_steps": 0},
        {"limit_val_batches": 2},
        {"limit_train_batches": 3},
        {"overfit_batches": 2},
        {"val_check_interval": 2},
        {"check_val_every_n_epoch": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"accumulate_grad_batches": 2},
        {"max_steps": 7},
        {"fast_dev_run": 2},
    ],
    ids=lambda flags: "_".join(flags) or "none",
)
@pytest.mark.filterwarnings("ignore")
def test_under_every_flag_the_batches_are_those_of_a_plain_data_loader(flags: dict[str, object]):
    ours = seen(make_batches(IMAGES, LABELS, 5, seed=2), make_batches(IMAGES, LABELS, 5), **flags)
    theirs = seen(plain(2), plain(None), **flags)
    assert ours.labels["train"]
    assert ours.labels == theirs.labels


@pytest.mark.filterwarnings("ignore")
def test_after_the_sanity_check_a_validation_sees_every_example():
    loader = make_batches(IMAGES, LABELS, 5)
    module = seen(make_batches(IMAGES, LABELS, 5, seed=0), loader)
    sanity, first = module.labels["val"][:2], module.labels["val"][2:7]
    assert sanity == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [label for batch in first for label in batch] == list(range(23))
