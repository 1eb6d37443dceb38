"""Collaborative heads: all heads share one query and one key projection, and head h weighs its dimensions by a vector m_h.

Source: Cordonnier, Loukas, Jaggi, Multi-Head Attention: Collaborate Instead of Concatenate, arXiv 2006.16362, eq. 6: the scores of head h are X W_Q diag(m_h) W_K^T X^T. There is no rotary: it would not
commute with a diagonal that differs within a pair. A key for every head, W_K x times m_h, is what the formula reads as ("mix": "keys"); the shared keys and scaled queries are the cheaper order ("queries").
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_INPUT = 0
VARIANTS = {"queries": dict(mix="queries")}

Cache = list[tuple[Tensor, Tensor]]                 # a layer: shared keys [B, C, shared] and values [B, heads, C, head_dim]


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    head_dim: int = 16                              # of the values
    shared: int = 32                                # key and query dims that the heads share: fewer than heads * head_dim
    positions: int = 256
    mix: str = "keys"                               # which side the head's weights are multiplied to


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.wq, self.wk = nn.Linear(c.hidden, c.shared, bias=False), nn.Linear(c.hidden, c.shared, bias=False)
        self.mixing = nn.Parameter(torch.randn(c.heads, c.shared))
        self.wv, self.wo = nn.Linear(c.hidden, c.heads * c.head_dim, bias=False), nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)

    def forward(self, x: Tensor, mask: Tensor, cache: tuple[Tensor, Tensor] | None, positions: Tensor) -> Tensor:
        c, (b, t, _) = self.config, x.shape
        q, k = self.wq(x).unsqueeze(1), self.wk(x)                                          # [B, 1, T, S], [B, T, S]
        v = self.wv(x).view(b, t, c.heads, c.head_dim).transpose(1, 2)                      # [B, H, T, D]
        if cache is not None:
            k = cache[0].index_copy_(1, positions, k)
            v = cache[1].index_copy_(2, positions, v)
        k, mixing = k.unsqueeze(1), self.mixing[:, None, :]                                 # [B, 1, T, S], [H, 1, S]
        if c.mix == "keys":
            scores = q.expand(-1, c.heads, -1, -1) @ (k * mixing).transpose(2, 3)
        else:
            scores = (q * mixing) @ k.transpose(2, 3)
        weights = (scores * c.head_dim**-0.5 + mask).softmax(dim=-1)
        return self.wo((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.attn_norm, self.ffn_norm = Attention(c), nn.LayerNorm(c.hidden), nn.LayerNorm(c.hidden)
        self.up, self.down = nn.Linear(c.hidden, 4 * c.hidden), nn.Linear(4 * c.hidden, c.hidden)

    def forward(self, x: Tensor, *args) -> Tensor:
        x = x + self.attn(self.attn_norm(x), *args)
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class Model(nn.Module):
    """forward(tokens [B, T] int64, cache=None, cache_position=None) -> logits [B, T, vocab].

    With a cache (from `new_cache`, written in place) `cache_position` [T] int64 gives the slots of these tokens, which are their positions too;
    query t sees slots j <= cache_position[t]."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed, self.position = nn.Embedding(c.vocab, c.hidden), nn.Embedding(c.positions, c.hidden)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm, self.head = nn.LayerNorm(c.hidden), nn.Linear(c.hidden, c.vocab, bias=False)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Zeroed buffers for `capacity` positions, with the weights' dtype and device."""
        c, weight = self.config, self.head.weight
        return [(weight.new_zeros(batch, capacity, c.shared), weight.new_zeros(batch, c.heads, capacity, c.head_dim)) for _ in range(c.layers)]

    def forward(self, tokens: Tensor, cache: Cache | None = None, cache_position: Tensor | None = None) -> Tensor:
        if (cache is None) != (cache_position is None):
            raise ValueError("cache and cache_position go together: pass both or neither")
        t = tokens.size(1)
        positions = torch.arange(t, device=tokens.device) if cache is None else cache_position
        x = self.embed(tokens) + self.position(positions)
        slots = torch.arange(t if cache is None else cache[0][0].size(1), device=tokens.device)
        hidden = slots > positions.unsqueeze(1)                                             # [T, C]
        mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, float("-inf"))
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, None if cache is None else cache[i], positions)
        return self.head(self.norm(x))


def build(**overrides) -> nn.Module:
    """Model from Config(**overrides), eval mode, seeded."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = Model(Config(**overrides))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 1 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor]:
    """(tokens [batch, length] int64,)"""
    return (torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(0)),)
