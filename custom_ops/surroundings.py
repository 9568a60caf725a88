"""What surrounds a call: every private name of torch that this package reads, and nothing else.

Read in torch 2.11, 2.12 and 2.13. Each name is looked up once, here. Where a version has no such
name, the answer is the one that costs speed and no correctness: a tensor is not plain, a call is
watched, a graph is kept.

Three questions are answered, all by allow-lists:

- `is_plain`: may a kernel read this tensor's memory?
- `is_known`: may an autograd Function hold this tensor, or must plain algebra answer for it?
- `is_watched`: does a mode or a tracer see the operators that are called? Then no value may be
  read, no buffer reused, and every kernel is called as a registered operator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

__all__ = [
    "autocast_is_available",
    "below_autograd",
    "constant",
    "dispatch_modes",
    "forward_levels",
    "func_levels",
    "graph_is_kept",
    "is_exporting",
    "is_known",
    "is_masked",
    "is_onnx_tracing",
    "is_plain",
    "is_saved_as_it_is",
    "is_transformed",
    "is_watched",
    "root_of",
    "set_decomposition",
    "tracing_levels",
    "tree_leaves",
    "tree_map",
    "untraced",
    "without_torch_function",
]


F = TypeVar("F", bound=Callable[..., Any])


def _find(path: str) -> Any:
    """Return the attribute of torch that `path` names, or None where this version has none."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


_interpreter_stack = _find("_C._functorch.get_interpreter_stack")
_forward_transform = _find("_C._functorch.TransformType.Jvp")
_dual_level = _find("autograd.forward_ad._current_level")
_keeps_graph = _find("_C._autograd._get_current_graph_task_keep_graph")
_saving_hooks = _find("_C._autograd._top_saved_tensors_default_hooks")
_tensor_keys = _find("_C._dispatch_keys")
_included_keys = _find("_C._dispatch_tls_local_include_set")
_dispatch_modes = _find("_C._len_torch_dispatch_stack")
#: A context in which an operator called again skips its autograd kernel, or None.
below_autograd = _find("_C._AutoDispatchBelowAutograd")
#: A context in which a tensor subclass is treated as a plain tensor.
without_torch_function = _find("_C.DisableTorchFunctionSubclass")
#: Have Dynamo call the function as it is: torch.compiler.disable, which would import Dynamo first.
untraced = _find("_disable_dynamo") or torch.compiler.disable
#: Nested arguments as a list of leaves, and a function of each leaf.
tree_leaves = _find("utils._pytree.tree_leaves")
tree_map = _find("utils._pytree.tree_map")
_mode_stack = _find("utils._python_dispatch._get_current_dispatch_mode_stack")
_register_decomposition = _find("_decomp.register_decomposition")
_key_bits = _find("_C.DispatchKeySet.raw_repr")


@cache
def _keys(*names: str) -> int:
    """Return these dispatch keys as bits; a key that this version does not have is left out."""
    sets, keys, bits = _find("_C.DispatchKeySet"), _find("_C.DispatchKey"), 0
    for name in names:
        if _key_bits is not None and hasattr(keys, name):
            bits |= _key_bits(sets(getattr(keys, name)))
    return bits


def _foreign(t: Tensor, allowed: int) -> bool:
    """Whether `t` has dispatch keys other than the `allowed` ones, as far as that can be told."""
    if _tensor_keys is None or _key_bits is None:
        return True
    return bool(_key_bits(_tensor_keys(t)) & ~allowed)


def _plain_keys(backend: str) -> int:
    """The keys of a dense strided tensor of torch's own class."""
    return _keys(backend, "ADInplaceOrView", f"Autograd{backend}", f"Autocast{backend}")


