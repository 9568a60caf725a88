from __future__ import annotations

import pytest
import torch

from training.batches import Batches

IMAGES = torch.arange(23).float().view(23, 1, 1, 1)
LABELS = torch.arange(23)


def epoch(batches: Batches) -> list[int]:
    return torch.cat([labels for _, labels in batches]).tolist()


def test_an_epoch_has_every_example_once_and_images_keep_their_labels():
    batches = Batches(IMAGES, LABELS, 5, seed=0)
    got = list(batches)
    assert [len(labels) for _, labels in got] == [5, 5, 5, 5, 3]
    assert len(got) == len(batches)
    assert sorted(torch.cat([labels for _, labels in got]).tolist()) == list(range(23))
    assert all(torch.equal(images.flatten().long(), labels) for images, labels in got)


def test_every_epoch_and_every_seed_has_its_own_order():
    a, b = Batches(IMAGES, LABELS, 5, seed=0), Batches(IMAGES, LABELS, 5, seed=1)
    first, second, other = epoch(a), epoch(a), epoch(b)
    assert first != second != other != first
    assert epoch(Batches(IMAGES, LABELS, 5, seed=0)) == first


def test_no_seed_keeps_the_order():
    assert epoch(Batches(IMAGES, LABELS, 5)) == list(range(23))


def test_the_order_is_not_touched_by_other_random_numbers():
    torch.manual_seed(1)
    a = epoch(Batches(IMAGES, LABELS, 5, seed=0))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert epoch(Batches(IMAGES, LABELS, 5, seed=0)) == a
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("served", [0, 1, 4, 5, 7, 12])
def test_a_loaded_state_goes_on_where_it_was_saved(served: int):
    def stream(batches: Batches, count: int) -> list[list[int]]:
        taken: list[list[int]] = []
        while len(taken) < count:
            for _, labels in batches:
                taken.append(labels.tolist())
                if len(taken) == count:
                    break
        return taken

    whole = Batches(IMAGES, LABELS, 5, seed=3)
    expected = stream(whole, 15)
    before = Batches(IMAGES, LABELS, 5, seed=3)
    stream(before, served)
    after = Batches(IMAGES, LABELS, 5, seed=3)
    after.load_state_dict(before.state_dict())
    assert stream(after, 15 - served) == expected[served:]


def test_processes_share_an_epoch_without_overlap_and_with_equally_many_batches():
    parts = [Batches(IMAGES, LABELS, 5, seed=0, rank=r, world_size=2) for r in range(2)]
    assert len(parts[0]) == len(parts[1]) == 3
    first, second = (epoch(part) for part in parts)
    assert len(first) == len(second) == 11
    assert not set(first) & set(second)
