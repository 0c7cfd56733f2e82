"""The built-in GPT: rotary positions, RMSNorm without gains, QK-norm, ReLU^2, tied embeddings.

Every parameter is a matrix whose sides are multiples of 64 (for a byte vocabulary), which suits the codec's
64x64 blocks. Choices follow the speedruns of small GPTs: QK-norm (arXiv 2010.04245), ReLU^2 (arXiv
2109.08668), output projections that start at zero, so that each block begins as the identity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dtrain.trainer.config import ModelConfig
from dtrain.trainer.frugal import linear_of_square, next_token_loss

ROPE_BASE = 10_000.0


class GPT(nn.Module):
    """A decoder-only language model.

    Built on the CPU from `seed` alone; the same seed gives the same bits on every machine.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Compute the blocks' activations again in the backward pass, rather than keep them."""
        self.embedding = nn.Embedding(config.vocab_size, config.dim)  # also the output layer, transposed
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        cos, sin = rotary_table(config.seq_len, config.dim // config.num_heads)
        self.register_buffer("cos", cos, persistent=False)  # [seq_len, head_dim / 2]
        self.register_buffer("sin", sin, persistent=False)
        self._init_parameters(seed)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Mean next-token loss in nats (0-dim) given `targets` [B, T], else logits [B, T, vocab_size].

        `tokens` [B, T] int64, T at most config.seq_len.
        """
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = norm(self.embedding(tokens))  # [B, T, dim]
        for block in self.blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        x = norm(x)
        if targets is None:
            return functional.linear(x, self.embedding.weight)
        return next_token_loss(x.flatten(0, 1), self.embedding.weight, targets.flatten())

    def _init_parameters(self, seed: int) -> None:
        # Uniform values made by exactly rounded operations on the generator's raw bits: normal_() goes
        # through log and cos, whose last bits differ between processors, and then two machines would begin at
        # different thetas.
        if self.embedding.weight.is_meta:  # only the shapes are wanted
            return
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("out.weight"):
                nn.init.zeros_(parameter)
                continue
            std = 0.02 if name == "embedding.weight" else 1.0 / math.sqrt(self.config.dim)
            unit = torch.rand(parameter.shape, generator=generator)
            with torch.no_grad():
                parameter.copy_(unit.mul_(2.0).sub_(1.0).mul_(math.sqrt(3.0) * std))


class Block(nn.Module):
    """Attention, then a feed-forward layer, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]; cos and sin [T, head_dim / 2]."""
        x = x + self.attention(norm(x), cos, sin)
        out: Tensor = x + self.feed_forward(norm(x))
        return out


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalized queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]."""
        batch, length, dim = x.shape
        q, k, v = (
            self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        )  # [B, heads, T, hd]
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, dim))
        return out


class FeedForward(nn.Module):
    """Two matrices with ReLU^2 between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.out = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]."""
        x = functional.relu(self.up(x))
        if torch.is_autocast_enabled(x.device.type):
            out: Tensor = self.out(x.square())
            return out
        return linear_of_square(x, self.out.weight)


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without gains."""
    return functional.rms_norm(x, (x.shape[-1],), eps=1e-6)


def rotary_table(seq_len: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding (arXiv 2104.09864), each [seq_len, head_dim / 2] fp32."""
    frequencies = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + head_dim / 2]) by its position's angle. x [B, heads, T, head_dim]."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)
