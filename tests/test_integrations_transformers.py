"""Tiny random models: no network, no files."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="needs the extra [transformers]")

from training import torchvision_cpu

torchvision_cpu.ensure_importable()  # transformers imports it where it is installed

import transformers  # noqa: E402

from custom_ops.integrations.transformers import FusedCausalLM  # noqa: E402

CLASSES = 97
BATCH, CONTEXT = 3, 10

SIZES = {
    "vocab_size": CLASSES,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options))


def gpt2() -> Any:  # tied, as it comes
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=CLASSES, bos_token_id=0, eos_token_id=0, **sizes, **dropouts
    )
    return transformers.GPT2LMHeadModel(config)


def gemma2() -> Any:
    config = transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)
    model = transformers.Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that the cap caps
    return model


MODELS = {
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "gemma2": gemma2,
}


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, CLASSES, (BATCH, CONTEXT))
    labels = tokens.clone()
    labels[0, :4] = labels[2, 7:] = -100
    attention_mask = torch.ones_like(tokens)
    attention_mask[2, 7:] = 0
    return {"input_ids": tokens, "labels": labels, "attention_mask": attention_mask}


def loss_and_gradients(called: Any, model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = called(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("items", [None, 31, torch.tensor(31)], ids=["mean", "int", "tensor"])
def test_loss_and_all_gradients_are_the_models_own(name: str, items: Any):
    model = MODELS[name]().train()
    inputs = batch() | {"num_items_in_batch": items}
    expected = loss_and_gradients(model, model, **inputs)
    got = loss_and_gradients(FusedCausalLM(model), model, **inputs)
    torch.testing.assert_close(got, expected)


def test_labels_that_are_shifted_already():
    model, inputs = llama().train(), batch()
    inputs["shift_labels"] = inputs["labels"].roll(-1, 1)
    expected = loss_and_gradients(model, model, **inputs)
    torch.testing.assert_close(loss_and_gradients(FusedCausalLM(model), model, **inputs), expected)


@pytest.mark.parametrize("name", MODELS)
def test_training_with_labels_builds_no_logits(name: str, monkeypatch: pytest.MonkeyPatch):
    from custom_ops.kernels import last_layer

    # Blocks of five rows: the logits of one are fewer than anything N × C.
    monkeypatch.setattr(last_layer, "BUDGET", last_layer.Budget(5 * CLASSES * 4, least=5))
    model, inputs = MODELS[name]().train(), batch()
    rows = BATCH * CONTEXT - BATCH - 7  # that have a label

    class Largest(TorchDispatchMode):
        rows = 0.0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and CLASSES in t.shape:
                    found = t.untyped_storage().nbytes() / (4 * CLASSES)
                    # The weights and their gradients are 16 × C.
                    self.rows = max(self.rows, 0 if found == 16 else found)
            return out

    called = FusedCausalLM(model)
    with Largest() as plain:
        model(**inputs).loss.backward()
    with Largest() as fused:
        called(**inputs).loss.backward()
    assert plain.rows >= rows
    assert fused.rows <= 5


def test_without_labels_and_in_evaluation_it_is_the_model():
    model, inputs = llama(), batch()
    fused = FusedCausalLM(model)
    assert fused.train()(**inputs).logits is None
    tokens = {name: value for name, value in inputs.items() if name != "labels"}
    assert torch.equal(fused(**tokens).logits, model(**tokens).logits)
    model.eval()
    evaluated, expected = fused.eval()(**inputs), model(**inputs)
    assert torch.equal(evaluated.logits, expected.logits)
    assert torch.equal(evaluated.loss, expected.loss)


def test_the_model_is_left_as_it_was():
    model = gpt2().train()
    model.transformer.drop.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    fused = FusedCausalLM(model)
    assert [module.training for module in model.modules()] == modes
    assert fused.model is model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_models_that_cannot_be_served_are_refused():
    with pytest.raises(TypeError, match="model must be a PreTrainedModel, got Linear"):
        FusedCausalLM(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaModel"):
        FusedCausalLM(llama().model)
    other_loss = llama()
    other_loss.loss_function = lambda **_: None
    with pytest.raises(ValueError, match="the loss of LlamaForCausalLM is not ForCausalLMLoss"):
        FusedCausalLM(other_loss)
    scaled = transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, logit_scale=0.25))
    with pytest.raises(ValueError, match="CohereForCausalLM does more to its logits"):
        FusedCausalLM(scaled)
