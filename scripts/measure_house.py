#!/usr/bin/env python
"""Measure the house: how wide its borders are, how long its files, and where its arrows point.

One table of counts, taken from the sources alone. "Ops" is the package without the battery
(testing/) and the lazy head (fuse/), which stand beside it and are measured by the same rules.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "custom_ops"
BESIDE = ("testing", "fuse")
ONE_NAME = re.compile(r"^\s+\*{0,2}\w+(: [^=()]+)?( = [^()]+)?,$|^\s+(\w+)=(?:self\.)?\3,$")
OPTION = "z_loss"


def main() -> None:
    """Print the table."""
    from rich import box  # here, as tests that count do without it
    from rich.console import Console
    from rich.table import Table

    sources = [*python_files(), *cpp_files()]
    ops = [p for p in sources if p.relative_to(PACKAGE).parts[0] not in BESIDE]
    table = Table(box=box.SIMPLE_HEAD, title="the house")
    table.add_column("")
    table.add_column("ops", justify="right")
    table.add_column("whole package", justify="right")
    for name, measure in MEASURES.items():
        table.add_row(name, str(measure(ops)), str(measure(sources)))
    Console(width=80).print(table)


def python_files() -> list[Path]:
    """Return the package's modules."""
    return sorted(PACKAGE.rglob("*.py"))


def cpp_files() -> list[Path]:
    """Return the package's C++ sources."""
    return sorted([*PACKAGE.rglob("*.h"), *PACKAGE.rglob("*.cpp")])


def lines_of(paths: list[Path]) -> int:
    """Return how many lines the files have."""
    return sum(len(p.read_text().splitlines()) for p in paths)


def one_name_share(paths: list[Path]) -> str:
    """Return the share of Python lines that hold one parameter's name."""
    lines = [line for p in paths if p.suffix == ".py" for line in p.read_text().splitlines()]
    return f"{sum(bool(ONE_NAME.match(line)) for line in lines) / len(lines):.1%}"


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    """Yield the functions of a module, methods too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def is_triton(f: ast.FunctionDef) -> bool:
    """Whether a function is compiled by Triton."""
    return any("triton.jit" in ast.unparse(d) for d in f.decorator_list)


def width(f: ast.FunctionDef) -> int:
    """Return how many arguments a function names, `self` and `ctx` apart."""
    a = f.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls", "ctx")])


PUBLIC = ("cross_entropy.py", "linear_cross_entropy.py", "softmax.py", "modules.py")


def is_public(path: Path, f: ast.FunctionDef) -> bool:
    """Whether a function's signature is torch's, and not ours to choose."""
    named = f.name == "__init__" or not f.name.startswith("_")
    return path.parent == PACKAGE and path.name in PUBLIC and named


def widest(paths: list[Path], triton: bool) -> str:
    """Return the widest signature that is not public."""
    found = [
        (width(f), f"{p.stem}.{f.name}")
        for p in paths
        if p.suffix == ".py"
        for f in functions(p)
        if is_triton(f) == triton and not is_public(p, f)
    ]
    return "{} {}".format(*max(found, default=(0, "")))


def widest_cpp(paths: list[Path]) -> str:
    """Return the widest signature of a function in C++."""
    found = [(0, "")]
    head = re.compile(r"^(?:[\w:<>,&* ]+ )?(\w+)\(([^;{}]*?)\)(?: const)? \{", re.M)
    for path in paths:
        if path.suffix != ".py":
            for name, arguments in head.findall(path.read_text()):
                plain = re.sub(r"<[^<>]*>", "", re.sub(r"<[^<>]*>", "", arguments))
                found.append((plain.count(",") + bool(plain.strip()), f"{path.name}: {name}"))
    return "{} {}".format(*max(found))


def declarations(paths: list[Path]) -> int:
    """Return in how many places the option is declared: a parameter, a field, an attribute."""
    count = 0
    for path in paths:
        text = path.read_text()
        if path.suffix != ".py":
            count += len(
                re.findall(rf"double [\w, ]*\b{OPTION}\b|handle [\w, ]*\b{OPTION}\b", text)
            )
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.arg):
                count += node.arg == OPTION
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                count += any(ast.unparse(t).rpartition(".")[2] == OPTION for t in targets)
    return count


def files_of_the_option(paths: list[Path]) -> int:
    """Return how many files name the option at all."""
    return sum(bool(re.search(rf"\b{OPTION}\b", p.read_text())) for p in paths)


def largest(paths: list[Path]) -> str:
    """Return the largest file."""
    count, name = max((len(p.read_text().splitlines()), p.name) for p in paths)
    return f"{count} {name}"


def longest_body(paths: list[Path]) -> str:
    """Return the longest body of a Python function, its docstring left out."""
    found = []
    for path in paths:
        if path.suffix == ".py":
            for f in functions(path):
                body = f.body[1:] if ast.get_docstring(f) and len(f.body) > 1 else f.body
                length = (body[-1].end_lineno or 0) - body[0].lineno + 1
                found.append((length, f"{path.stem}.{f.name}"))
    return "{} {}".format(*max(found))


def private_names(paths: list[Path]) -> int:
    """Return how many files beside surroundings.py touch a private name of torch."""
    private = re.compile(r"\btorch(\.\w+)*\._(?!_)\w+|from torch(\.\w+)*\._\w|\.ops\.aten\._\w")
    return sum(
        bool(private.search(p.read_text()))
        for p in paths
        if p.suffix == ".py" and p.name != "surroundings.py" and "testing" not in p.parts
    )


def circles(paths: list[Path]) -> int:
    """Return how many circles the imports make, those inside functions too."""
    return len(components(imports(paths)))


def imports(paths: list[Path]) -> dict[str, set[str]]:
    """Return what each module imports of this package."""
    names = {module_name(p) for p in paths if p.suffix == ".py"}
    graph: dict[str, set[str]] = {}
    for path in paths:
        if path.suffix == ".py":
            found = graph.setdefault(module_name(path), set())
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "custom_ops"
                ):
                    of_parts = {f"{node.module}.{a.name}" for a in node.names} & names
                    found |= of_parts or ({node.module or ""} & names)
            found.discard(module_name(path))
    return graph


def module_name(path: Path) -> str:
    """Return a module's dotted name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def components(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that import each other, directly or through others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph.get(start, ()))
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph.get(name, ())
        return seen

    reach = {name: reached(name) for name in graph}
    found: list[set[str]] = []
    for name in graph:
        circle = {other for other in reach[name] if name in reach.get(other, ())}
        if circle and circle not in found:
            found.append(circle)
    return found


def tests_over_source(paths: list[Path]) -> str:
    """Return the lines of the tests over those of the package."""
    return f"{lines_of(sorted((ROOT / 'tests').rglob('*.py'))) / lines_of(paths):.2f}"


MEASURES = {
    "lines": lines_of,
    "Python lines that are one name": one_name_share,
    "widest signature, Python": lambda paths: widest(paths, False),
    "widest signature, Triton": lambda paths: widest(paths, True),
    "widest signature, C++": widest_cpp,
    f"places that declare {OPTION}": declarations,
    f"files that name {OPTION}": files_of_the_option,
    "largest file": largest,
    "longest body": longest_body,
    "circles": circles,
    "files with private names of torch": private_names,
    "test lines over source lines": tests_over_source,
}

if __name__ == "__main__":
    main()
