"""What an installation leaves behind: files, the kernels' record, and what is said without kernels.

The compiler is played by a script, so that nothing waits for the real one but the last test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import custom_ops
from custom_ops import softmax
from custom_ops.kernels import built, cpu, warning

ROOT = Path(__file__).parent.parent
HERE = torch.__version__.partition("+")[0]
SOABI = sysconfig.get_config_var("SOABI")
REINSTALL = "reinstall with `pip install --force-reinstall --no-deps --no-cache-dir .`"
BESIDE_TORCH = REINSTALL.replace("--no-deps", "--no-deps --no-build-isolation")
# Writes down how it was called, and makes the file that it was asked for.
COMPILER = """#!/bin/sh
echo "$@" >> {log}
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""


def record(**changes: object) -> str:
    as_built = {"torch": HERE, "python": SOABI, "unusable": "", "libraries": {"_cpu_avx2": ""}}
    return json.dumps(as_built | changes)


def test_the_library_is_that_of_the_vector_set():
    every = record(libraries={"_cpu_avx2": "", "_cpu_avx512": "", "_cpu_default": ""})
    names = [built.find(every, HERE, c).name for c in ("AVX512", "AVX2", "DEFAULT", "SVE256")]
    assert names == ["_cpu_avx512", "_cpu_avx2", "_cpu_default", "_cpu_default"]


def test_a_cuda_build_of_the_same_torch_is_the_same_torch():
    assert built.find(record(torch=f"{HERE}+cpu"), f"{HERE}+cu130", "AVX2").name == "_cpu_avx2"


@pytest.mark.parametrize(
    ("written", "unusable", "says"),
    [
        (None, False, f"they were not built: {BESIDE_TORCH}"),
        (record(unusable="no torch"), False, f"no torch: {BESIDE_TORCH}"),
        (record(torch="2.0.0"), True, f"built for torch 2.0.0, this is {HERE}: {REINSTALL}"),
        (record(python="cpython-27"), True, f"built for cpython-27, this is {SOABI}: {REINSTALL}"),
        (
            record(libraries={"_cpu_avx512": "", "_cpu_default": ""}),
            True,
            "built for AVX512 and DEFAULT, torch uses AVX2 here: "
            f"with CUSTOM_OPS_CPU_CAPABILITY=all, {REINSTALL}",
        ),
        (
            record(libraries={"_cpu_avx2": "no g++"}),
            False,
            f"their build failed (no g++): with a C++20 compiler, {REINSTALL}",
        ),
    ],
)
def test_without_a_library_the_reason_and_the_command_are_kept(written, unusable, says):
    assert built.find(written, HERE, "AVX2") == ("", f"{says} in its sources", unusable)


def test_a_library_for_another_torch_is_not_opened(monkeypatch):
    monkeypatch.setattr(built, "read", lambda: record(torch="2.0.0"))
    monkeypatch.setattr(cpu.importlib, "import_module", lambda name: pytest.fail(name))
    library, missing, warns = cpu._load()
    assert library is None
    assert missing.startswith(f"built for torch 2.0.0, this is {HERE}: reinstall with")
    assert warns == f"no C++ kernels: {missing}"


def test_a_library_that_cannot_be_opened_is_left_out(monkeypatch):
    def fail(name: str) -> None:
        raise ImportError("libtorch.so: undefined symbol")

    monkeypatch.setattr(built, "read", lambda: record(libraries={"_cpu_avx2": ""}))
    monkeypatch.setattr(cpu, "capability", "AVX2")
    monkeypatch.setattr(cpu.importlib, "import_module", fail)
    library, missing, _ = cpu._load()
    assert library is None
    assert missing.startswith("they cannot be loaded (libtorch.so: undefined symbol): reinstall")


@pytest.fixture
def kernels_of_another_torch(monkeypatch) -> str:
    missing = f"built for torch 2.0.0, this is {HERE}"
    monkeypatch.setattr(cpu, "library", None)
    monkeypatch.setattr(cpu, "missing", missing)
    monkeypatch.setattr(cpu, "_warning", f"no C++ kernels: {missing}")
    monkeypatch.setattr(warning, "_told", set())
    return missing


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_first_use_warns_that_the_kernels_are_of_another_torch(
    kernels_of_another_torch, recwarn, compiled
):
    call = torch.compile(softmax, backend="eager", fullgraph=True) if compiled else softmax
    for _ in range(3):
        torch.testing.assert_close(call(torch.zeros(2), 0), torch.tensor([0.5, 0.5]))
    said = [str(w.message) for w in recwarn if "custom_ops" in str(w.message)]
    assert said == [
        f"custom_ops uses plain ATen operators: no C++ kernels: {kernels_of_another_torch}"
    ]
    assert kernels_of_another_torch in custom_ops.backend()


