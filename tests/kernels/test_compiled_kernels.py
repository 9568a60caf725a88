"""A compiled call runs the kernels, as an eager one does, in the forward and in the backward."""

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from custom_ops import cross_entropy, linear_cross_entropy, log_softmax, softmax
from custom_ops.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.library is None, reason=f"C++ kernels: {cpu.missing}")

TARGET, P = torch.arange(6) % 5, torch.full((6, 5), 0.2)
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0}
LOSS = {"cross_entropy", "total", "cross_entropy_vjp"}
LAYER = {"checked_labels", "linear_cross_entropy", "linear_cross_entropy_vjp"}
CASES: dict[str, tuple[Callable, tuple, set[str]]] = {
    "softmax": (lambda z: softmax(z, 1), ((6, 5),), {"softmax", "contract"}),
    "log_softmax": (lambda z: log_softmax(z, 1), ((6, 5),), {"softmax", "log_softmax_vjp"}),
    "labels": (lambda z: cross_entropy(z, TARGET), ((6, 5),), LOSS),
    "options": (lambda z: cross_entropy(z, TARGET, **OPTIONS), ((6, 5),), LOSS),
    "probabilities": (lambda z: cross_entropy(z, P), ((6, 5),), LOSS),
    "last layer": (lambda x, W: linear_cross_entropy(x, W, TARGET), ((6, 4), (5, 4)), LAYER),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("case", CASES)
def test_the_graphs_of_a_compiled_call_hold_the_kernels(case: str, autocast: bool):
    function, shapes, kernels = CASES[case]
    called: set[str] = set()

    def compiler(graph: torch.fx.GraphModule, example: object) -> Callable:
        called.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def surrounded(*args: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=autocast):
            return function(*args)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    torch.compile(surrounded, backend=backend, fullgraph=True)(*leaves).sum().backward()
    ours = {name.split(".")[1] for name in called if name.startswith("custom_ops.")}
    assert ours == kernels