_PLAIN = {"cpu": _plain_keys("CPU"), "cuda": _plain_keys("CUDA")}
#: A view's sign and conjugation, and torch.func's wrappers: autograd Functions handle these.
_WRAPPERS = _keys(
    *("Negative", "Conjugate", "ZeroTensor"),
    *("FuncTorchBatched", "FuncTorchGradWrapper", "Functionalize"),
)
_KNOWN = _WRAPPERS | _keys(
    *(key for b in ("CPU", "CUDA", "Meta", "MPS", "XPU") for key in (b, f"Autograd{b}")),
    *("AutocastCPU", "AutocastCUDA", "AutocastMPS", "AutocastXPU", "ADInplaceOrView"),
)
#: What a thread has without any mode or transform; autocast is asked for by its public name.
_QUIET = _keys("BackendSelect", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA")
#: The classes with which torch itself traces; by name, as importing them takes seconds.
_TRACERS = {
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.functional_tensor.FunctionalTensor",
}


def is_plain(t: Tensor, device: str) -> bool:
    """Whether `t` is a dense strided tensor of torch's own class on `device` ("cpu" or "cuda").

    Autograd's reverse mode may differentiate it; no transform, tangent or view of another sign is
    in the way of its memory.
    """
    return (
        type(t) in (Tensor, Parameter) and not _foreign(t, _PLAIN[device]) and forward_levels() == 0
    )


def is_known(t: Tensor) -> bool:
    """Whether autograd Functions treat `t` rightly: torch's own class, or one that torch traces by.

    Not known are subclasses, DTensor among them; sparse, nested and quantised tensors; and a batch
    of upstream gradients, as torch.autograd.grad(..., is_grads_batched=True) hands them on.
    """
    if type(t) not in (Tensor, Parameter):
        return f"{type(t).__module__}.{type(t).__qualname__}" in _TRACERS
    return not _foreign(t, _KNOWN)


def is_masked(t: Tensor) -> bool:
    """Whether `t` is a MaskedTensor, whose class no public name is for without importing it."""
    return type(t).__module__ == "torch.masked.maskedtensor.core"


def is_watched() -> bool:
    """Whether a dispatch mode, a tracer or a transform of torch.func sees each operator."""
    known = _dispatch_modes and _included_keys and _key_bits
    if torch.compiler.is_compiling() or not known:
        return True
    return bool(_dispatch_modes()) or bool(_key_bits(_included_keys()) & ~_QUIET)


def dispatch_modes() -> list[Any]:
    """Return the dispatch modes around the call, the outermost first."""
    return (_mode_stack and _mode_stack()) or []


def func_levels() -> list[Any]:
    """Return torch.func's transforms around the call, the outermost first."""
    return (_interpreter_stack and _interpreter_stack()) or []


def forward_levels() -> int:
    """Return how many levels of forward mode are open: torch.func's, or else a dual_level.

    Where that cannot be told, 2: plain algebra then answers, right under any transform.
    """
    if _interpreter_stack is None or _forward_transform is None or _dual_level is None:
        return 2
    jvps = sum(level.key() == _forward_transform for level in func_levels())
    return max(jvps, int(forward_ad._current_level >= 0))


def constant(function: F) -> F:
    """Have Dynamo call the function when it traces, and keep its result in the graph.

    This is what torch.compiler.assume_constant_result does, which first imports Dynamo: a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant  # in torch 2.11 Dynamo cannot trace the question
def autocast_is_available(device: str) -> bool:
    """Whether autocast can be switched on for this type of device."""
    return torch.amp.is_autocast_available(device)


@constant
def tracing_levels() -> int:
    """Return how many transforms and forward levels surround a call that Dynamo traces."""
    return len(func_levels()) + forward_levels()


def is_transformed() -> bool:
    """Whether torch.compile, a torch.func transform or forward mode surrounds the call."""
    return torch.compiler.is_compiling() or bool(func_levels()) or forward_levels() > 0


def graph_is_kept() -> bool:
    """Whether what the running backward saved may be asked for again: it must stay as it is."""
    return is_transformed() or is_watched() or _keeps_graph is None or bool(_keeps_graph())


def is_saved_as_it_is() -> bool:
    """Whether what a Function saves stays where it is, or a hook looks at it, as a checkpoint's."""
    return _saving_hooks is not None and _saving_hooks(True) is None


def is_exporting() -> bool:
    """Whether torch.export or torch.onnx.export runs the call for a program of ATen operators."""
    return _is_exporting() or (not torch.compiler.is_compiling() and is_onnx_tracing())


@constant  # torch 2.11: Dynamo itself answers True, under torch.compile too
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def is_onnx_tracing() -> bool:
    """Whether torch.onnx.export(dynamo=False) traces the call."""
    onnx = sys.modules.get("torch.onnx")  # not imported with torch
    return onnx is not None and onnx.is_in_onnx_export()


def set_decomposition(operator: Any, decomposition: Callable[..., Any]) -> None:
    """Have converters of exported programs, torch.onnx among them, decompose the operator."""
    if _register_decomposition is not None:
        _register_decomposition(operator)(decomposition)


def root_of(view: Tensor) -> Tensor:
    """Return the tensor that `view` is a view of, or itself."""
    base = getattr(view, "_base", None)
    return view if base is None else base