def test_old_setuptools_is_told_what_is_needed():
    code = "import runpy, setuptools; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "setuptools 77 or newer, and this is 65.5.0" in done.stderr


class Sources:
    """A copy of the sources without what was built in them, and a compiler that is played."""

    def __init__(self, folder: Path) -> None:
        skip = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so")
        ignored = shutil.ignore_patterns(*skip, "built.json")
        self.root, self.log, self.torch = folder / "sources", folder / "log", folder / "no-torch"
        shutil.copytree(ROOT, self.root, ignore=ignored)
        self.log.touch()
        compiler = folder / "c++"
        compiler.write_text(COMPILER.format(log=self.log))
        compiler.chmod(0o755)
        self.torch.mkdir()
        (self.torch / "torch.py").write_text("raise ImportError('there is none')")
        self.environment = {**os.environ, "CC": str(compiler), "CXX": str(compiler)}
        self.environment.pop("CUSTOM_OPS_CPU_CAPABILITY", None)

    def run(self, *command: object, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=self.root,
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def hook(self, name: str, folder: Path, **environment: str) -> Path:
        """Call setuptools as pip does, without the seconds that pip takes."""
        folder.mkdir(exist_ok=True)
        call = f"from setuptools import build_meta; build_meta.{name}({str(folder)!r})"
        self.said = self.run("-c", call, **environment)
        (made,) = folder.iterdir()
        return made

    def wheel(self, folder: Path, **environment: str) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.hook("build_wheel", folder, **environment))

    def compiled(self) -> list[str]:
        """Return the vector sets that the compiler was called for since the last question."""
        words = self.log.read_text().split()
        self.log.write_text("")
        prefix = "-DCPU_CAPABILITY="
        return sorted(word.removeprefix(prefix) for word in words if word.startswith(prefix))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("install"))


