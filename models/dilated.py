"""Causal dilated sliding window: a query sees the last `window` positions that lie a multiple of the dilation back; the dilation doubles with depth.

Sources: Longformer, arXiv 2004.05150, section 3.1; Sparse Transformers, arXiv 1904.10509. One fused QKV projection, unbound as in vision code.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CAUSAL_INPUT = 0
VARIANTS = {}


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    window: int = 4                             # keys a query sees, itself included
    dilations: tuple[int, ...] = (1, 2, 4)      # one a layer, repeated if there are more layers
    max_positions: int = 512


def dilated_mask(length: int, window: int, dilation: int, device: torch.device) -> Tensor:
    """[T, T] bool, true where query i sees key j: 0 <= i - j < window * dilation and (i - j) % dilation == 0."""
    i = torch.arange(length, device=device).view(-1, 1)
    j = torch.arange(length, device=device).view(1, -1)
    distance = i - j
    return (distance >= 0) & (distance < window * dilation) & (distance % dilation == 0)


class Attention(nn.Module):
    def __init__(self, c: Config, dilation: int):
        super().__init__()
        if c.hidden % c.heads:
            raise ValueError(f"hidden {c.hidden} must be a multiple of heads {c.heads}")
        self.heads, self.window, self.dilation = c.heads, c.window, dilation
        self.scale = (c.hidden // c.heads) ** -0.5
        self.qkv, self.proj = nn.Linear(c.hidden, 3 * c.hidden), nn.Linear(c.hidden, c.hidden)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)      # [3, B, H, T, D]
        q, k, v = qkv.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)                                               # [B, H, T, T]
        mask = dilated_mask(T, self.window, self.dilation, x.device)
        attn = attn.masked_fill(mask.logical_not(), float("-inf"))                                  # the diagonal is always seen: no empty row
        attn = attn.softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, c: Config, dilation: int):
        super().__init__()
        self.norm_1, self.attn, self.norm_2 = nn.LayerNorm(c.hidden), Attention(c, dilation), nn.LayerNorm(c.hidden)
        self.mlp = nn.Sequential(nn.Linear(c.hidden, 4 * c.hidden), nn.GELU(), nn.Linear(4 * c.hidden, c.hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class DilatedLM(nn.Module):
    """forward(tokens [B, T] int64) -> logits [B, T, vocab]."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed, self.position = nn.Embedding(c.vocab, c.hidden), nn.Embedding(c.max_positions, c.hidden)
        self.blocks = nn.ModuleList(Block(c, c.dilations[i % len(c.dilations)]) for i in range(c.layers))
        self.norm, self.head = nn.LayerNorm(c.hidden), nn.Linear(c.hidden, c.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        if T > self.config.max_positions:
            raise ValueError(f"{T} tokens, but max_positions is {self.config.max_positions}; build(max_positions=...) takes more")
        x = self.embed(tokens) + self.position(torch.arange(T, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(**overrides) -> nn.Module:
    """DilatedLM from Config(**overrides), eval mode, seeded."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = DilatedLM(Config(**overrides))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 1 and biases of 0 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor]:
    """(tokens [batch, length] int64,)"""
    return (torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(0)),)
