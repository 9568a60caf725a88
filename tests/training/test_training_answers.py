from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="needs the extra [train]")

from training.comparison.answers import Pair, pair, spread


def by_hand(gained: int, lost: int) -> float:
    """The two-sided binomial test of 1/2: all splits no more probable than this one."""
    n = gained + lost
    return sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(gained - lost)) / 2**n


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (9, 1), (0, 12), (3, 14)])
def test_the_test_is_the_exact_one(gained: int, lost: int):
    assert Pair([0], [gained], [lost], 360).p == pytest.approx(by_hand(gained, lost))


def test_seeds_are_added_up():
    assert Pair([0, 0], [4, 5], [1, 0], 360).p == pytest.approx(by_hand(9, 1))


counts = st.integers(0, 30)


@given(counts, counts, st.integers(60, 10_000))
def test_the_interval_holds_the_difference_and_turns_with_the_sides(gained, lost, asked):
    one, other = Pair([0], [gained], [lost], asked), Pair([0], [lost], [gained], asked)
    low, high = one.interval
    assert low < one.difference < high
    assert other.interval == pytest.approx((-high, -low))
    assert other.p == pytest.approx(one.p)
    assert low >= -1
    assert high <= 1


def test_without_a_single_disagreement_the_interval_is_not_empty():
    low, high = Pair([0], [0], [0], 10_000).interval
    assert -6e-4 < low < -4e-4 < 4e-4 < high < 6e-4


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=40))
def test_gained_and_lost_add_up_to_the_difference_of_the_right_answers(rows):
    answers, others, targets = (list(column) for column in zip(*rows, strict=True))
    found = pair([answers], [others], targets)
    right = [sum(a == t for a, t in zip(x, targets, strict=True)) for x in (answers, others)]
    assert found.gained[0] - found.lost[0] == right[0] - right[1]
    assert found.differ[0] == sum(a != b for a, b in zip(answers, others, strict=True))
    assert found.gained[0] + found.lost[0] <= found.differ[0]


def test_over_the_seeds_it_is_students_test():
    p, (low, high) = Pair([0] * 3, [0, 1, 2], [18, 3, 18], 10_000).over_seeds
    # Differences -18, -2, -16: mean -12, deviation 8.718; t = -2.384 with 2 degrees of freedom.
    assert p == pytest.approx(0.1399, abs=1e-3)
    assert (low, high) == pytest.approx((-33.66e-4, 9.66e-4), abs=1e-5)


def test_over_one_seed_there_is_no_test_and_without_a_spread_no_division():
    assert Pair([0], [3], [1], 360).over_seeds is None
    assert Pair([0, 0], [1, 1], [1, 1], 360).over_seeds == (1.0, (0.0, 0.0))
    assert Pair([0, 0], [2, 2], [1, 1], 360).over_seeds == (0.0, (1 / 360, 1 / 360))


def test_the_spread_is_between_seeds():
    assert spread([1.0]) is None
    assert spread([1.0, 3.0]) == pytest.approx(math.sqrt(2))
