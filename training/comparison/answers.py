"""Whether heads answer differently: paired, as they were asked the same questions.

Two questions, and two tests. *Do these networks answer differently?* Only the targets that one has
right and the other wrong tell them apart. If neither is the better one, each of these falls to
either side with probability 1/2: McNemar's test, here exact, with the binomial distribution (Q.
McNemar, Psychometrika 12, 1947). The interval for the difference of the accuracies combines exact
ones (C. J. Clopper and E. S. Pearson, Biometrika 26, 1934) for the two shares, each at 97.5 %, so
that both hold, and with them the difference, in at least 95 % of experiments; it has a width also
where no answer differs.

*Is it the head?* Training amplifies a rounding, so that two networks of one seed can differ
although their heads do not; the images then have all their differences from one draw. Another draw
takes another seed: Student's test and interval for the mean of the seeds' differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import binomtest, ttest_1samp  # type: ignore[import-untyped]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Pair:
    """One head beside another on the same targets, over seeds.

    Of each seed: `differ` counts the answers that are not the same, `gained` what it alone has
    right, `lost` what the other alone has right.

    >>> pair = Pair(differ=[3, 1], gained=[2, 0], lost=[0, 1], asked=360)
    >>> pair.difference, pair.p
    (0.001388888888888889, 1.0)
    """

    differ: list[int]
    gained: list[int]
    lost: list[int]
    asked: int

    @property
    def difference(self) -> float:
        """The mean difference of the accuracies."""
        return (sum(self.gained) - sum(self.lost)) / self._pairs

    @property
    def p(self) -> float:
        """How probable a split at least as uneven is, if neither is the better one; two-sided."""
        decided = sum(self.gained) + sum(self.lost)
        return float(binomtest(sum(self.gained), decided).pvalue) if decided else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """The interval for the difference, of a confidence of `CONFIDENCE` or more."""
        gained, lost = (_interval(sum(n), self._pairs) for n in (self.gained, self.lost))
        return gained[0] - lost[1], gained[1] - lost[0]

    @property
    def spread(self) -> float | None:
        """The standard deviation of the difference between seeds; None of one seed."""
        return spread(self._by_seed)

    @property
    def over_seeds(self) -> tuple[float, tuple[float, float]] | None:
        """Student's p for a mean of 0 and the interval for the mean; None of one seed."""
        by_seed = self._by_seed
        if len(by_seed) < 2:
            return None
        if len(set(by_seed)) == 1:  # no spread to divide by
            return float(by_seed[0] == 0), (by_seed[0], by_seed[0])
        found = ttest_1samp(by_seed, 0)
        interval = found.confidence_interval(CONFIDENCE)
        return float(found.pvalue), (float(interval.low), float(interval.high))

    @property
    def _by_seed(self) -> list[float]:
        return [(g - n) / self.asked for g, n in zip(self.gained, self.lost, strict=True)]

    @property
    def _pairs(self) -> int:
        return self.asked * len(self.gained)


def pair(
    answers: Sequence[Sequence[int]], others: Sequence[Sequence[int]], targets: Sequence[int]
) -> Pair:
    """Return how `answers` compare with `others`; each is a list of classes for each seed."""
    counts = [
        (
            sum(a != b for a, b in zip(one, other, strict=True)),
            sum(a == t != b for a, b, t in zip(one, other, targets, strict=True)),
            sum(b == t != a for a, b, t in zip(one, other, targets, strict=True)),
        )
        for one, other in zip(answers, others, strict=True)
    ]
    differ, gained, lost = map(list, zip(*counts, strict=True))
    return Pair(differ, gained, lost, len(targets))


def right(answers: Sequence[int], targets: Sequence[int]) -> int:
    """Return how many answers are right."""
    return sum(a == t for a, t in zip(answers, targets, strict=True))


def by_class(
    answers: Sequence[Sequence[int]], targets: Sequence[int]
) -> dict[int, tuple[float, int]]:
    """Return, of each class, the share answered rightly over the seeds, and its targets."""
    shares = {}
    for c in sorted(set(targets)):
        places = [i for i, t in enumerate(targets) if t == c]
        shares[c] = (mean(seed[i] == c for seed in answers for i in places), len(places))
    return shares


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation between seeds; None of one seed."""
    return stdev(values) if len(values) > 1 else None


def _interval(count: int, of: int) -> tuple[float, float]:
    found = binomtest(count, of).proportion_ci((1 + CONFIDENCE) / 2, method="exact")
    return float(found.low), float(found.high)
