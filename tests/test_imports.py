"""The arrows between the rooms: which module may import which, also those inside functions."""

from __future__ import annotations

import re

import pytest

from scripts import measure_house

#: Each room may import from itself and from the rooms before it.
ROOMS = (
    "jacobian",
    "surroundings",
    "autocast",
    "checks",
    "nested last_layer.checks",
    "kernels",
    "apply node",
    "sharded",
    "softmax",
    "row reduction",
    "cross_entropy",
    "last_layer",
    "linear_cross_entropy",
    "modules",
    "derivatives exporters",
    "fuse",
    "testing",
)
#: Within kernels/: each device has a door, and the doors know nothing of each other but for the
#: fallback to plain ATen.
KERNELS = (
    "problem warning plain built expect",
    "labels operators",
    "eager",
    "cpu",
    "cuda",
)


def graph() -> dict[str, set[str]]:
    return measure_house.imports(measure_house.python_files())


def floor_of(module: str, rooms: tuple[str, ...]) -> tuple[int, str]:
    """The floor of the longest entry that the module's name begins with."""
    entries = [
        (len(name), floor, name) for floor, names in enumerate(rooms) for name in names.split()
    ]
    found = [e for e in entries if module == e[2] or module.startswith(e[2] + ".")]
    assert found, f"{module} has no room"
    _, floor, name = max(found)
    return floor, name


def upward(prefix: str, rooms: tuple[str, ...]) -> list[str]:
    arrows = []
    for module, imported in graph().items():
        if not module.startswith(prefix + "."):
            continue
        floor, room = floor_of(module.removeprefix(prefix + "."), rooms)
        for other in imported:
            if not other.startswith(prefix + "."):
                continue
            its_floor, its_room = floor_of(other.removeprefix(prefix + "."), rooms)
            if its_floor > floor or (its_floor == floor and room != its_room):
                arrows.append(f"{module} imports {other}")
    return arrows


def test_arrows_between_the_rooms_point_down():
    assert upward("custom_ops", ROOMS) == []


def test_arrows_between_the_doors_of_the_kernels_point_down():
    assert upward("custom_ops.kernels", KERNELS) == []


def test_there_is_no_circle():
    assert measure_house.components(graph()) == []


def test_the_literal_mathematics_imports_nothing_of_ours():
    assert graph()["custom_ops.jacobian"] == set()


def test_nothing_imports_the_rooms_around_the_package():
    outside = re.compile(r"^\s*(?:from|import) (training|lesson|benchmarks|scripts|tests)\b", re.M)
    for path in measure_house.python_files():
        assert not outside.search(path.read_text()), path


def test_private_names_of_torch_stand_in_one_file():
    assert measure_house.private_names(measure_house.python_files()) == 0


def test_a_circle_and_a_private_name_would_be_seen(tmp_path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "custom_ops"
    package.mkdir()
    (package / "a.py").write_text("from custom_ops import b\n")
    (package / "b.py").write_text(
        "def f():\n    from custom_ops.a import x\n    torch._C._get(x)\n"
    )
    monkeypatch.setattr(measure_house, "ROOT", tmp_path)
    files = sorted(package.glob("*.py"))
    assert len(measure_house.components(measure_house.imports(files))) == 1
    assert measure_house.private_names(files) == 1
