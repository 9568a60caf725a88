"""The node's launches beside Triton's: the same kernels, with the same parameters to the byte.

A driver that launches nothing writes down what it is handed, in a process of its own, where the
compiled kernels are called on CPU tensors (`launches/`); and on tensors of two devices that are not
there, in host memory.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from custom_ops.kernels import cpu, cuda

pytestmark = [
    pytest.mark.skipif(cuda.interpreted, reason="TRITON_INTERPRET=1: nothing is compiled"),
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(cpu.library is None, reason=f"no C++ node: {cpu.missing}"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler"),
]
HERE = Path(__file__).parent / "launches"


class Launch(NamedTuple):
    """A line of the driver's log."""

    by: str
    kernel: str  #: its name and its handle
    where: list[str]  #: grid, threads, shared memory, stream and the number of attributes
    parameters: list[str]

    @staticmethod
    def of(line: str) -> "Launch":
        by, name, handle, grid, threads, shared, stream, attributes, *parameters = line.split(" ")
        where = [grid, threads, shared, stream, attributes]
        return Launch(by, f"{name} {handle}", where, parameters)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the driver in it."""
    folder = tmp_path_factory.mktemp("driver")
    driver = ("-shared", "-fPIC", "-w", "-o", folder / "libcuda.so.1", HERE / "driver.c")
    subprocess.run(["gcc", *driver], check=True)
    return folder


def printed(folder: Path, *command: str | Path) -> list[dict]:
    """What a script prints, a line each, in a process of its own with the driver."""
    paths = {"LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder, "LAUNCHES": folder / "log"}
    environment = os.environ | {name: str(path) for name, path in paths.items()}
    run = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def calls(folder: Path) -> dict[str, list[dict]]:
    return {call["name"]: call["runs"] for call in printed(folder, HERE / "calls.py")}


def addresses(first: list[Launch], again: list[Launch]) -> Iterator[tuple[int, int]]:
    """Yield the parameters that differ, which must be addresses of memory."""
    for a, b in zip(first, again, strict=True):
        for x, y in zip(a.parameters, b.parameters, strict=True):
            if x != y:
                assert len(x) == len(y) == 16, (a, b)
                yield int(x, 16), int(y, 16)


NAMES = (
    *(
        "mnist",
        "a sum",
        "a loss a row",
        "statistics",
        "one row",
        "one class",
        "float64",
        "bfloat16 in chunks",
    ),
    "labels, smoothed and weighted",
    *("probabilities and a weight", "a normalizer", "pixels", "rows apart", "off by a number"),
    *("softmax", "softmax of odd rows", "log-softmax in chunks"),
)
KNOWN = ("softmax along itself", "softmax once more")  # whose kind is that of "softmax"


@pytest.mark.parametrize("name", NAMES)
def test_the_node_hands_over_what_triton_does(calls, name):
    runs = calls[name]
    first, *later = [[Launch.of(line) for line in run["launches"]] for run in runs]
    assert {launch.by for launch in first} == {"Triton"}
    for run, again in zip(runs[1:], later, strict=True):
        assert "custom_ops" in run["node"]
        assert {launch.by for launch in again} == {"node"}
        assert [x.kernel for x in again] == [x.kernel for x in first]
        assert [x.where for x in again] == [x.where for x in first]
        # what was at one address is at one other, and the tensors of the call where they lie
        moved = list(addresses(first, again))
        assert moved
        there, back = dict(moved), {b: a for a, b in moved}
        assert len(there) == len(back) == len(set(moved))
        used = {int(p, 16) for launch in first for p in launch.parameters}
        for a, b in zip(runs[0]["addresses"], run["addresses"], strict=True):
            assert there.get(a, a) == b or a not in used


def test_every_call_is_looked_at(calls):
    assert set(calls) == {*NAMES, *KNOWN, "a bad label"}


def test_two_tensors_at_one_address_are_left_to_triton(calls):
    """A recording could not tell them apart; one that is there is used for two addresses alone."""
    itself, once_more = (
        [[Launch.of(line).by for line in run["launches"]] for run in calls[name]] for name in KNOWN
    )
    assert itself == [["node", "Triton"]] * 3
    assert once_more == [["node", "node"]] * 3


def test_a_bad_label_of_an_earlier_call_is_told_before_anything_is_launched(calls):
    told, launched = calls["a bad label"]
    assert "out of range" in told
    assert launched == []


# Streams, devices and threads.


@pytest.fixture(scope="module")
def on_devices(folder: Path) -> list[dict]:
    """What devices.py prints; building its two devices takes a quarter of a minute."""
    compiler, library = shutil.which("g++"), folder / "fake_device.so"
    if compiler is None:
        pytest.skip("no C++ compiler")
    torchs = Path(torch.__file__).parent / "lib"
    includes = (*include_paths(), sysconfig.get_paths()["include"])
    subprocess.run(
        [
            *(
                compiler,
                "-shared",
                "-fPIC",
                "-std=c++20",
                "-w",
                "-DTORCH_EXTENSION_NAME=fake_device",
            ),
            *(f"-I{path}" for path in includes),
            *("-o", library, HERE / "device.cpp", f"-L{torchs}", f"-Wl,-rpath,{torchs}"),
            *("-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"),
        ],
        check=True,
    )
    return printed(folder, HERE / "devices.py", library)


def test_a_call_is_launched_on_its_tensors_device_and_on_the_current_stream_there(on_devices):
    by_device: dict[int, list[tuple[str, list[Launch]]]] = {0: [], 1: []}
    for call in on_devices:
        if call["name"] != "in turns":
            continue
        launches = [Launch.of(line) for line in call["launches"]]
        assert {launch.where[3] for launch in launches} == {hex(call["stream"])}
        by_device[call["device"]].append(([launch.by for launch in launches], launches))
    kernels = []
    for found in by_device.values():
        (first, by_triton), *later = found
        assert set(first) == {"Triton"}
        assert len(later) == 5
        for by, launches in later:
            assert set(by) == {"node"}
            assert [x.kernel for x in launches] == [x.kernel for x in by_triton]
        kernels.append({launch.kernel for launch in by_triton})
    # the same code, loaded on each of them
    assert {k.split()[0] for k in kernels[0]} == {k.split()[0] for k in kernels[1]}
    assert not kernels[0] & kernels[1]


def test_each_thread_launches_on_its_own_stream(on_devices):
    (threads,) = (call for call in on_devices if call["name"] == "threads")
    on_stream: dict[str, list[Launch]] = {}
    for line in threads["launches"]:
        launch = Launch.of(line)
        on_stream.setdefault(launch.where[3], []).append(launch)
    assert set(on_stream) == {"0x1010", "0x2011", "0x1012", "0x2013"}
    one_step = [launch.kernel.split()[0] for launch in on_stream["0x1010"][:5]]
    for launches in on_stream.values():  # twenty steps each, in order
        assert [launch.kernel.split()[0] for launch in launches] == one_step * 20


@pytest.mark.parametrize("options", ["plain", "all"])
def test_what_the_last_layer_calls_is_launched_the_same_way(on_devices, options):
    (runs,) = (call["runs"] for call in on_devices if call.get("options") == options)
    for name in runs[0]:
        first, *later = [[Launch.of(line) for line in run[name]] for run in runs]
        assert {launch.by for launch in first} == {"Triton"}, name
        for again in later:
            assert {launch.by for launch in again} == {"node"}, name
            assert [x.kernel for x in again] == [x.kernel for x in first]
            assert [x.where for x in again] == [x.where for x in first]
            assert list(addresses(first, again))
    # a label is written down once: not by the parts of labels that were looked at together
    record = [launch.parameters for run in runs for launch in map(Launch.of, run["rows"])]
    without = runs[0]["rows of labels that were looked at"]
    assert len(Launch.of(without[0]).parameters) < len(record[0])
