"""Train a step of every tiny architecture of transformers with and without its logits; compare.

Each model is random and small, and runs its own code and its own loss: labels with −100, padding,
and the number of items of the whole batch where it takes one. The loss and the gradient of every
parameter must be the same. The table goes to docs/architectures.md.
"""

from __future__ import annotations

import argparse
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import custom_ops
from custom_ops.fuse.head import Head
from training import torchvision_cpu

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torchvision_cpu.ensure_importable()  # transformers imports it where it is installed

import transformers  # noqa: E402
from transformers.models.auto import configuration_auto, modeling_auto  # noqa: E402

C = 97  # classes
LARGEST = 2_000_000  # parameters
#: What a tiny model has, by any name that a configuration knows it under.
NAMES = {
    C: "vocab_size",
    32: "hidden_size n_embd d_model emb_dim embedding_size word_embed_proj_dim d_embed "
    "attention_hidden_size rnn_hidden_size",
    48: "intermediate_size n_inner d_inner d_ff ffn_dim shared_intermediate_size encoder_ffn_dim "
    "decoder_ffn_dim moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers eos_token_id "
    "num_decoder_layers num_encoder_layers num_key_value_heads num_experts_per_tok "
    "linear_num_key_heads index_topk",
    4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads "
    "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts linear_num_value_heads qk_rope_head_dim qk_nope_head_dim "
    "index_n_heads rotary_dim",
    8: "head_dim d_kv v_head_dim kv_lora_rank state_size linear_key_head_dim linear_value_head_dim "
    "index_head_dim mamba_d_state mamba_d_head mamba_n_heads lru_width",
    1: "n_group topk_group n_shared_experts mamba_n_groups first_k_dense_replace "
    "decoder_start_token_id bos_token_id",
    64: "max_position_embeddings n_positions n_ctx mamba_d_ssm max_target_positions "
    "max_source_positions block_size",
    16: "q_lora_rank",
    0: "pad_token_id",
}
DROPOUTS = (
    "hidden_dropout_prob attention_probs_dropout_prob resid_pdrop embd_pdrop attn_pdrop dropout "
    "attention_dropout activation_dropout dropout_rate hidden_dropout encoder_layerdrop "
    "decoder_layerdrop embd_dropout layerdrop classifier_dropout output_dropout residual_dropout "
    "summary_first_dropout embedding_dropout emb_pdrop ff_dropout"
)
SIZES: dict[str, Any] = dict.fromkeys(DROPOUTS.split(), 0.0)
SIZES |= {name: value for value, names in NAMES.items() for name in names.split()}
#: For these model types: sizes instead, or None for the configuration's own.
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 longcat_flash youtu "
    "sarvam_mla axk1 axk2": {"head_dim": None, "num_key_value_heads": 4},
    "jamba qwen3_next qwen3_5_text qwen3_5_moe_text lfm3 kimi_linear bailing_hybrid "
    "qwen4_exp_text recurrent_gemma lfm2_moe": {"num_hidden_layers": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "esmc": {"num_key_value_heads": 4},
    "falcon": {"head_dim": None},
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 32},
    "prophetnet": {"num_hidden_layers": None},
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"v_head_dim": None},
    "zaya": {"num_experts_per_tok": 1},
}
INSTEAD = {name: sizes for names, sizes in OTHERS.items() for name in names.split()}


class Result(NamedTuple):
    """What a step of one architecture was, fused beside unfused."""

    model: str
    kind: str
    losses: int  #: fused in a step
    float32: float  #: the largest error of the loss and of any gradient, of its largest number
    bfloat16: float
    items: bool  #: whether the number of items was given too
    computed: str  #: what needed the logits


