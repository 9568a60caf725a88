"""What the report says, in words: its last sentence, and the title of the picture."""

from __future__ import annotations

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
        return f"{_answers(report)}; {_gradients(report)}."
    return f"{_losses(report)}; {_gradients(report)}; {_costs(report)}."


def title(report: dict[str, Any]) -> str:
    """Return the message of the picture."""
    broken = _not_finite(report)
    if broken:
        return broken
    if not _tested(report):
        return f"One loss curve; {_costs(report)}"
    better = _significant(report)
    if better:
        return _otherwise(better, report)
    answers = report["answers"]
    apart = max(max(map(abs, _gains(pair))) for pair in _pairs(report).values())
    spread = answers["spread"][_first(report)]
    unit = report["settings"]["unit"]
    seeds = "" if spread is None else f", another seed {spread:.1f}"
    return (
        f"Another head changes {f'at most {apart}' if apart else 'none'} of the right answers to "
        f"{answers['asked']} test {unit}{seeds}"
    )


def _answers(report: dict[str, Any]) -> str:
    answers, pairs, first = report["answers"], _pairs(report), _first(report)
    seeds = len(answers["right"][first])
    asked = f"{answers['asked']} {report['settings']['unit']}"
    over = f"over {seeds} seeds of {asked}" if seeds > 1 else f"on {asked}"
    p = min(pair["p"] for pair in pairs.values())
    better = _significant(report)
    none = f"No head answers otherwise than {first} beyond chance"
    verdict = _otherwise(better, report) if better else none
    differ = [sum(pair["differ"]) for pair in pairs.values()]
    gains = [f"{sum(_gains(pair)):+d}" for pair in pairs.values()]
    if any(differ):
        found = (
            f"give another answer {_and(list(map(str, differ)))} times, which changes the right "
            f"ones by {_and(gains)} (exact test: p = {p:.2f} or more)"
        )
    else:
        found = f"give its answer every time (exact test: p = {p:.2f})"
    spread = answers["spread"][first]
    seed = "" if spread is None else f", where another seed changes {spread:.1f} of {asked}"
    return f"{verdict}: {over}, {_and(list(pairs))} {found}{seed}"


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
        f"at the same weights no gradient is further from {_first(report)}'s than {worst:.1f} "
        f"roundings ({report['rounding']['dtype']}){beside}"
    )


def _costs(report: dict[str, Any]) -> str:
    heads = report["heads"]
    (first, *_, last) = heads.values()
    memory = f"{size(last['head_peak_bytes'])} instead of {size(first['head_peak_bytes'])}"
    time = f"{duration(1e-6 * last['head_us'])} instead of {duration(1e-6 * first['head_us'])}"
    return f"last layer and loss take {memory}, {time}"


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
    pairs = _pairs(report)
    return [name for name, pair in pairs.items() if pair["p"] < SIGNIFICANCE / len(pairs)]


def _tested(report: dict[str, Any]) -> bool:
    return all(pair["p"] is not None for pair in _pairs(report).values())


def _pairs(report: dict[str, Any]) -> dict[str, Any]:
    beside_first = report["answers"]["beside_first"]
    return {name: beside_first[name] for name in _others(report)}


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
