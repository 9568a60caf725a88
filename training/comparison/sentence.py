"""What the report says, in words: its last sentence, and the title of the picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from training.comparison.quantities import duration, size

#: Of all the tests of a report together: each of k has the k-th part of it (Bonferroni).
SIGNIFICANCE = 0.05


def sentence(report: dict[str, Any]) -> str:
    """Return the report in one sentence."""
    broken = _not_finite(report)
    if broken:
        return f"{broken}: its differences count the finite values alone, and prove nothing."
    if report["answers"]["beside_first"] and _tested(report):
        return f"{_answers(report)}; {_gradients(report)}; {_fastest(report)}."
    return f"{_losses(report)}; {_gradients(report)}; {_costs(report)}."


def title(report: dict[str, Any]) -> str:
    """Return the message of the picture."""
    broken = _not_finite(report)
    if broken:
        return broken
    if not _tested(report):
        return f"One loss curve; last layer and loss {_shares(report)}"
    better = _significant(report)
    if better:
        return _otherwise(better, report)
    answers = report["answers"]
    apart = _apart(_pairs(report).values())
    others = []
    if report["yardstick"]:
        exact = _apart([answers["beside_first"][report["yardstick"]]])
        others.append(f"{_first(report)}'s exact answer {exact or 'none'}")
    spread = answers["spread"][_first(report)]
    if spread is not None:
        others.append(f"another seed {spread:.1f}")
    answers_apart = f"{apart} right answer{'s' * (apart > 1)}"
    most = f"at most {answers_apart}" if apart else "no right answer"
    message = f"Another head changes {most} of {answers['asked']}"
    return f"{message}; {', '.join(others)}" if others else message


def _answers(report: dict[str, Any]) -> str:
    answers, pairs, first = report["answers"], _pairs(report), _first(report)
    seeds = len(answers["right"][first])
    asked = f"{answers['asked']} {report['settings']['unit']}"
    over = f"over {seeds} seeds of {asked}" if seeds > 1 else f"on {asked}"
    better = _significant(report)
    none = f"No head is seen to answer otherwise than {first}"
    verdict = _otherwise(better, report) if better else none
    differ = [sum(pair["differ"]) for pair in pairs.values()]
    if any(differ):
        gains = _and([f"{sum(_gains(pair)):+d}" for pair in pairs.values()])
        found = f"change the right answers by {gains}"
    else:
        found = "give its answer every time"
    beside = []
    if report["yardstick"]:
        exact = answers["beside_first"][report["yardstick"]]
        beside.append(f"its own exact answer changes them by {sum(_gains(exact)):+d}")
    spread = answers["spread"][first]
    if spread is not None:
        beside.append(f"another seed changes {spread:.1f} of {asked}")
    where = f", where {' and '.join(beside)}" if beside else ""
    return f"{verdict}: {over}, {_and(list(pairs))} {found}{where} ({_tests(report)})"


def _tests(report: dict[str, Any]) -> str:
    """The least p of all heads, of each test."""
    pairs = _pairs(report).values()
    networks = f"McNemar's test of these networks: {_p([pair['p'] for pair in pairs])}"
    if any(pair["over_seeds"] is None for pair in pairs):
        return f"{networks}; one seed cannot tell a head from its rounding"
    over_seeds = _p([pair["over_seeds"]["p"] for pair in pairs])
    return f"Student's test over the seeds: {over_seeds}; {networks}"


def _p(values: list[float]) -> str:
    least = min(values)
    return f"p = {least:.2g}" + (" or more" if least < max(values) else "")


def _otherwise(names: list[str], report: dict[str, Any]) -> str:
    verb = "answers" if len(names) == 1 else "answer"
    return f"{_and(names)} {verb} otherwise than {_first(report)}, and not by chance"


def _losses(report: dict[str, Any]) -> str:
    heads = report["heads"]
    losses = _and([f"{head['test_loss']:.4f}" for head in heads.values()])
    return f"{_and(list(heads))} follow one curve, to test losses of {losses}"


def _gradients(report: dict[str, Any]) -> str:
    same = {name: report["differences"][name]["same_weights"] for name in _others(report)}
    worst = max(found["roundings"] or 0.0 for found in same.values())
    yardstick = report["yardstick"]
    if yardstick is None:
        beside = ""
    else:
        exact = report["differences"][yardstick]["same_weights"]["roundings"]
        beside = f", where its own exact answer is {exact:.1f} away"
    return (
        f"at the same weights every gradient agrees with {_first(report)}'s to "
        f"{_digits(worst * report['rounding']['eps'])} of its largest entry ({worst:.1f} "
        f"roundings of {report['rounding']['dtype']}{beside})"
    )


def _digits(difference: float) -> str:
    """Say to how many digits two numbers agree whose difference is this part of the larger.

    >>> _digits(1.5e-7), _digits(0.0)
    ('6.8 digits', 'the last bit')
    """
    return f"{-math.log10(difference):.1f} digits" if difference else "the last bit"


def _fastest(report: dict[str, Any]) -> str:
    heads = report["heads"]
    name = min(heads, key=lambda head: heads[head]["head_us"])
    first = _first(report)
    if name == first:
        return f"no head's last layer and loss are faster than {first}'s"
    ours, theirs = (duration(1e-6 * heads[head]["head_us"]) for head in (name, first))
    return f"last layer and loss are fastest in {name}, {ours} for {first}'s {theirs}"


def _costs(report: dict[str, Any]) -> str:
    heads = report["heads"]
    (first, *_, last) = heads.values()
    memory = f"{size(last['head_peak_bytes'])} instead of {size(first['head_peak_bytes'])}"
    time = f"{duration(1e-6 * last['head_us'])} instead of {duration(1e-6 * first['head_us'])}"
    return f"last layer and loss take {memory}, {time}"


def _shares(report: dict[str, Any]) -> str:
    """What the last head takes of what the first one does."""
    first, *_, last = report["heads"].values()
    memory, time = (last[of] / first[of] for of in ("head_peak_bytes", "head_us"))
    return f"in {memory:.0%} of the memory and {time:.0%} of the time"


def _not_finite(report: dict[str, Any]) -> str | None:
    """Which heads gave values that are not finite, and how often."""
    found = []
    for name, counts in report["not_finite"].items():
        steps = max(counts["loss"], counts["gradients"])
        probes = max(counts["probe_loss"], counts["probe_gradients"])
        places = [f"{steps} of {counts['steps']} steps"] if steps else []
        places += [f"{probes} of {counts['probes']} probes"] if probes else []
        if places:
            found.append(f"{name} is not finite at {_and(places)}")
    lost = [name for name, head in report["heads"].items() if head["test_loss"] is None]
    found += [f"{_and(lost)} has no finite test loss"] if lost and not found else []
    return "; ".join(found) or None


def _significant(report: dict[str, Any]) -> list[str]:
    """The heads whose networks answer otherwise, and on other seeds would again."""
    pairs = _pairs(report)
    level = SIGNIFICANCE / len(pairs)
    return [
        name
        for name, pair in pairs.items()
        if pair["p"] < level and pair["over_seeds"] and pair["over_seeds"]["p"] < level
    ]


def _tested(report: dict[str, Any]) -> bool:
    return all(pair["p"] is not None for pair in _pairs(report).values())


def _pairs(report: dict[str, Any]) -> dict[str, Any]:
    beside_first = report["answers"]["beside_first"]
    return {name: beside_first[name] for name in _others(report)}


def _apart(pairs: Iterable[dict[str, Any]]) -> int:
    """By how many right answers two networks of one seed differ at most."""
    return max(max(map(abs, _gains(pair))) for pair in pairs)


def _gains(pair: dict[str, Any]) -> list[int]:
    return [gained - lost for gained, lost in zip(pair["gained"], pair["lost"], strict=True)]


def _first(report: dict[str, Any]) -> str:
    return next(iter(report["heads"]))


def _others(report: dict[str, Any]) -> list[str]:
    return list(report["heads"])[1:]


def _and(words: list[str]) -> str:
    """Return words as a list in a sentence.

    >>> _and(["a", "b", "c"]), _and(["a"])
    ('a, b and c', 'a')
    """
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
