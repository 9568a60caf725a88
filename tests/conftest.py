"""The oracle: float64, every probability written out, derivatives by torch's own autograd.

Tolerances come from the dtype's rounding: `torch.testing.assert_close` compares to about sixteen
roundings of a result of the given dtype (1.3e-6 for float32, 1.6e-2 for bfloat16, 1e-7 for float64)
and that is what is used, against a float64 oracle rounded once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from custom_ops.kernels import cpu, cuda

if not hasattr(F, "linear_cross_entropy"):  # torch 2.11 and 2.12

    def _linear_cross_entropy(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """What torch 2.13's function is by its documentation."""
        if linear_weight.dim() > 2:  # a layer for each position
            logits = torch.einsum("nd,c...d->nc...", input, linear_weight)
            logits = logits if linear_bias is None else logits + linear_bias
        else:
            logits = F.linear(input, linear_weight, linear_bias)
            logits = logits.movedim(-1, 1) if logits.dim() > 2 else logits
        return F.cross_entropy(logits, target, **options)

    F.linear_cross_entropy = _linear_cross_entropy

torch.set_num_threads(1)  # pytest-xdist runs a process a core

# What cannot run here is not collected: a device's tests, those of the other kind of process, and
# those of an extra that is not installed.
collect_ignore = [
    "kernels/launches/calls.py",  # programs that test_launches.py runs
    "kernels/launches/devices.py",
    *(["kernels/test_cuda.py"] * (not torch.cuda.is_available())),
    *(["last_layer/test_cuda_last_layer.py"] * (not torch.cuda.is_available())),
    *(["kernels/test_triton.py", "kernels/test_triton_node.py"] * (not cuda.interpreted)),
    *(["lesson"] * (find_spec("sklearn") is None or find_spec("matplotlib") is None)),
]

#: Tests of tens of seconds, of a kind that the quick run has a smaller one of.
EXHAUSTIVE = (
    "test_beyond_torch.py::test_a_bad_label_in_a_compiled_graph_ends_torchs_process",
    "test_benchmark.py::",
    "test_device_benchmark.py::",
    "test_distributed.py::test_normalizer_makes_up",
    "lesson/test_explain.py::test_the_factors_come_in_the_order_of_the_chain_rule[index",
    "test_install.py::test_the_sdist_installs_without_torch",
    "test_last_layer_memory.py::test_peak_memory_of_a_child_process",
    "test_modules.py::test_torchs_own_samples_of_the_last_layer",
    "test_native.py::test_every_vector_set",
    "test_native.py::test_opcheck[classes",
    "test_native.py::test_opcheck[runs",
    "test_training_environment.py::test_two_processes",
    "test_triton_compiled.py::test_compiles_for_older_and_newer_devices",
    "test_triton_compiled.py::test_compiles_where_sizes_need_64_bits",
    "test_triton_compiled.py::test_every_variant_compiles",
    "test_training_scripts.py::test_killed_in_mid_epoch_and_resumed_ends_at_the_same_weights",
    "test_training_scripts.py::test_train_lm_goes_on",
    "test_training_scripts.py::test_two_processes_train_one_model",
    "test_training_signals.py::test_two_processes_stop_together",
)
#: Of these, the quick run takes one kind of option.
ONE_KIND = {
    "test_linear_cross_entropy.py::test_first_second_and_mixed_derivatives": "all-mean",
    "test_linear_cross_entropy.py::test_statistics_have_second_derivatives_too": "all",
    "test_apply.py::test_compiles_whole": "aot_eager",
    "test_apply.py::test_func_inside_a_compiled_region": "labels",
    "test_training_signals.py::test_a_signal_saves": "train]",
    "test_training_failures.py::": "train]",
    "test_training_environment.py::test_whatever": "[slurm]",
    "test_training_scripts.py::test_a_lower_target_than_what_was_done_is_refused": "-train]",
    "test_training_scripts.py::test_a_finished_run_can_be_continued": "-train]",
    "test_training_environment.py::test_a_process_that_finds": "[train]",
    "test_programs.py::test_each_step_before_each_loss": "[last-",
    "test_battery_twins.py::test_twin_is_found_and_named": "grad",
}

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what the two lists name."""
    for item in items:
        name = item.path.name + item.nodeid[item.nodeid.index("::") :]
        others = [kind for test, kind in ONE_KIND.items() if name.startswith(test)]
        several = "[" in name and others and others[0] not in name
        if name.startswith(EXHAUSTIVE) or several:
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=cuda.interpreted)
def _interpreter_like_a_device() -> Iterator[None]:
    """Let Triton's interpreter (3.7) round to bfloat16, and launch from several threads.

    It cuts a float32 off, as its cast hands no rounding mode on, and the one that it would take
    loses a carry into the exponent. And while a kernel runs, the language is patched, in all
    threads and until that launch is over.
    """
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    plain, launch, turn = InterpreterBuilder.cast_impl, GridExecutor.__call__, threading.Lock()

    def cast(builder: object, x: TensorHandle, to: object) -> TensorHandle:
        if (x.dtype.scalar, to.scalar) != (float32, bfloat16):
            return plain(builder, x, to)
        rounded = torch.from_numpy(x.data).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), to.scalar)

    def in_turn(executor: GridExecutor, *args: object, **options: object) -> None:
        with turn:
            launch(executor, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", cast)
        patch.setattr(GridExecutor, "__call__", in_turn)
        yield


def _backends() -> list[Any]:
    """The kernels that this process can run a module's tests on; none is generated to be skipped.

    Triton's interpreter has to be chosen before Triton is imported, so those tests have processes
    of their own. The eager kernels, where the C++ ones are there, are for the exhaustive run.
    """
    if cuda.interpreted:
        return ["triton"]
    if cpu.library is None:
        return ["eager"]
    return ["cpp", pytest.param("eager", marks=pytest.mark.exhaustive)]


@pytest.fixture(scope="module", params=_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a module's tests (`usefixtures`) on the kernels of one kind alone."""
    others = {"cpp": cpu, "triton": cuda}
    if request.param == "triton" and cuda.library is None:
        pytest.skip(f"no Triton kernels: {cuda.missing}")
    with pytest.MonkeyPatch.context() as patch:
        for name, kernels in others.items():
            if name != request.param:
                patch.setattr(kernels, "library", None)
        yield request.param


def oracle_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and lse, with ỹ built for every class; -inf only where ỹ is not 0."""
    dim = 1 if input.dim() > 1 else 0
    C = input.shape[dim]
    x = input.double().movedim(dim, -1)
    z = logit_scale * x
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    w = torch.ones(C, dtype=torch.double) if weight is None else weight.double()
    if target.is_floating_point():
        counts = torch.ones(x.shape[:-1], dtype=torch.double)
        y = target.double().movedim(dim, -1)
        rows = counts.sum()
    else:
        counts = (target != ignore_index).double()
        t = target.long().masked_fill(target == ignore_index, 0)
        y = torch.nn.functional.one_hot(t, C).double()
        rows = (counts * w[t]).sum()
    y = w * ((1 - label_smoothing) * y + label_smoothing / C)
    lse = torch.logsumexp(z, -1)
    loss = counts * ((y * (lse.unsqueeze(-1) - z)).sum(-1) + z_loss * lse**2)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (rows if normalizer is None else normalizer)
    return loss, counts * lse


@pytest.fixture
def oracle():
    return oracle_cross_entropy


def differentiable(*tensors: Tensor | None) -> list[Tensor]:
    """The tensors among them that a gradient can flow to, as leaves that require it."""
    return [t.detach().clone().requires_grad_() for t in tensors if t is not None]
