"""The modules beside torch's: arguments, representation, state, copies, and the warning of old."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.testing._internal.common_modules import module_db

import custom_ops

pytestmark = pytest.mark.usefixtures("backend")

OURS = {
    nn.Softmax: custom_ops.Softmax,
    nn.LogSoftmax: custom_ops.LogSoftmax,
    nn.CrossEntropyLoss: custom_ops.CrossEntropyLoss,
}


@pytest.fixture(params=OURS, ids=lambda c: c.__name__)
def theirs(request):
    return request.param


def test_torchs_own_module_samples_agree(theirs):
    (info,) = (i for i in module_db if i.module_cls is theirs)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=True, training=True
    )
    for sample in samples:
        made, called = sample.constructor_input, sample.forward_input
        if "options" in made.kwargs:
            made.kwargs.pop("options")
        ours = OURS[theirs](*made.args, **made.kwargs)
        builtin = theirs(*made.args, **made.kwargs)
        got, want = (m(*called.args, **called.kwargs) for m in (ours, builtin))
        torch.testing.assert_close(got, want, equal_nan=True)
        v = torch.randn_like(want)
        torch.testing.assert_close(
            *(torch.autograd.grad(y, called.args[0], v) for y in (got, want)), equal_nan=True
        )


def test_constructor_arguments_have_torchs_names_order_and_defaults(theirs):
    want = list(inspect.signature(theirs.__init__).parameters.values())
    got = list(inspect.signature(OURS[theirs].__init__).parameters.values())
    assert [(p.name, p.default) for p in got[: len(want)]] == [(p.name, p.default) for p in want]
    assert all(p.kind == p.KEYWORD_ONLY for p in got[len(want) :])


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch before 2.13")
def test_torchs_own_samples_of_the_last_layer_agree():
    (info,) = (i for i in module_db if i.module_cls is nn.LinearCrossEntropyLoss)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=True, training=True
    )
    for sample in samples:
        made, called = sample.constructor_input, sample.forward_input
        ours = custom_ops.LinearCrossEntropyLoss(*made.args, **made.kwargs)
        builtin = nn.LinearCrossEntropyLoss(*made.args, **{**made.kwargs, "options": None})
        builtin.load_state_dict(ours.state_dict())
        got, want = (m(*called.args, **called.kwargs) for m in (ours, builtin))
        torch.testing.assert_close(got, want, equal_nan=True)
        for a, b in zip(
            torch.autograd.grad(got.sum(), [called.args[0], *ours.parameters()]),
            torch.autograd.grad(want.sum(), [called.args[0], *builtin.parameters()]),
            strict=True,
        ):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch before 2.13")
def test_the_last_layers_constructor_has_torchs_names_and_defaults():
    want = inspect.signature(nn.LinearCrossEntropyLoss.__init__).parameters.values()
    got = inspect.signature(custom_ops.LinearCrossEntropyLoss.__init__).parameters
    for p in want:
        assert (got[p.name].default, got[p.name].kind) == (p.default, p.kind)


def test_from_linear_keeps_a_tied_weight():
    embedding, layer = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    layer.weight = embedding.weight
    loss = custom_ops.LinearCrossEntropyLoss.from_linear(layer, label_smoothing=0.1)
    loss(embedding(torch.tensor([1, 2])), torch.tensor([3, 4])).backward()
    copy = embedding.weight.detach().clone().requires_grad_()
    h = nn.functional.embedding(torch.tensor([1, 2]), copy)
    nn.functional.cross_entropy(h @ copy.T, torch.tensor([3, 4]), label_smoothing=0.1).backward()
    torch.testing.assert_close(embedding.weight.grad, copy.grad)
    assert sum(p is embedding.weight for p in nn.ModuleList([embedding, loss]).parameters()) == 1


def test_the_last_layer_survives_pickle_and_copies():
    loss = custom_ops.LinearCrossEntropyLoss(4, 7, bias=True, z_loss=0.1, block_rows=3)
    x, t = torch.randn(5, 4), torch.arange(5)
    for same in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(same(x, t), loss(x, t))
        assert repr(same) == repr(loss)
    assert "z_loss=0.1, block_rows=3" in repr(loss)


def test_positional_arguments_mean_what_they_mean_in_torch():
    weight = torch.rand(3)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        ours = custom_ops.CrossEntropyLoss(weight, False, 1, True, "mean", 0.1)
    assert (ours.reduction, ours.ignore_index, ours.label_smoothing) == ("sum", 1, 0.1)
    assert ours.weight is weight


def test_they_are_instances_of_torchs_classes(theirs):
    assert issubclass(OURS[theirs], theirs)


def test_representation_names_what_is_not_the_default():
    assert repr(custom_ops.Softmax(1)) == "Softmax(dim=1)"
    assert repr(custom_ops.CrossEntropyLoss()) == "CrossEntropyLoss()"
    loss = custom_ops.CrossEntropyLoss(reduction="sum", softcap=30.0, dtype=torch.float32)
    assert repr(loss) == "CrossEntropyLoss(reduction='sum', softcap=30.0, dtype=torch.float32)"


@pytest.fixture
def loss():
    return custom_ops.CrossEntropyLoss(
        torch.rand(4), z_loss=0.1, softcap=3.0, logit_scale=0.5, return_stats=True
    )


def outputs(module):
    torch.manual_seed(1)
    loss, stats = module(torch.randn(3, 4), torch.tensor([0, 3, 1]))
    return loss, *stats


def test_pickle_deepcopy_and_torch_save_keep_everything(loss):
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.load(buffer, weights_only=False),
    ):
        torch.testing.assert_close(outputs(copied), outputs(loss), rtol=0, atol=0)


def test_state_dict_is_interchangeable_with_torchs(loss):
    theirs = nn.CrossEntropyLoss(torch.zeros(4))
    theirs.load_state_dict(loss.state_dict())
    assert torch.equal(theirs.weight, loss.weight)
    other = custom_ops.CrossEntropyLoss(torch.zeros(4))
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(other.weight, loss.weight)


def test_weight_follows_the_module_to_another_dtype(loss):
    assert loss.double().weight.dtype == torch.float64


def test_normalizer_is_an_argument_of_the_call():
    loss, x, t = custom_ops.CrossEntropyLoss(), torch.randn(3, 4), torch.tensor([0, 1, 2])
    torch.testing.assert_close(loss(x, t, normalizer=6), loss(x, t) / 2)


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_implicit_dim_is_torchs_choice_with_torchs_warning(name, shape):
    x = torch.randn(shape)
    with pytest.warns(UserWarning, match="Implicit dimension choice") as theirs:
        want = getattr(nn, name)()(x)
    with pytest.warns(UserWarning, match="Implicit dimension choice") as ours:
        got = getattr(custom_ops, name)()(x)
    torch.testing.assert_close(got, want)
    assert str(ours[0].message) == str(theirs[0].message)
    assert ours[0].filename == __file__


def test_a_model_trains_with_them():
    model = nn.Sequential(nn.Linear(4, 3), custom_ops.LogSoftmax(1))
    x, t = torch.randn(64, 4), torch.randint(3, (64,))
    optimizer, loss = torch.optim.SGD(model.parameters(), 0.5), custom_ops.CrossEntropyLoss()
    history = []
    for _ in range(20):
        optimizer.zero_grad()
        c = loss(model(x), t)
        c.backward()
        optimizer.step()
        history.append(c.item())
    assert history[-1] < history[0]


class Adapter(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def hooked(register: str) -> nn.Linear:
    layer = nn.Linear(3, 5)
    getattr(layer, register)(lambda *_: None)
    return layer


def overridden() -> nn.Linear:
    layer = nn.Linear(3, 5)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


MORE_THAN_LINEAR = {
    "a forward hook": lambda: hooked("register_forward_hook"),
    "a forward pre-hook": lambda: hooked("register_forward_pre_hook"),
    "a backward hook": lambda: hooked("register_full_backward_hook"),
    "the older weight_norm": lambda: torch.nn.utils.weight_norm(nn.Linear(3, 5)),
    "the older spectral_norm": lambda: torch.nn.utils.spectral_norm(nn.Linear(3, 5)),
    "pruning": lambda: prune.l1_unstructured(nn.Linear(3, 5), "weight", 2),
    "an adapter": lambda: Adapter(3, 5),
    "a forward of its own": overridden,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("what", MORE_THAN_LINEAR)
def test_from_linear_refuses_a_layer_that_is_more(what):
    with pytest.raises(ValueError, match=r"would be left out; expected a plain nn\.Linear"):
        custom_ops.LinearCrossEntropyLoss.from_linear(MORE_THAN_LINEAR[what]())


def test_a_hook_that_comes_later_is_refused_by_the_call():
    layer = nn.Linear(3, 5)
    loss = custom_ops.LinearCrossEntropyLoss.from_linear(layer)
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="with a forward hook"):
        loss(torch.zeros(2, 3), torch.tensor([0, 1]))


def test_from_linear_takes_nothing_else():
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear, got Conv1d"):
        custom_ops.LinearCrossEntropyLoss.from_linear(nn.Conv1d(3, 5, 1))


def test_a_parametrized_layer_is_taken_with_the_weight_it_computes():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 5))
    loss = custom_ops.LinearCrossEntropyLoss.from_linear(layer)
    x, target = torch.randn(2, 3), torch.tensor([0, 1])
    want = torch.nn.functional.cross_entropy(layer(x), target)
    torch.testing.assert_close(loss(x, target), want)
