"""Longformer as a dense mask: a window on both sides, and global tokens that see everything and are seen by everything.

Source: Beltagy et al., arXiv 2004.05150. Post-norm encoder as in RoBERTa. What this leaves out: the separate projections of global tokens and the
chunked kernel; the pattern of who sees whom is exact.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_INPUT = None
VARIANTS = {}


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    intermediate: int = 128
    max_positions: int = 512
    window: int = 4             # keys seen on each side


class SelfAttention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        if c.hidden % c.heads:
            raise ValueError(f"hidden {c.hidden} must be a multiple of heads {c.heads}")
        self.heads, self.head_dim = c.heads, c.hidden // c.heads
        self.query, self.key, self.value = (nn.Linear(c.hidden, c.hidden) for _ in range(3))
        self.dense = nn.Linear(c.hidden, c.hidden)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        return x.view(*x.size()[:-1], self.heads, self.head_dim).permute(0, 2, 1, 3)       # [B, H, T, D]

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q = self.transpose_for_scores(self.query(x)) / math.sqrt(self.head_dim)            # scaled before the product
        k, v = self.transpose_for_scores(self.key(x)), self.transpose_for_scores(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2))                                      # [B, H, T, T]
        scores = torch.where(visible, scores, torch.finfo(scores.dtype).min)
        out = torch.matmul(nn.functional.softmax(scores, dim=-1), v)
        out = out.permute(0, 2, 1, 3).contiguous()
        return self.dense(out.view(*out.size()[:-2], -1))


class Layer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attention, self.attention_norm = SelfAttention(c), nn.LayerNorm(c.hidden)
        self.up, self.down, self.output_norm = nn.Linear(c.hidden, c.intermediate), nn.Linear(c.intermediate, c.hidden), nn.LayerNorm(c.hidden)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, visible))
        return self.output_norm(x + self.down(F.gelu(self.up(x))))


class Longformer(nn.Module):
    """forward(input_ids [B, T] int64, attention_mask [B, T] bool, global_attention_mask [B, T] bool) -> masked-LM logits [B, T, vocab].

    Query i sees key j iff j is a real token and (|i - j| <= window or i is global or j is global)."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.word, self.position, self.norm = nn.Embedding(c.vocab, c.hidden), nn.Embedding(c.max_positions, c.hidden), nn.LayerNorm(c.hidden)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.head = nn.Linear(c.hidden, c.vocab)

    def visible(self, attention_mask: Tensor, global_attention_mask: Tensor) -> Tensor:
        """[B, 1, T, T] bool"""
        position = torch.arange(attention_mask.size(1), device=attention_mask.device)
        near = (position[None, :] - position[:, None]).abs() <= self.config.window                                  # [T, T]
        seen = near | global_attention_mask[:, :, None] | global_attention_mask[:, None, :]                         # [B, T, T]
        return (seen & attention_mask[:, None, :]).unsqueeze(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, global_attention_mask: Tensor) -> Tensor:
        if input_ids.size(1) > self.config.max_positions:
            raise ValueError(f"{input_ids.size(1)} tokens, but max_positions is {self.config.max_positions}; build(max_positions=...) takes more")
        position = torch.arange(input_ids.size(1), device=input_ids.device)
        x = self.norm(self.word(input_ids) + self.position(position))
        visible = self.visible(attention_mask, global_attention_mask)
        for layer in self.layers:
            x = layer(x, visible)
        return self.head(x)


def build(**overrides) -> nn.Module:
    """Longformer from Config(**overrides), eval mode, seeded."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = Longformer(Config(**overrides))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 1 and biases of 0 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids int64, attention_mask bool, global_attention_mask bool), each [batch, length].

    Every second row ends in a quarter of padding; the first token is global, and in every second row the third too."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, 256, (batch, length), generator=generator)
    attention_mask = torch.ones(batch, length, dtype=torch.bool)
    attention_mask[1::2, length - length // 4:] = False
    global_attention_mask = torch.zeros(batch, length, dtype=torch.bool)
    global_attention_mask[:, 0] = True
    global_attention_mask[1::2, 2:3] = True
    return input_ids, attention_mask, global_attention_mask
