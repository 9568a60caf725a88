"""Models of transformers and what trains them, beside the same without `fuse`; tiny and random."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs the extra [transformers]")

from training import torchvision_cpu

torchvision_cpu.ensure_importable()  # transformers imports it where it is installed

import transformers  # noqa: E402

import custom_ops  # noqa: E402

from .conftest import fused  # noqa: E402

#: PEFT and TRL warn with classes of their own, which xdist cannot hand on.
pytestmark = pytest.mark.filterwarnings("ignore")

C = 97


def llama(**options: Any) -> Any:
    sizes = {"vocab_size": C, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, **options
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(1, C, (3, 10))
    labels = tokens.clone()
    labels[0, :4] = labels[2, 7:] = -100
    mask = torch.ones_like(tokens)
    mask[2, 7:] = 0
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


# Architectures


@pytest.fixture(scope="module")
def architectures() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
        yield importlib.import_module("architectures")


QUICK = [
    ("causal", "gemma2", "Gemma2ForCausalLM"),
    ("causal", "cohere", "CohereForCausalLM"),
    ("causal", "granite", "GraniteForCausalLM"),
    ("causal", "gpt2", "GPT2LMHeadModel"),
    ("causal", "mixtral", "MixtralForCausalLM"),
    ("causal", "mamba", "MambaForCausalLM"),
    ("masked", "bert", "BertForMaskedLM"),
    ("sequence to sequence", "t5", "T5ForConditionalGeneration"),
]


def exact(result: Any) -> bool:
    return result.float32 < 1e-4 and result.bfloat16 < 0.2 and result.losses and not result.computed


@pytest.mark.parametrize("name", QUICK, ids=lambda name: name[1])
def test_an_architecture_has_its_own_loss_and_gradients(name: Any, architectures: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = architectures.compared(lambda: architectures.built(*name), architectures.batch)
    assert exact(result), result


def test_a_model_that_sees_keeps_its_image(architectures: Any):
    make, inputs = architectures.SEVERAL["llava"]
    assert exact(architectures.compared(make, inputs))
    model = custom_ops.fuse(make().train())
    given = inputs(model)
    other = model(**given | {"pixel_values": given["pixel_values"] + 1}).loss
    assert other != model(**given).loss


def test_a_model_that_writes_into_its_logits_has_real_ones(architectures: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = architectures.compared(architectures.chameleon, architectures.batch)
    assert (result.float32, result.bfloat16, result.losses) == (0, 0, 0)
    assert "index_put_" in result.computed


@pytest.mark.audit
@pytest.mark.timeout(3000)
def test_every_architecture_that_can_be_built_small(architectures: Any):
    warnings.simplefilter("ignore")
    results = []
    for _, model_type, compare in architectures.architectures():
        try:
            results.append(compare())
        except Exception:  # no tiny one of this type
            print(model_type)
    wrong = [r for r in results if r.float32 >= 1e-4 or r.bfloat16 >= 0.2]
    assert not wrong
    assert sum(map(exact, results)) >= 60


# The output


def test_the_output_holds_its_logits_and_generation_is_as_before():
    model, inputs = llama(), batch()
    tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    sure = {"max_new_tokens": 4, "do_sample": False}
    expected, written = model.train()(**inputs), model.eval().generate(**tokens, **sure)
    custom_ops.fuse(model)
    out = model.train()(**inputs)
    torch.testing.assert_close(out.loss, expected.loss)
    assert out.logits.shape == (3, 10, C)
    with pytest.warns(UserWarning, match="mul"):
        torch.testing.assert_close(out.logits.clone() * 1j, expected.logits * 1j)
    assert torch.equal(model.eval().generate(**tokens, **sure), written)
    assert torch.equal(model.train().generate(**tokens, **sure), written)


def test_a_saved_model_is_the_same_file(tmp_path: Path):
    model = llama(tie_word_embeddings=True)
    state = copy.deepcopy(model.state_dict())
    custom_ops.fuse(model).save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(dict(again.state_dict()), dict(state))


# What trains them


class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(1, C, (9,), generator=generator)
        labels = tokens.clone()
        labels[: 1 + index % 5] = -100
        return {"input_ids": tokens, "labels": labels}


def trained(model: Any, folder: Path, **options: Any) -> dict[str, Tensor]:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Tokens(), eval_dataset=Tokens())
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    return {n: p.detach() for n, p in model.named_parameters()} | {"loss": torch.tensor(loss)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"average_tokens_across_devices": False},
    ],
    ids=lambda options: "".join(options) or "defaults",
)
def test_the_trainer(options: dict[str, Any], tmp_path: Path):
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    expected = trained(llama(), tmp_path, **options)
    model = custom_ops.fuse(llama())
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if "bf16" in options else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(trained(model, tmp_path, **options), expected, **tolerance)
    assert fused(model) >= 4
    assert not custom_ops.materialized(model)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trl(smoothing: float, tmp_path: Path):
    # Without smoothing TRL (1.16) calls a last layer of its own, which reads the weight.
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    table = datasets.table.InMemoryTable.from_pylist(
        [{"input_ids": list(range(3 + n, 12 + n))} for n in range(8)]
    )
    rows = datasets.Dataset(table, fingerprint="rows")
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{n}": n for n in range(3, C)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Fast(WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )

    def weights(model: Any) -> dict[str, Tensor]:
        arguments = trl.SFTConfig(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=0.1,
            optim="sgd",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            label_smoothing_factor=smoothing,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
        return {n: p.detach() for n, p in model.named_parameters()}

    expected = weights(llama())
    model = custom_ops.fuse(llama())
    torch.testing.assert_close(weights(model), expected, rtol=1e-4, atol=1e-6)
    assert not custom_ops.materialized(model)
    assert (fused(model) > 0) == (smoothing > 0)


PEFT = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "a saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "rslora with a bias": {"target_modules": ["lm_head"], "use_rslora": True, "lora_bias": True},
    "two adapters": {"target_modules": ["lm_head"]},
}


@pytest.mark.parametrize("kind", PEFT)
def test_an_adapter_on_the_head_is_trained(kind: str):
    peft = pytest.importorskip("peft", reason="needs peft")

    def adapted() -> Any:
        config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **PEFT[kind])
        model = peft.get_peft_model(llama(), config)
        if kind == "two adapters":
            model.add_adapter("other", config)
            model.base_model.set_adapter(["default", "other"])
        return model.train()

    inputs = batch()

    def step(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return got | {"loss": loss.detach()}

    model = adapted()
    expected = step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(step(custom_ops.fuse(model)), expected, rtol=1e-4, atol=1e-6)
    assert any("lm_head" in name for name in expected)
    if kind != "dora":
        assert fused(model) == 1
        assert not custom_ops.materialized(model)


def test_an_adapter_that_came_after_is_right_though_not_fused():
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(custom_ops.fuse(llama()), config).train()
    inputs = batch()
    with pytest.warns(UserWarning, match="needs the logits"):
        got = model(**inputs).loss
    torch.testing.assert_close(got, custom_ops.unfuse(model)(**inputs).loss)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate(mixed_precision: str):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    inputs = batch()

    def step(model: Any) -> dict[str, Tensor]:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        out = model(**inputs)
        assert out.logits.dtype is torch.float32
        accelerator.backward(out.loss)
        optimizer.step()
        return {n: p.detach() for n, p in model.named_parameters()}

    model = custom_ops.fuse(llama())
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if mixed_precision == "bf16" else {}
    torch.testing.assert_close(step(model), step(llama()), **tolerance)
    assert fused(model) == 1
    assert not custom_ops.materialized(model)


def test_lightning(tmp_path: Path):
    lightning = pytest.importorskip("pytorch_lightning", reason="needs Lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(C, 8)
            self.head = nn.Linear(8, C)

        def training_step(self, given: dict[str, Tensor], _: int) -> Tensor:
            logits = self.head(self.embedding(given["input_ids"]))
            self.log("accuracy", (logits.argmax(-1) == given["labels"]).float().mean())
            return nn.functional.cross_entropy(logits.transpose(1, 2), given["labels"])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    def weights(module: Any) -> dict[str, Tensor]:
        trainer = lightning.Trainer(
            max_steps=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, torch.utils.data.DataLoader(Tokens(), 4))
        return dict(module.state_dict())

    module = custom_ops.fuse(Module(), "head")
    torch.testing.assert_close(weights(module), weights(Module()))
    assert fused(module) == 4
    assert not custom_ops.materialized(module)
