"""Multi-matrix factorisation attention: many query heads from one low-rank query, one key and one value head for all of them.

Source: Multi-matrix Factorization Attention, arXiv 2412.19255. q_h = U_h norm(S x) with S [rank, hidden] shared; k = W_K x, v = W_V x with a single head, rotary on q and k. The cache holds 2 head_dim
numbers a token. With key_reuse (MFA-KR) the values are W_N k, a rotation-free function of the unrotated key, added to it behind a gate that starts at zero; here without the gate: v = k + W_N k.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_INPUT = 0
VARIANTS = {"key_reuse": dict(key_reuse=True)}


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 6                                  # heads * head_dim may be larger than hidden: that is the point of it
    head_dim: int = 16
    rank: int = 24                                  # of the queries
    intermediate: int = 128
    rope_theta: float = 10000.0
    eps: float = 1e-6
    key_reuse: bool = False


def rope_tables(t: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos, sin [t, dim] fp32, Llama's layout: pairs are (i, i + dim/2)."""
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    angles = torch.outer(torch.arange(t, dtype=torch.float32), freqs)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D]"""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


class MFA(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.s, self.norm = nn.Linear(c.hidden, c.rank, bias=False), nn.RMSNorm(c.rank, eps=c.eps)
        self.u = nn.Linear(c.rank, c.heads * c.head_dim, bias=False)
        self.wk = nn.Linear(c.hidden, c.head_dim, bias=False)
        self.wv = nn.Linear(c.head_dim if c.key_reuse else c.hidden, c.head_dim, bias=False)
        self.wo = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        c, (b, t, _) = self.config, x.shape
        q = self.u(self.norm(self.s(x))).view(b, t, c.heads, c.head_dim).transpose(1, 2)    # [B, H, T, D]
        key = self.wk(x)                                                                    # [B, T, D]
        v = key + self.wv(key) if c.key_reuse else self.wv(x)
        q, k = apply_rotary(q, cos, sin), apply_rotary(key.unsqueeze(1), cos, sin)
        scores = q @ k.transpose(2, 3) * c.head_dim**-0.5 + mask                            # one key head for all query heads
        out = scores.softmax(dim=-1) @ v.unsqueeze(1)
        return self.wo(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.attn_norm, self.ffn_norm = MFA(c), nn.RMSNorm(c.hidden, eps=c.eps), nn.RMSNorm(c.hidden, eps=c.eps)
        self.gate, self.up, self.down = nn.Linear(c.hidden, c.intermediate, bias=False), nn.Linear(c.hidden, c.intermediate, bias=False), nn.Linear(c.intermediate, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, mask)
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """forward(tokens [B, T] int64) -> logits [B, T, vocab]."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.hidden, eps=c.eps)
        self.head = nn.Linear(c.hidden, c.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, t = self.embed(tokens), tokens.size(1)
        cos, sin = rope_tables(t, self.config.head_dim, self.config.rope_theta)
        mask = torch.full((t, t), float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
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
