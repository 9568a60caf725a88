"""A small GPT: from tokens to the features that its last layer takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.networks.models import Network

BLOCKS = 2
HEAD_WIDTH = 32


class Attention(nn.Module):
    """Causal self-attention, (B, T, D) to (B, T, D), in heads of `HEAD_WIDTH`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each position gathers from those up to itself."""
        heads = self.qkv(x).unflatten(-1, (3, -1, HEAD_WIDTH))  # (B, T, 3, heads, HEAD_WIDTH)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        gathered = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(gathered.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and two layers, each on the normalised input and added to it; (B, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(width), Attention(width))
        self.think = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return x with what the two add."""
        x = x + self.attend(x)
        return x + self.think(x)


class Trunk(nn.Module):
    """All but the last layer: tokens (B, T) to features (B, T, D)."""

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the features of each position."""
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        return self.norm(self.blocks(x))


def build_gpt(vocabulary: int, context: int, width: int) -> Network:
    """Return the network, freshly initialised; the width D is a multiple of `HEAD_WIDTH`.

    >>> build_gpt(300, 8, 32)(torch.zeros(2, 8, dtype=torch.int64)).shape
    torch.Size([2, 8, 300])
    """
    network = Network(Trunk(vocabulary, context, width), nn.Linear(width, vocabulary, bias=False))
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)  # the first loss is log V, near enough
    return network
