"""Who answers for a tensor, and what the report says of it."""

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import custom_ops
from custom_ops import kernels
from custom_ops.kernels import cpu, cuda, eager, labels, warning

PLAIN = "eager: plain ATen operators"


class Kernels:
    """Stands for a library: it is there, and no more."""


@pytest.fixture(params=[False, True], ids=["", "C++"])
def cpp(request, monkeypatch) -> bool:
    monkeypatch.setattr(cpu, "library", Kernels if request.param else None)
    monkeypatch.setattr(cpu, "missing", "they were not built")
    monkeypatch.setattr(cpu, "capability", "AVX512")
    monkeypatch.setattr(cuda, "_tried", True)
    return request.param


def test_the_report_names_triton_where_it_runs(monkeypatch, cpp):
    monkeypatch.setattr(cuda, "library", Kernels)
    monkeypatch.setattr(cuda, "version", "3.7.1")
    monkeypatch.setattr(cuda, "where", "on CUDA")
    assert custom_ops.backend() == (
        f"C++ (AVX512) on the CPU; Triton 3.7.1 on CUDA; {PLAIN}, elsewhere"
        if cpp
        else f"Triton 3.7.1 on CUDA; {PLAIN}, elsewhere; no C++ kernels: they were not built"
    )


def test_the_report_says_why_a_cuda_device_goes_without(monkeypatch, cpp):
    monkeypatch.setattr(cuda, "library", None)
    monkeypatch.setattr(cuda, "missing", "Triton is not installed")
    assert custom_ops.backend() == (
        f"C++ (AVX512) on the CPU; {PLAIN}, elsewhere; no Triton kernels: Triton is not installed"
        if cpp
        else f"{PLAIN}, on every device; no C++ kernels: they were not built; "
        "no Triton kernels: Triton is not installed"
    )


def test_the_report_does_not_speak_of_triton_where_there_is_no_device(monkeypatch, cpp):
    monkeypatch.setattr(cuda, "library", None)
    monkeypatch.setattr(cuda, "missing", "")
    assert "Triton" not in custom_ops.backend()


def test_without_triton_a_device_has_the_eager_kernels_and_no_error(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it is an ImportError
    assert cuda._load() == (None, "", "Triton is not installed")


@pytest.fixture
def device(monkeypatch) -> Callable[..., None]:
    """Play a CUDA device on which Triton's first launch does what is given."""

    def play(launch_nothing: Callable[[], None]) -> None:
        library = types.SimpleNamespace(launch_nothing=launch_nothing, direct=None)
        monkeypatch.setattr(cuda, "library", library)
        monkeypatch.setattr(cuda, "_tried", False)
        monkeypatch.setattr(cpu, "library", None)
        for name in ("missing", "_warning"):
            monkeypatch.setattr(cuda, name, "")

    monkeypatch.setattr(cuda, "device", "cuda")
    monkeypatch.setattr(cuda, "is_plain", lambda t, device: True)
    monkeypatch.setattr(warning, "_told", set())
    return play


def fail() -> None:
    raise RuntimeError("Failed to find C compiler")


def test_triton_that_cannot_run_warns_once_and_leaves_the_eager_kernels(device, recwarn):
    device(fail)
    why = "Triton cannot run here (RuntimeError: Failed to find C compiler)"
    assert [cuda.takes(torch.zeros(1)) for _ in range(3)] == [False] * 3
    assert [str(w.message) for w in recwarn] == [
        f"custom_ops uses plain ATen operators: no Triton kernels: {why}"
    ]
    assert why in custom_ops.backend()


def test_triton_is_tried_once(device, recwarn):
    tried = []
    device(lambda: tried.append(1))
    assert [cuda.takes(torch.zeros(1)) for _ in range(3)] == [True] * 3
    assert tried == [1]
    assert not recwarn


def test_the_report_tries_triton_before_it_names_it(device):
    device(fail)
    assert "Triton cannot run here" in custom_ops.backend()


@pytest.mark.parametrize("error", ["ImportError", "OSError", "KeyError"])
def test_triton_that_raises_when_it_is_imported_is_left_out(monkeypatch, tmp_path: Path, error):
    (tmp_path / "triton.py").write_text(f"raise {error}(7)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    assert cuda._load() == (None, "", f"Triton cannot be imported ({error}: 7)")


def test_triton_is_not_imported_where_it_has_no_device():
    if cuda.interpreted or torch.cuda.is_available():
        pytest.skip("Triton runs here")
    code = "import sys, custom_ops; print(custom_ops.backend(), 'triton' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(" False\n")
    assert "Triton" not in result.stdout


def test_what_is_differentiated_or_of_another_kind_goes_to_the_eager_kernels():
    x = torch.randn(2, 3)
    leaf = x.clone().requires_grad_()
    assert kernels._chosen(leaf) is eager
    assert kernels._chosen(x, leaf) is eager
    assert kernels._chosen(x.to("meta")) is eager
    with torch.no_grad():
        assert kernels._chosen(leaf) is kernels._chosen(x, None)
    imaginary = torch.randn(2, 3, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    assert kernels._chosen(imaginary) is eager
    torch.testing.assert_close(custom_ops.softmax(imaginary, 1), imaginary.clone().softmax(1))


def test_a_map_of_two_shapes_or_dtypes_goes_to_the_eager_kernels():
    x = torch.randn(2, 3)
    assert kernels._chosen_for_map(x, x[0]) is eager
    assert kernels._chosen_for_map(x, x.double()) is eager
    assert kernels._chosen_for_map(x, x) is kernels._chosen(x)


def test_labels_on_a_cuda_device_are_handed_to_the_kernel_that_writes_bad_ones_down(monkeypatch):
    seen = []
    monkeypatch.setattr(
        cuda, "library", types.SimpleNamespace(report=lambda *args: seen.append(args[1:]))
    )
    monkeypatch.setattr(cuda, "_tried", True)
    with FakeTensorMode():
        for device in ("cuda", "cpu"):  # on the latter they are checked on the spot
            labels._report(torch.empty(3, dtype=torch.int64, device=device), 10, -100)
    assert seen == [(10, -100)]
