"""What goes on around a fused head: modes, wrappers, copies, and what people do with its output."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import custom_ops
from custom_ops.fuse.lazy import LazyLogits

from .conftest import CLASSES, FEATURES, fused, outcome
from .test_heads import Model, loss


def batch(*rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*rows, FEATURES, requires_grad=True), torch.randint(CLASSES, rows)


def logits(**options: Any) -> tuple[Any, Tensor]:
    """Lazy ones, and what they stand for."""
    head = custom_ops.fuse(nn.Linear(FEATURES, CLASSES), **options)
    x, _ = batch(3, 5)
    return head(x), F.linear(x, head.weight, head.bias)


# Training, evaluation, precision


def test_in_evaluation_and_without_gradient_the_logits_are_real():
    model, (x, _) = custom_ops.fuse(Model(), "head"), batch(3, 5)
    with torch.no_grad():
        assert type(model(x)) is Tensor
    assert type(model(x)) is LazyLogits
    assert type(model.eval()(x)) is Tensor


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_loss_in_evaluation_without_memory_by_choice(mode: Any):
    model, (x, y) = Model().eval(), batch(3, 5)
    with mode():
        expected = loss(model, x, y), model(x).argmax(-1), model(x)[:, -1].topk(3).values
        custom_ops.fuse(model, "head", evaluation=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = loss(model, x, y), model(x).argmax(-1), model(x)[:, -1].topk(3).values
    torch.testing.assert_close(got, expected)
    assert fused(model) == 2


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool, same: Any):
    def program(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = model(x)
            assert z.dtype is torch.bfloat16
            if inside:
                found = F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=0.1)
                assert found.dtype is torch.float32
                return found
        return F.cross_entropy(z.float().flatten(0, 1), y.flatten())

    same(program, Model(), "head", dtype=torch.float32, rtol=3e-2, atol=2e-3)


def test_a_loss_inside_autocast_of_logits_from_outside(same: Any):
    def program(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(z.flatten(0, 1), y.flatten()) + z.log_softmax(-1).square().mean()

    same(program, Model(), "head", dtype=torch.float32, lazily=False)


def test_a_scaled_loss(same: Any):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    same(lambda m, x, y: scaler.scale(loss(m, x, y)), Model(), "head")


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("part", ["trunk", "model", "loss"])
def test_checkpoints(use_reentrant: bool, part: str, same: Any):
    def again(function: Any, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=use_reentrant)

    def program(model: Model, x: Tensor, y: Tensor) -> Tensor:
        if part == "loss":
            return again(lambda x: loss(model, x, y), x)
        if part == "model":
            return F.cross_entropy(again(model, x).flatten(0, 1), y.flatten())
        return F.cross_entropy(model.head(again(model.trunk, x)).flatten(0, 1), y.flatten())

    reentrant_model = use_reentrant and part == "model"  # it gives real logits, by no_grad
    same(program, Model(), "head", lazily=not reentrant_model)


def test_saved_tensors_hooks(same: Any):
    packed = []

    def program(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: packed.append(t.shape) or t.clone(), lambda t: t
        ):
            return loss(model, x, y)

    packed.clear()
    same(program, Model(), "head")
    assert (3, 5, CLASSES) not in packed[len(packed) // 2 :]


def test_gradients_add_up_and_a_graph_is_kept(same: Any):
    def program(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        first = loss(model, x, y)
        first.backward(retain_graph=True)
        first.backward(retain_graph=True)
        return first + loss(model, x, y)

    same(program, Model(), "head")


def test_a_gradient_penalty(same: Any):
    def program(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found = loss(model, x, y)
        (dx,) = torch.autograd.grad(found, x, create_graph=True)
        return found + dx.square().sum()

    same(program, Model(), "head")


# Compilation and transforms


def test_a_compiled_model_has_real_logits(same: Any):
    for fullgraph in (True, False):
        torch._dynamo.reset()
        compiled = []

        def program(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            compiled.append(torch.compile(loss, backend="aot_eager", fullgraph=fullgraph))  # noqa: B023
            return compiled[-1](model, x, y)  # noqa: B023

        same(program, Model(), "head", lazily=False)


def test_a_compiled_trunk_is_fused(same: Any):
    def program(model: Model, x: Tensor, y: Tensor) -> Tensor:
        features = torch.compile(model.trunk, backend="aot_eager")(x)
        return F.cross_entropy(model.head(features).flatten(0, 1), y.flatten())

    torch._dynamo.reset()
    same(program, Model(), "head")


def test_a_compiled_loss_breaks_the_graph_and_is_fused(same: Any):
    @torch.compile(backend="aot_eager")
    def compiled(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1) * 2, y.flatten())

    torch._dynamo.reset()
    same(lambda model, x, y: compiled(model(x), y), Model(), "head")


def test_torch_func_and_functional_call_get_their_gradients():
    model, (x, y) = Model(), batch(3, 5)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of(parameters: dict[str, Tensor]) -> Tensor:
        z = torch.func.functional_call(model, parameters, (x.detach(),))
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    expected = torch.func.grad(of)(parameters)
    custom_ops.fuse(model, "head")
    torch.testing.assert_close(torch.func.grad(of)(parameters), expected)
    leaves = {name: (2 * p).requires_grad_() for name, p in parameters.items()}
    got = torch.autograd.grad(of(leaves), list(leaves.values()))
    custom_ops.unfuse(model)
    torch.testing.assert_close(got, torch.autograd.grad(of(leaves), list(leaves.values())))


def test_an_exported_program_and_a_trace_have_real_logits():
    model, (x, _) = Model(), batch(3, 5)
    expected = model(x)
    custom_ops.fuse(model, "head")
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    traced = torch.fx.experimental.proxy_tensor.make_fx(model)(x)
    torch.testing.assert_close(traced(x), expected)


# Copies and files


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_fused_with_weights_of_its_own(way: str):
    model, (x, y) = custom_ops.fuse(Model(), "head"), batch(3, 5)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        other.head.weight.mul_(2)
    got = outcome(loss, other, x, y)
    assert fused(other) == 1
    assert fused(model) == 0
    torch.testing.assert_close(got, outcome(loss, custom_ops.unfuse(other), x, y))


def test_an_average_of_the_weights_copies_the_model():
    model, (x, y) = custom_ops.fuse(Model(), "head"), batch(3, 5)
    average = torch.optim.swa_utils.AveragedModel(model)
    loss(model, x, y).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    average.update_parameters(model)
    torch.testing.assert_close(
        loss(average, x, y), loss(custom_ops.unfuse(copy.deepcopy(average)), x, y)
    )


def test_data_parallel_on_the_cpu(same: Any):
    same(lambda model, x, y: loss(nn.DataParallel(model), x, y), Model(), "head")


def test_a_replica_uses_its_own_weights():
    head = custom_ops.fuse(nn.Linear(FEATURES, CLASSES))
    replica = head._replicate_for_data_parallel()
    replica.weight, replica.bias = torch.zeros(CLASSES, FEATURES), torch.zeros(CLASSES)
    x, _ = batch(3)
    assert not replica(x).sum()


# What people do with the output


def test_shape_and_kind_are_told_without_numbers():
    z, real = logits()
    for of in (z, z[:, 1:], z.float(), z.mT, z.detach(), z[0, 2]):
        assert type(of) is LazyLogits
    assert (z.shape, z.dtype, z.device, z.dim(), z.numel()) == (
        (real.shape, real.dtype, real.device, real.dim(), real.numel())
    )
    assert (z.stride(), z.is_contiguous(), z.is_leaf, z.requires_grad) == (
        (real.stride(), True, False, True)
    )
    assert not z.detach().requires_grad
    assert z.size(-1) == len(z[0, 0]) == CLASSES
    assert repr(z) == "LazyLogits(shape=(3, 5, 23), dtype=torch.float32, device=cpu)"
    assert str([z.mT]) == "[LazyLogits(shape=(3, 23, 5), dtype=torch.float32, device=cpu)]"
    assert torch.zeros_like(z).shape == z.new_ones(z.shape).shape == real.shape
    assert type(torch.empty_like(z, dtype=torch.int64)) is Tensor
    assert all(v.computed is None for v in (z, z[:, 1:]))


def test_some_rows_are_computed_alone():
    z, real = logits()
    with pytest.warns(UserWarning, match="topk"):
        torch.testing.assert_close(z[1, -1].topk(2), real[1, -1].topk(2))
    assert z.computed is None


def test_whoever_asks_for_all_of_it_gets_it():
    z, real = logits()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(z + 0, real)
        assert z.tolist() == z.detach().tolist() == (z + 0).tolist()
        torch.testing.assert_close(torch.from_numpy(z.detach().numpy()), real.detach())
        torch.testing.assert_close(z.data, real.data, check_stride=False)
        torch.testing.assert_close(z[0, 0, 0].item(), real[0, 0, 0].item())
        torch.testing.assert_close(copy.deepcopy(z.detach()) + 0, real.detach())
        torch.testing.assert_close(pickle.loads(pickle.dumps(z.detach())), real.detach())
        with pytest.raises(RuntimeError, match="numpy"):
            z.numpy()  # it requires grad, as the real ones
        assert z.data_ptr() == z.view(-1, CLASSES).data_ptr()
        assert "LazyLogits" in f"{z}"


def test_what_was_computed_is_told_once_with_the_line():
    model, (x, _) = custom_ops.fuse(Model(), "head"), batch(3, 5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            model(x).sigmoid()
    assert [(w.category, w.filename) for w in seen] == [(UserWarning, __file__)]
    assert "aten.sigmoid.default of (3, 5, 23) needs the logits" in str(seen[0].message)
    ((found, times),) = custom_ops.materialized(model).items()
    assert (found.operation, found.shape, times) == ("aten.sigmoid.default", (3, 5, CLASSES), 3)
    file, line = found.line.rsplit(":", 1)
    assert file == __file__
    assert "sigmoid" in Path(file).read_text().splitlines()[int(line) - 1]


def test_the_gradient_of_logits_whose_loss_was_fused_is_refused():
    model, (x, y) = custom_ops.fuse(Model(), "head"), batch(3, 5)
    z = model(x)
    found = F.cross_entropy(z.flatten(0, 1), y.flatten())
    with pytest.raises(RuntimeError, match="taken without the logits"):
        torch.autograd.grad(found, z)
    with pytest.raises(RuntimeError, match="expected register_hook before the loss"):
        z.register_hook(print)
    with pytest.raises(RuntimeError, match="expected retain_grad before the loss"):
        z.retain_grad()


def test_the_gradient_of_logits_that_is_asked_for_before_is_there(same: Any):
    def program(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = model(x)
        z.retain_grad()
        found = F.cross_entropy(z.flatten(0, 1), y.flatten())
        found.backward(retain_graph=True)
        return found + z.grad.square().sum()

    same(program, Model(), "head", lazily=False)


def test_a_leaf_made_of_logits_takes_their_gradient(same: Any):
    def program(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = model(x)
        leaf = z.detach().requires_grad_()
        F.cross_entropy(leaf.flatten(0, 1), y.flatten()).backward()
        return (z * leaf.grad).sum()

    same(program, Model(), "head", lazily=False)


def test_a_function_of_somebody_else_gets_the_numbers_and_gives_the_gradient(same: Any):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.save_for_backward(z)
            return z * z

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * g

    same(lambda model, x, y: Square.apply(model(x)).sum(), Model(), "head", lazily=False)


@pytest.mark.parametrize("what", ["input", "weight", "bias"])
def test_a_change_in_place_before_the_use_is_refused(what: str):
    head = custom_ops.fuse(nn.Linear(FEATURES, CLASSES))
    x, y = torch.randn(3, FEATURES), torch.randint(CLASSES, (3,))
    z = head(x)
    with torch.no_grad():
        {"input": x, "weight": head.weight, "bias": head.bias}[what].mul_(2)
    for use in (lambda: F.cross_entropy(z, y), lambda: z.sigmoid(), lambda: z.argmax(-1)):
        with pytest.raises(RuntimeError, match="changed in place before its logits were used"):
            use()


def test_logits_that_were_computed_outlive_a_step():
    head = custom_ops.fuse(nn.Linear(FEATURES, CLASSES))
    x, _ = batch(3)
    z = head(x)
    with pytest.warns(UserWarning, match="sigmoid"):
        before = z.sigmoid()
    with torch.no_grad():
        head.weight.mul_(2)
    torch.testing.assert_close(z.sigmoid(), before)


def test_a_shape_changed_in_place_is_refused():
    z, _ = logits()
    with pytest.raises(RuntimeError, match="changes the shape of logits in place"):
        z.squeeze_()


def test_a_bad_label_is_named():
    head = custom_ops.fuse(nn.Linear(FEATURES, CLASSES))
    with pytest.raises(IndexError, match=r"target.* is 23, out of range for 23 classes"):
        F.cross_entropy(head(torch.randn(2, FEATURES)), torch.tensor([1, 23]))


def test_an_empty_batch(same: Any):
    same(lambda head, x, y: F.cross_entropy(head(x), y, reduction="sum"), rows=(0,), lazily=False)


def test_one_vector(same: Any):
    same(lambda head, x, y: F.cross_entropy(head(x), y), rows=())
