"""The tables of figures in docs/, and the pictures beside them, from the reports in docs/.

`benchmark.json` is that of `make bench`, `options.json` that of `scripts/options_cost.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.contestants import BUILTIN, COMPILED, IN_PLACE, OURS
from benchmarks.last_layer import CHUNKED, FLOOR, HVP
from benchmarks.plan import KEPT_HEAP

DOCS = Path(__file__).parents[2] / "docs"

Report = dict[str, Any]


def read(name: str) -> Report:
    """Return a report whose figures the pages have."""
    return json.loads((DOCS / f"{name}.json").read_text())


def pages() -> dict[Path, str]:
    """Return the pages with figures, their tables made anew."""
    made = {
        "performance.md": _of_benchmark(read("benchmark")),
        "options.md": {
            "options": [*_options(read("options")), "", _where(read("options")["environment"])]
        },
    }
    return {
        DOCS / name: _written((DOCS / name).read_text(), tables) for name, tables in made.items()
    }


def _of_benchmark(report: Report) -> dict[str, list[str]]:
    return {
        "where": [_where(report["environment"])],
        "speed": _speed(report["rows"]),
        "kept heap": _speed(report.get(KEPT_HEAP, [])),
        "memory": _memory(report["memory"]),
        "last layer": _last_layer(report["last layer"]),
        "last layer memory": _memory(report["last layer memory"]),
    }


def _written(page: str, tables: dict[str, list[str]]) -> str:
    """Return the page with what stands between its comments replaced."""
    for name, lines in tables.items():
        before, opening, rest = page.partition(f"<!-- {name} -->\n")
        _, closing, after = rest.partition(f"<!-- /{name} -->")
        page = "".join([before, opening, *(f"{line}\n" for line in lines), closing, after])
    return page


def _where(e: Report) -> str:
    threads = "one thread" if e["threads"] == 1 else f"{e['threads']} threads"
    return (
        f"{e['machine']}, {e['cores']} cores, {threads}, {e['vectors']}, torch {e['torch']}, "
        f"{e['date'][:10]}."
    )


def _speed(rows: Iterable[Report]) -> list[str]:
    head = ("", "built-in", "compiled", "ours", "over built-in / compiled")
    lines = _table((*head, "in place", "over built-in / compiled"))
    for row in rows:
        cells = [f"{row['op']} {_readable(row['size'])}"]
        cells += [_seconds(row["seconds"][name]["median"]) for name in (BUILTIN, COMPILED)]
        for name in (OURS, IN_PLACE):
            found = row["ratios"].get(name)
            if found is None:
                cells += ["–", "–"]
                continue
            over = (_ratio(found[f"over {whom}"]) for whom in (BUILTIN, COMPILED))
            cells += [_seconds(row["seconds"][name]["median"]), " / ".join(over)]
        lines.append(_line(cells))
    return lines


def _memory(entries: list[Report]) -> list[str]:
    (entry,) = entries
    names = {BUILTIN: "built-in", OURS: "ours", IN_PLACE: "in place", HVP: "Hessian-vector product"}
    there = [name for name in names if name in entry["ratios"]]
    op, size = entry["name"].split(" ", 1)
    cells = [f"{op} {_readable(size)}"]
    cells += [f"{entry['ratios'][name]['MiB']:.4g} MiB" for name in there]
    return [*_table(["", *(names[name] for name in there)]), _line(cells)]


def _last_layer(rows: Iterable[Report]) -> list[str]:
    lines = _table(("N, D, classes", "three products", "torch", "torch, chunked", "ours"))
    for row in rows:
        cells = [row["size"], _seconds(row["seconds"][FLOOR]["median"])]
        for name in (BUILTIN, CHUNKED, OURS):
            found = row["ratios"].get(name)
            cells.append("–" if found is None else f"{found['floors']:.2f}")
        lines.append(_line(cells))
    return lines


def _options(report: Report) -> list[str]:
    lines = _table(("", "time", "memory"))
    for option in report["options"]:
        memory = option["bytes"] / report["logits_bytes"]
        name = option["name"]
        words = name if " " not in name and "=" not in name else f"`{name}`"
        lines.append(_line((words, f"{option['time']:.1f}", f"{memory:.2f}")))
    return lines


def _table(head: Iterable[str]) -> list[str]:
    head = list(head)
    return [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _readable(size: str) -> str:
    """Return the size as it is read, float32 left out."""
    return size.replace("x", " × ").removesuffix(" float32").replace(" float32 ", " ")


def _seconds(seconds: float) -> str:
    scale, unit = (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{scale * seconds:.3g} {unit}"


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 2 else f"{value:.2f}"


def main() -> None:
    """Write pages and pictures."""
    from benchmarks import figure

    for page, text in pages().items():
        page.write_text(text)
        print(page)
    for picture in figure.save(read("benchmark"), DOCS):
        print(picture)