@pytest.fixture(scope="module")
def wheel(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return sources.wheel(tmp_path_factory.mktemp("wheel"))


def record_in(wheel: zipfile.ZipFile) -> dict:
    return json.loads(wheel.read("custom_ops/kernels/built.json"))


def test_the_sdist_holds_all_that_a_build_and_its_tests_need(sources, tmp_path: Path):
    with tarfile.open(sources.hook("build_sdist", tmp_path)) as sdist:
        names = sdist.getnames()
    inside = {name.partition("/")[2] for name in names}
    kernels = {
        str(path.relative_to(ROOT))
        for room in ("kernels/cpu", "node")
        for path in (ROOT / "custom_ops" / room).iterdir()
        if path.suffix in (".h", ".cpp", ".py")
    }
    assert len(kernels) > 20
    assert kernels <= inside
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile"} <= inside
    assert {"tests/conftest.py", "tests/test_install.py", "training/data/digits.py"} <= inside
    assert {"benchmarks/plan.py", "scripts/benchmark.py", "mkdocs.yml"} <= inside
    assert {"lesson/page.py", "lesson/exercises/check.py", "docs/softmax.html"} <= inside
    assert not [name for name in inside if name.endswith((".so", ".pyc", "built.json"))]


def test_the_wheel_holds_the_package_and_its_kernels_alone(wheel):
    names = wheel.namelist()
    assert {name.partition("/")[0] for name in names} == {
        "custom_ops",
        f"custom_ops-{custom_ops.__version__}.dist-info",
    }
    kinds = {Path(name).suffix for name in names if name.startswith("custom_ops/")}
    assert kinds == {".py", ".typed", ".json", ".so"}
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("custom_ops/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    capability = torch.backends.cpu.get_cpu_capability()
    here = f"_cpu_{capability.lower()}"
    assert [name for name in names if name.endswith(".so")] == [
        f"custom_ops/kernels/{here}{sysconfig.get_config_var('EXT_SUFFIX')}"
    ]
    assert record_in(wheel) == {
        "torch": torch.__version__,
        "python": SOABI,
        "unusable": "",
        "libraries": {here: ""},
    }


def test_the_metadata_name_version_licence_and_kind(wheel):
    text = wheel.read(f"custom_ops-{custom_ops.__version__}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert metadata["Version"] == custom_ops.__version__
    assert metadata["License-Expression"] == "MIT"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    needs = metadata.get_all("Requires-Dist")
    assert [need for need in needs if "extra" not in need] == ["torch>=2.11"]
    assert "triton>=3.6; extra == 'cuda'" in [need.replace('"', "'") for need in needs]


@pytest.mark.exhaustive
def test_every_installation_compiles_anew(sources, tmp_path: Path):
    """What lies in build/ may be of another torch, or of an earlier state of the sources."""
    here = torch.backends.cpu.get_cpu_capability()
    sources.compiled()
    sources.wheel(tmp_path / "first")
    assert sources.compiled() == [here]
    (left,) = sources.root.glob("build/lib*")
    (left / "custom_ops" / "gone.py").touch()
    (left / "custom_ops" / "kernels" / "_cpu_other.so").touch()
    wheel = sources.wheel(tmp_path / "second")
    assert sources.compiled() == [here]
    assert f"custom_ops: compiling {here} for torch {torch.__version__}" in sources.said
    names = wheel.namelist()
    assert not [name for name in names if "gone" in name or "_cpu_other" in name]


@pytest.mark.exhaustive
def test_all_vector_sets_are_compiled_where_they_are_asked_for(sources, tmp_path: Path):
    sources.compiled()
    wheel = sources.wheel(tmp_path, CUSTOM_OPS_CPU_CAPABILITY="all")
    assert set(record_in(wheel)["libraries"]) == {f"_cpu_{c.lower()}" for c in sources.compiled()}


@pytest.mark.exhaustive
def test_an_unknown_vector_set_is_refused(sources, tmp_path: Path):
    with pytest.raises(AssertionError, match=r"expected all, or some of DEFAULT.*, got SSE"):
        sources.wheel(tmp_path, CUSTOM_OPS_CPU_CAPABILITY="SSE")


def test_without_torch_the_wheel_has_no_kernels_and_the_reason(sources, tmp_path: Path):
    wheel = sources.wheel(tmp_path, PYTHONPATH=str(sources.torch))
    assert not [name for name in wheel.namelist() if name.endswith(".so")]
    reason = "torch could not be imported when it was installed (there is none)"
    assert record_in(wheel)["unusable"] == reason
    assert f"custom_ops: no C++ kernels: {reason}" in sources.said


@pytest.mark.exhaustive
def test_without_a_compiler_the_wheel_has_no_kernels_and_the_reason(sources, tmp_path: Path):
    wheel = sources.wheel(tmp_path, CC="/nowhere/cc", CXX="/nowhere/c++")
    assert not [name for name in wheel.namelist() if name.endswith(".so")]
    (reason,) = record_in(wheel)["libraries"].values()
    assert "/nowhere/c" in reason


@pytest.mark.exhaustive
def test_an_editable_installation_is_a_path_that_type_checkers_follow(sources, tmp_path: Path):
    wheel = zipfile.ZipFile(sources.hook("build_editable", tmp_path))
    (path,) = [name for name in wheel.namelist() if name.endswith(".pth")]
    assert wheel.read(path).decode().split() == [str(sources.root)]
    assert json.loads((sources.root / built.RECORD.relative_to(ROOT)).read_text())["libraries"]


def install(sdist: Path, target: Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    subprocess.run(
        [*command, "--target", str(target), str(sdist)], env=os.environ | environment, check=True
    )


def report(target: Path) -> str:
    """Return what the installed package says of itself."""
    code = "import custom_ops; print(custom_ops.__file__); print(custom_ops.backend())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=target,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    file, says = done.stdout.splitlines()
    assert Path(file).is_relative_to(target)
    return says


def test_the_sdist_installs_without_torch(sources, tmp_path: Path):
    sdist = sources.hook("build_sdist", tmp_path / "dist")
    install(sdist, tmp_path / "target", PYTHONPATH=str(sources.torch))
    says = report(tmp_path / "target")
    assert "torch could not be imported when it was installed" in says
    assert BESIDE_TORCH in says


@pytest.mark.exhaustive
@pytest.mark.skipif(cpu.library is None, reason=f"C++ kernels: {cpu.missing}")
def test_the_sdist_installs_beside_torch_with_its_kernels(sources, tmp_path: Path):
    sdist = sources.hook("build_sdist", tmp_path / "dist")
    install(sdist, tmp_path / "target")
    assert report(tmp_path / "target").startswith(f"C++ ({cpu.capability}) on the CPU; eager")
    record = tmp_path / "target" / "custom_ops" / "kernels" / "built.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"torch": "2.0.0"}))
    assert f"built for torch 2.0.0, this is {HERE}: {REINSTALL}" in report(tmp_path / "target")
