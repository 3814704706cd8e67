"""A small GPT: pre-LN blocks, learnt positions, and an embedding that is the output layer too."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        heads = scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.out(heads.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(gelu(self.up(self.norm_mlp(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:  # the sum over all layers is as wide as one
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, [batch, length, vocabulary], of int64 [batch, length]."""
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return linear(self.norm(x), self.embedding.weight)

    def loss(self, windows: Tensor) -> Tensor:
        """Nats a token, of int64 [batch, context + 1]: each token but the first is foretold."""
        return cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def block_weights(self) -> Iterator[nn.Parameter]:
        """The matrices of the blocks: what is quantized."""
        for block in self.blocks:
            for layer in (block.qkv, block.out, block.up, block.down):
                yield layer.weight


def parameters(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def fresh(seed: int, *shape: int) -> GPT:
    """A model with the initial weights of ``seed``; ``shape`` is GPT's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT(*shape)
