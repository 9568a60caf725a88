"""What a fresh process imports before the first eager result: torch, and no compiler of its."""

import subprocess
import sys

PROGRAM = """
import sys, torch, custom_ops
from torch.nn import Linear

x, W, b = (torch.randn(s, requires_grad=True) for s in ((6, 4), (5, 4), (5,)))
labels, p = torch.randint(5, (6,)), torch.rand(6, 5)
z, head = torch.randn(6, 5, requires_grad=True), Linear(4, 5)
modules = custom_ops.Softmax(1), custom_ops.LogSoftmax(1), custom_ops.CrossEntropyLoss()
loss = custom_ops.LinearCrossEntropyLoss.from_linear(head)
options = dict(label_smoothing=0.1, z_loss=0.1, softcap=9.0, return_stats=True)
for result in (
    custom_ops.softmax(z, 1),
    custom_ops.log_softmax(z, 1),
    custom_ops.contract(z, p, 1),
    custom_ops.jacobian.softmax(z),
    modules[0](z),
    modules[1](z),
    modules[2](z, labels),
    loss(x, labels),
    *(custom_ops.cross_entropy(z, t) for t in (labels, labels.to(torch.uint8), p)),
    *(custom_ops.linear_cross_entropy(x, W, t, b) for t in (labels, labels.to(torch.uint8), p)),
    custom_ops.cross_entropy(z, labels, **options)[0],
    custom_ops.cross_entropy(z * 1, labels, inplace_backward=True),
    custom_ops.linear_cross_entropy(x, W, labels, b, **options)[0],
):
    result.sum().backward()
found = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]
print(f"imported: {found}")
"""


def test_no_eager_call_imports_dynamo_or_sympy():
    """They take seconds, of which an eager call has no use."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == "imported: []\n", done.stdout + done.stderr
