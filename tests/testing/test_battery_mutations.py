"""Random compositions of right Functions pass; one mutation of a backward is found."""

import random

import pytest
import torch
from compositions import MUTATIONS, composition

from custom_ops.testing import check

ORDERS = ["gradient", "second derivative"]


def inputs(seed):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 3, generator=g, dtype=torch.double) for _ in range(2))


def found(seed):
    call, text = composition(random.Random(seed), MUTATIONS[seed % len(MUTATIONS)])
    return not check(call, *inputs(seed), only=ORDERS).passed, text


@pytest.mark.parametrize("seed", range(12))
def test_right_composition_passes_every_derivative(seed):
    call, text = composition(random.Random(seed))
    report = check(call, *inputs(seed), only=["derivatives", "reuse"])
    assert report.passed, f"{text}\n{report}"


@pytest.mark.parametrize("seed", range(2 * len(MUTATIONS)))
def test_mutation_is_found(seed):
    caught, text = found(seed)
    assert caught, text


@pytest.mark.audit
@pytest.mark.timeout(1800)
def test_99_of_100_mutations_are_found():
    missed = [text for caught, text in map(found, range(1000)) if not caught]
    assert len(missed) <= 10, "\n".join(missed)


@pytest.mark.audit
def test_no_right_composition_is_accused():
    for seed in range(200):
        call, text = composition(random.Random(seed))
        report = check(call, *inputs(seed), only=ORDERS)
        assert report.passed, f"{text}\n{report}"