def built(kind: str, model_type: str, name: str) -> nn.Module:
    """Return the tiny model of this class."""
    configuration = configuration_auto.CONFIG_MAPPING[model_type]
    known = configuration().to_dict()
    sizes = SIZES | INSTEAD.get(model_type, {})
    given = {k: v for k, v in sizes.items() if v is not None and (k in known or k in ALWAYS)}
    given |= {k: v for k, v in INSTEAD.get(model_type, {}).items() if v is not None}
    if kind == "causal":
        given["is_decoder"] = True
    make = getattr(transformers, name)
    with torch.device("meta"):
        count = sum(p.numel() for p in make(configuration(**given)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    return make(configuration(**given))


#: Known to every configuration, whether it lists them or not.
ALWAYS = ("vocab_size", "hidden_size", "decoder_start_token_id", "pad_token_id")


def batch(model: nn.Module) -> dict[str, Any]:
    """Return tokens, labels with −100, and a mask of the padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, C - 1, (2, 16), generator=generator)
    labels = tokens.clone()
    labels[0, :3] = labels[1, 11:] = -100
    mask = torch.ones_like(tokens)
    mask[1, 11:] = 0
    given = {"input_ids": tokens, "labels": labels, "attention_mask": mask}
    taken = inspect.signature(model.forward).parameters
    return {name: t for name, t in given.items() if name in taken}


def step(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the loss of a step and the gradient of every parameter."""
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(**inputs).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return gradients | {"loss": loss.detach().clone()}


def error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference, as a part of the largest number of its tensor.

    Some gradients are 0 but for rounding, a key's bias for one: a tensor smaller than √ε of the
    largest gradient counts as that large.
    """
    if got.keys() != expected.keys():
        raise ValueError(f"gradients of {sorted(got.keys() ^ expected.keys())} on one side only")
    least = max(
        torch.finfo(t.dtype).eps ** 0.5 * float(t.abs().max())
        for n, t in expected.items()
        if n != "loss"
    )
    return max(
        float((got[n].float() - t.float()).abs().max()) / max(float(t.abs().max()), least)
        for n, t in expected.items()
    )


def compared(make: Callable[[], nn.Module], inputs_of: Callable[[Any], dict[str, Any]]) -> Result:
    """Return how the fused model's steps differ from its own."""
    errors, items = {}, False
    for dtype in (torch.float32, torch.bfloat16):
        model = make().to(dtype).train()
        inputs = inputs_of(model)
        inputs |= {n: t.to(dtype) for n, t in inputs.items() if torch.is_floating_point(t)}
        expected = step(model, inputs)
        counted = inputs | {"num_items_in_batch": torch.tensor(31)}
        try:
            with_items = step(model, counted)
            items = not torch.equal(with_items["loss"], expected["loss"])
        except TypeError:
            items = False
        custom_ops.fuse(model)
        errors[dtype] = error(step(model, inputs), expected)
        losses = sum(head.fused for head in heads(model))
        if items:
            errors[dtype] = max(errors[dtype], error(step(model, counted), with_items))
    computed = ", ".join(sorted({found.operation for found in custom_ops.materialized(model)}))
    name = type(model).__name__
    return Result(name, "", losses, errors[torch.float32], errors[torch.bfloat16], items, computed)


def heads(model: nn.Module) -> Iterator[Head]:
    """Yield the hooks of the heads."""
    for layer in model.modules():
        yield from (h for h in layer._forward_pre_hooks.values() if isinstance(h, Head))


KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence to sequence": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


def tiny(**sizes: Any) -> dict[str, Any]:
    """Return the sizes of a tiny text model."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared = {name: SIZES[name] for name in (*names, "vocab_size", "num_key_value_heads")}
    return shared | {"pad_token_id": 0} | sizes


def llava() -> nn.Module:
    """Return a Llava of a tiny CLIP and a tiny Llama."""
    seen = transformers.CLIPVisionConfig(**tiny(image_size=16, patch_size=8, projection_dim=32))
    text = transformers.LlamaConfig(**tiny())
    config = transformers.LlavaConfig(vision_config=seen, text_config=text, image_token_index=C - 1)
    return transformers.LlavaForConditionalGeneration(config)


def paligemma() -> nn.Module:
    """Return a PaliGemma of a tiny SigLIP and a tiny Gemma."""
    seen = tiny(model_type="siglip_vision_model", image_size=16, patch_size=8, projection_dim=32)
    text = tiny(model_type="gemma", head_dim=8)
    sizes: dict[str, Any] = {"image_token_id": C - 1, "projection_dim": 32, "hidden_size": 32}
    config = transformers.PaliGemmaConfig(vision_config=seen, text_config=text, **sizes)
    return transformers.PaliGemmaForConditionalGeneration(config)


def gemma3() -> nn.Module:
    """Return a Gemma 3 that sees, of a tiny SigLIP."""
    seen = tiny(model_type="siglip_vision_model", image_size=16, patch_size=8)
    text = tiny(head_dim=8, final_logit_softcapping=2.0)
    sizes: dict[str, Any] = {"image_token_id": C - 1, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(vision_config=seen, text_config=text, **sizes)
    return transformers.Gemma3ForConditionalGeneration(config)


def chameleon() -> nn.Module:
    """Return a Chameleon; it writes into the logits of its image tokens."""
    tokens = {"<image>": C - 1, "IMGIMGBS0Z": 5, "IMGIMGBS1Z": 6}
    config = transformers.ChameleonConfig(
        **tiny(vocabulary_map=tokens),
        vq_config={
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_embeddings": 2,
            "embed_dim": 8,
        }
        | {"latent_channels": 8, "num_res_blocks": 1, "resolution": 8},
    )
    return transformers.ChameleonForConditionalGeneration(config)


def whisper() -> nn.Module:
    """Return a Whisper that hears 32 frames."""
    sizes = {n: v for n, v in SIZES.items() if n in transformers.WhisperConfig().to_dict()}
    config = transformers.WhisperConfig(**sizes | {"max_source_positions": 16, "num_mel_bins": 8})
    return transformers.WhisperForConditionalGeneration(config)


def reads_images() -> nn.Module:
    """Return a ViT whose sequence a TrOCR writes down."""
    seen = transformers.ViTConfig(**tiny(image_size=16, patch_size=8))
    sizes = {n: v for n, v in SIZES.items() if n in transformers.TrOCRConfig().to_dict()}
    text = transformers.TrOCRConfig(**sizes | {"cross_attention_hidden_size": 32})
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(seen, text)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.VisionEncoderDecoderModel(config)


def with_image(model: nn.Module) -> dict[str, Any]:
    """Return a batch with an image of four tokens in each row."""
    inputs = batch(model)
    inputs["input_ids"][:, 1:5] = C - 1
    inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = (inputs["input_ids"] == C - 1).long()
    return inputs


def with_speech(model: nn.Module) -> dict[str, Any]:
    """Return a batch of sounds and what was said."""
    sounds = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(3))
    return {"input_features": sounds, "labels": batch(model)["labels"]}


def with_pixels(model: nn.Module) -> dict[str, Any]:
    """Return a batch of images and what they say."""
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": pixels, "labels": batch(model)["labels"]}


#: More than one kind of input: how it is built, and its batch.
SEVERAL: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], dict[str, Any]]]] = {
    "llava": (llava, with_image),
    "paligemma": (paligemma, with_image),
    "gemma3": (gemma3, with_image),
    "chameleon": (chameleon, batch),
    "whisper": (whisper, with_speech),
    "vit and trocr": (reads_images, with_pixels),
}


def architectures() -> Iterator[tuple[str, str, Callable[[], Result]]]:
    """Yield kind, model type, and what compares it."""
    seen: set[str] = set()
    for kind, names in KINDS.items():
        for model_type, name in names.items():
            if name not in seen and isinstance(name, str) and hasattr(transformers, name):
                seen.add(name)
                yield (
                    kind,
                    model_type,
                    lambda a=(kind, model_type, name): compared(  # type: ignore
                        lambda: built(*a), batch
                    ),
                )
    for model_type, (make, inputs) in SEVERAL.items():
        yield "several inputs", model_type, lambda m=make, i=inputs: compared(m, i)  # type: ignore


def main() -> None:
    """Compare, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; all if none is given")
    parser.add_argument("--out", type=Path, help="where the table goes")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    results, left = [], []
    for kind, model_type, compare in architectures():
        if arguments.names and model_type not in arguments.names:
            continue
        try:
            result = compare()._replace(kind=kind)
        except Exception as failure:
            left.append((model_type, f"{type(failure).__name__}: {str(failure).splitlines()[:1]}"))
            print(*left[-1], flush=True)
            continue
        results.append(result)
        print(*result, flush=True)
    if arguments.out:
        arguments.out.write_text(table(results, left))


def table(results: list[Result], left: list[tuple[str, str]]) -> str:
    """Return the page."""
    exact = [r for r in results if r.float32 < 1e-4 and r.bfloat16 < 0.1 and r.losses]
    lines = [
        "# Architectures that train without their logits",
        "",
        f"By `scripts/architectures.py`, torch {torch.__version__}, transformers "
        f"{transformers.__version__}: {len(exact)} of {len(results)} are exact and fused.",
        "Each is tiny and random and runs its own code and loss, with −100, padding and, where",
        "marked, `num_items_in_batch`. An error is the largest difference of the loss or of any",
        "gradient, as a part of the largest number of its tensor; in bfloat16 both sides round.",
        "",
        "| architecture | kind | fused losses | float32 | bfloat16 | items | needs the logits |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.model} | {r.kind} | {r.losses} | {r.float32:.0e} | {r.bfloat16:.0e} | "
        f"{'yes' if r.items else '–'} | {r.computed or '–'} |"
        for r in sorted(results)
    ]
    if left:
        lines += [
            "",
            f"Not tried, as no tiny one was built: {', '.join(sorted(n for n, _ in left))}.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
