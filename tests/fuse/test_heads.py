"""Heads that are more than an nn.Linear: fused where that is exact, the real logits otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import custom_ops

from .conftest import CLASSES, FEATURES, fused


class Model(nn.Module):
    """A trunk and a head; the loss is the caller's."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES) if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).tanh())


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def with_lora(model: Model) -> Model:
    class Lora(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer = layer
            self.A = nn.ModuleList([nn.Linear(FEATURES, r, bias=False) for r in (2, 3)])
            self.B = nn.ModuleList([nn.Linear(r, CLASSES, bias=False) for r in (2, 3)])

        def forward(self, x: Tensor) -> Tensor:
            result = self.layer(x)
            for A, B in zip(self.A, self.B, strict=True):
                result = result + B(A(F.dropout(x, 0.0))) * 0.7
            return result

    model.head = Lora(model.head)
    return model


def with_tied_embedding(model: Model) -> Model:
    model.embedding = nn.Embedding(CLASSES, FEATURES)
    model.head.weight = model.embedding.weight
    return model


def with_parametrization(model: Model) -> Model:
    class Symmetric(nn.Module):
        def forward(self, W: Tensor) -> Tensor:
            return W + W.flip(0)

    parametrize.register_parametrization(model.head, "weight", Symmetric())
    return model


def on_the_head(change: Any, *args: Any) -> Any:
    def changed(model: Model) -> Model:
        change(model.head, *args)
        return model

    return changed


HEADS = {
    "plain": lambda model: model,
    "without bias": lambda model: Model(nn.Linear(FEATURES, CLASSES, bias=False)),
    "two adapters": with_lora,
    "tied": with_tied_embedding,
    "weight_norm": on_the_head(parametrizations.weight_norm),
    "older weight_norm": on_the_head(nn.utils.weight_norm),
    "spectral_norm": on_the_head(parametrizations.spectral_norm),
    "parametrization": with_parametrization,
    "pruned": on_the_head(prune.random_unstructured, "weight", 0.3),
    "as many classes as features": lambda model: Model(nn.Linear(FEATURES, FEATURES)),
    "frozen weight": on_the_head(lambda head: head.weight.requires_grad_(False)),
    "frozen head": on_the_head(lambda head: head.requires_grad_(False)),
    "a pre-hook": on_the_head(lambda h: h.register_forward_pre_hook(lambda m, a: (2 * a[0],))),
    "a hook that looks": on_the_head(lambda h: h.register_forward_hook(lambda m, a, z: None)),
    "a hook that scales": on_the_head(lambda h: h.register_forward_hook(lambda m, a, z: z / 3)),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("kind", HEADS)
def test_the_head_is_fused(kind: str, same: Any):
    model = HEADS[kind](Model())
    if kind == "spectral_norm":
        model.eval()(torch.zeros(1, FEATURES))  # its power iteration goes on in training

        def program(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            model.load_state_dict(state)
            return loss(model, x, y)

        state = {name: t.double() for name, t in model.train().state_dict().items()}
    else:
        program = loss
    if kind == "as many classes as features":
        program = lambda m, x, y: loss(m, x, y % FEATURES)  # noqa: E731
    same(program, model, "head")


def with_full_backward_hook(model: Model) -> Model:
    def double(module: nn.Module, given: Any, asked: Any) -> Any:
        return (3 * given[0],)

    model.head.register_full_backward_hook(double)
    return model


def with_hooked_output(model: Model) -> Model:
    model.head.register_forward_hook(lambda m, a, z: z.register_hook(lambda g: 2 * g) and None)
    return model


def with_another_forward(model: Model) -> Model:
    class Cosine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))

    return Model(Cosine(FEATURES, CLASSES))


def with_gradient_reversal(model: Model) -> Model:
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.view_as(z)

        @staticmethod
        def backward(ctx: Any, dz: Tensor) -> Tensor:
            return -dz

    model.head.register_forward_hook(lambda m, a, z: Reverse.apply(z))
    return model


def with_a_weight_of_another_class(model: Model) -> Model:
    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = super().__torch_function__(func, types, args, kwargs or {})
            return 2 * result if func is F.linear else result

    weight = torch.randn(CLASSES, FEATURES, dtype=torch.double).as_subclass(Doubled)
    model.head.weight = nn.Parameter(weight)
    return model


UNFUSED = {
    "a backward hook": with_full_backward_hook,
    "a hook on the output": with_hooked_output,
    "a backward pre-hook": on_the_head(
        lambda h: h.register_full_backward_pre_hook(lambda m, g: (2 * g[0],))
    ),
    "another forward": with_another_forward,
    "a Function of its own": with_gradient_reversal,
    "a retained gradient": on_the_head(
        lambda h: h.register_forward_hook(lambda m, a, z: z.retain_grad())
    ),
    "a hook on the node": on_the_head(
        lambda h: h.register_forward_hook(
            lambda m, a, z: z.grad_fn.register_prehook(lambda g: (2 * g[0],)) and None
        )
    ),
    "one class": lambda model: Model(nn.Linear(FEATURES, 1)),
    "a weight of another class": with_a_weight_of_another_class,
    "a weight that DeepSpeed partitions": on_the_head(lambda h: setattr(h.weight, "ds_id", 0)),
}


@pytest.mark.parametrize("kind", UNFUSED)
def test_the_head_gives_real_logits(kind: str, same: Any):
    program = loss
    if kind == "one class":
        program = lambda m, x, y: m(x).square().mean()  # noqa: E731
    model = same(program, UNFUSED[kind](Model()), "head", lazily=False)
    assert fused(model) == 0
    assert custom_ops.materialized(model) or kind == "another forward"


def test_a_global_backward_hook_sees_the_gradient_of_the_logits(same: Any):
    from torch.nn.modules.module import register_module_full_backward_hook

    def double(module: nn.Module, given: Any, asked: Any) -> Any:
        return (2 * given[0],) if given[0] is not None and isinstance(module, nn.Linear) else None

    handle = register_module_full_backward_hook(double)
    try:
        assert fused(same(loss, Model(), "head", lazily=False)) == 0
    finally:
        handle.remove()


def test_a_backward_hook_on_the_model_works_beside_a_loss_inside(same: Any):
    class WithLoss(Model):
        def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
            logits = super().forward(x)
            return F.cross_entropy(logits.flatten(0, 1), y.flatten()), logits

    model = WithLoss()
    seen = []
    model.register_full_backward_hook(lambda m, given, asked: seen.append(asked[0]))
    same(lambda m, x, y: m(x, y)[0], model, "head")
    torch.testing.assert_close(seen[0], seen[1])


def test_several_losses_of_one_head(same: Any):
    def program(model: Model, x: Tensor, y: Tensor) -> Tensor:
        features = model.trunk(x)
        next_one = F.cross_entropy(model.head(features)[:, :-1].mT, y[:, 1:])
        return next_one + 0.3 * F.cross_entropy(model.head(features.tanh())[:, :-2].mT, y[:, 2:])

    assert fused(same(program, Model(), "head")) == 2


def test_several_heads(same: Any):
    def program(model: nn.ModuleList, x: Tensor, y: Tensor) -> Tensor:
        return sum(F.cross_entropy(head(x).mT, y) for head in model)

    model = nn.ModuleList([nn.Linear(FEATURES, CLASSES) for _ in range(3)])
    assert fused(same(program, model, ["0", model[1], "2"])) == 3


def test_a_quantised_head_runs_as_it_is():
    model = torch.ao.quantization.quantize_dynamic(Model(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(TypeError, match="or hold one"):
        custom_ops.fuse(model, "head")


def test_a_weight_that_is_fake_quantised_is_fused(same: Any):
    qat = torch.ao.nn.qat.Linear(
        FEATURES, CLASSES, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    )
    model = Model(qat)
    with torch.no_grad():
        model(torch.randn(3, FEATURES))  # the observers settle
    model.apply(torch.ao.quantization.disable_observer)
    same(loss, model, "head", dtype=torch.float32)


def test_a_weight_that_is_freed_before_the_loss_is_an_error_that_says_what_to_set():
    head = custom_ops.fuse(nn.Linear(FEATURES, CLASSES))
    z = head(torch.randn(3, FEATURES))
    head.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"freed.*expected.*reshard_after_forward=False"):
        F.cross_entropy(z, torch.zeros(3, dtype=torch.long))


def test_a_head_is_found_or_named():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model()
            self.inner.get_output_embeddings = lambda: self.inner.head

    model = custom_ops.fuse(Wrapped())
    assert model.inner.head._forward_pre_hooks
    assert not model.inner.trunk._forward_pre_hooks
    with pytest.raises(ValueError, match=r"Model has no get_output_embeddings.*trunk, head"):
        custom_ops.fuse(Model())
    with pytest.raises(ValueError, match="Model has no layer 'lm_head'"):
        custom_ops.fuse(Model(), "lm_head")
    with pytest.raises(TypeError, match="one, got Embedding"):
        custom_ops.fuse(nn.Embedding(3, 4), [nn.Embedding(3, 4)])


def test_fuse_changes_hooks_alone_and_unfuse_takes_them_back():
    model = with_tied_embedding(Model())
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = list(model.state_dict())
    assert custom_ops.fuse(custom_ops.fuse(model, "head"), "head") is model
    assert len(model.head._forward_pre_hooks) == 1
    assert type(model.head) is nn.Linear
    assert list(model.state_dict()) == state
    assert model.head.weight is model.embedding.weight
    assert custom_ops.unfuse(model) is model
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
