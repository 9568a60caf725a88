"""Causal language models of `transformers` that train without the N × C logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from custom_ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["FusedCausalLM"]


class FusedCausalLM(nn.Module):
    """A causal language model whose last layer and loss are `linear_cross_entropy` in training.

    It holds the model and calls it; the model itself is not changed, and is what generates and
    saves. In training with labels the decoder's hidden states (B, T, D) and the weight of the
    output embeddings (C, D) make the loss, and `logits` of the output is None. In evaluation, and
    without labels, the answer is the model's own.

    Args:
        model: one that has a decoder, a linear last layer, at most a soft cap on its logits
            (`final_logit_softcapping`), and the loss `ForCausalLMLoss`. Tied weights stay tied.

    Raises:
        TypeError, ValueError: the model is another; the message says in what. That its logits are
            those of the last layer is seen from one evaluation of two tokens.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    >>> config = LlamaConfig(vocab_size=16, num_attention_heads=2, **sizes)
    >>> model, tokens = FusedCausalLM(LlamaForCausalLM(config)), torch.tensor([[1, 2, 3]])
    >>> model(input_ids=tokens, labels=tokens).loss.shape
    torch.Size([])
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model must be a PreTrainedModel, got {type(model).__name__}")
        name = type(model).__name__
        last, config = model.get_output_embeddings(), model.config
        if config.is_encoder_decoder or model.get_decoder() is model:
            raise ValueError(f"{name} is no decoder with a last layer")
        if not isinstance(last, nn.Linear):
            raise ValueError(f"the output embeddings of {name} are no nn.Linear but {last!r}")
        if model.loss_function is not ForCausalLMLoss:
            raise ValueError(f"the loss of {name} is not ForCausalLMLoss")
        if getattr(config, "output_router_logits", False):
            raise ValueError(f"{name} adds a loss of its router, config.output_router_logits")
        self.model = model
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self._check_logits()

    def forward(
        self,
        labels: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        shift_labels: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Return the model's output for `inputs`, the arguments of the model.

        Args:
            labels: (B, T), -100 where there is none; each position is asked for the next one's.
            num_items_in_batch: the denominator of the mean, that of all micro-batches.
            shift_labels: (B, T), shifted already; `labels` are not looked at then.
        """
        if labels is None or not self.training:
            if labels is not None:
                inputs |= {"labels": labels, "num_items_in_batch": num_items_in_batch}
                inputs |= {"shift_labels": shift_labels}
            return self.model(**inputs)
        decoded = self.model.get_decoder()(**inputs | {"use_cache": False, "return_dict": True})
        hidden, last = decoded.last_hidden_state, self.model.get_output_embeddings()
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(hidden.device)
        loss = linear_cross_entropy(
            hidden,
            last.weight,
            shift_labels.to(hidden.device),
            last.bias,
            softcap=self.softcap,
            normalizer=num_items_in_batch,
            dtype=torch.float32,
        )
        return CausalLMOutputWithPast(
            loss=loss, hidden_states=decoded.hidden_states, attentions=decoded.attentions
        )

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Raise if the logits are not the last layer's: scaled, say, or of something else."""
        modes = {module: module.training for module in self.model.modules()}
        last = self.model.get_output_embeddings()
        tokens = torch.tensor([[0, 1]], device=last.weight.device)
        try:
            self.model.eval()
            expected = self.model(input_ids=tokens).logits
            logits = last(self.model.get_decoder()(input_ids=tokens).last_hidden_state)
        finally:
            for module, mode in modes.items():
                module.training = mode
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-5):
            raise ValueError(
                f"{type(self.model).__name__} does more to its logits than the last layer and "
                "final_logit_softcapping"
            )
