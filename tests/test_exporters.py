"""Models with our ops inside, converted to ONNX and run there."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import custom_ops

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

LABELS = torch.tensor([1, -100, 3, 0])


class Head(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(6, 5), loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.layer(x), target)


class Whole(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(x, target)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "softmax": (lambda: custom_ops.Softmax(1), (torch.randn(4, 6),)),
    "log_softmax": (lambda: custom_ops.LogSoftmax(1), (torch.randn(4, 6),)),
    "labels": (
        lambda: Head(custom_ops.CrossEntropyLoss(torch.rand(5), label_smoothing=0.1, z_loss=0.1)),
        (torch.randn(4, 6), LABELS),
    ),
    "probabilities": (
        lambda: Head(custom_ops.CrossEntropyLoss()),
        (torch.randn(4, 6), torch.rand(4, 5)),
    ),
    "last layer": (
        lambda: Whole(custom_ops.LinearCrossEntropyLoss(6, 5, bias=True, softcap=3.0)),
        (torch.randn(4, 6), LABELS),
    ),
}


def through_export(model: nn.Module, args: tuple[Tensor, ...]) -> bytes:
    program = torch.onnx.export(torch.export.export(model, args), dynamo=True, verbose=False)
    return as_bytes(program)


def directly(model: nn.Module, args: tuple[Tensor, ...]) -> bytes:
    return as_bytes(torch.onnx.export(model, args, dynamo=True, verbose=False))


def by_tracing(model: nn.Module, args: tuple[Tensor, ...]) -> bytes:
    buffer = io.BytesIO()
    torch.onnx.export(model, args, buffer, dynamo=False)
    return buffer.getvalue()


def as_bytes(program: torch.onnx.ONNXProgram | None) -> bytes:
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("convert", [directly, through_export, by_tracing])
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_answers_the_same(name: str, convert: Callable[..., bytes]):
    make, args = MODELS[name]
    model = make().eval()
    session = onnxruntime.InferenceSession(convert(model, args), providers=["CPUExecutionProvider"])
    inputs = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
    (got,) = session.run(None, inputs)
    torch.testing.assert_close(torch.from_numpy(got), model(*args).detach())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "operator"), [("softmax", "Softmax"), ("log_softmax", "LogSoftmax")]
)
def test_a_softmax_is_one_operator(name: str, operator: str):
    make, args = MODELS[name]
    program = torch.onnx.export(make(), args, dynamo=True, verbose=False)
    assert program is not None
    assert [node.op_type for node in program.model.graph] == [operator]


@pytest.mark.filterwarnings("ignore")
def test_torchs_label_smoothing_is_left_out_and_ours_is_not():
    answers = []
    for loss in (custom_ops.CrossEntropyLoss, nn.CrossEntropyLoss):
        torch.manual_seed(0)
        model, args = Head(loss(label_smoothing=0.3)), MODELS["labels"][1]
        session = onnxruntime.InferenceSession(directly(model, args))
        inputs = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
        answers.append(float(session.run(None, inputs)[0]) - float(model(*args)))
    assert abs(answers[0]) < 1e-6
    assert abs(answers[1]) > 1e-3
