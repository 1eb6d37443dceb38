"""MiniGPT: a small grouped-query language model in three sizes, with RoPE tables, SwiGLU, RMSNorm and tied embeddings; made to be trained.

Sources: GPT-2, Radford et al. 2019 (initialisation, tied embeddings); Llama, arXiv 2302.13971 (RoPE, SwiGLU, RMSNorm).
    tiny    hidden 128,  8 layers,  4 heads, 1 KV head    (1.6 M parameters)
    small   hidden 384, 12 layers, 12 heads, 3 KV heads  ( 22 M)
    medium  hidden 640, 20 layers, 16 heads, 4 KV heads, intermediate 2048, vocabulary 20000  (112 M)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_INPUT = 0
VARIANTS = {}


@dataclass
class Config:
    vocab: int = 1024
    hidden: int = 128
    layers: int = 8
    heads: int = 4
    kv_heads: int = 1
    intermediate: int = 384
    max_positions: int = 2048
    rope_theta: float = 10000.0
    eps: float = 1e-6


SIZES = {
    "tiny": dict(),
    "small": dict(hidden=384, layers=12, heads=12, kv_heads=3, intermediate=1024, vocab=8192),
    "medium": dict(hidden=640, layers=20, heads=16, kv_heads=4, intermediate=2048, vocab=20000),
}


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden)), eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h / torch.sqrt((h * h).mean(dim=-1, keepdim=True) + self.eps)
        return (h * self.weight).type_as(x)                 # rounds once, after the weight


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D], cos and sin [T, D/2]; dimension i is paired with i + D/2."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        if c.hidden % c.heads or c.heads % c.kv_heads:
            raise ValueError(f"hidden {c.hidden} must be a multiple of heads {c.heads}, and that of kv_heads {c.kv_heads}")
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.hidden // c.heads
        self.wq = nn.Linear(c.hidden, c.heads * self.head_dim, bias=False)
        self.wk = nn.Linear(c.hidden, c.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(c.hidden, c.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(c.heads * self.head_dim, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.size()
        q = self.wq(x).view(b, t, self.heads, self.head_dim)
        k = self.wk(x).view(b, t, self.kv_heads, self.head_dim)
        v = self.wv(x).view(b, t, self.kv_heads, self.head_dim)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=2)                 # [B, T, H, D]
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)           # [B, H, T, D]
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(self.head_dim)               # [B, H, T, T]
        causal = torch.tril(torch.ones(t, t, dtype=torch.bool, device=x.device))
        scores = scores.masked_fill(~causal, float("-inf"))
        out = torch.softmax(scores.float(), dim=-1).type_as(x) @ v
        return self.wo(out.transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.attn, self.norm2 = RMSNorm(c.hidden, c.eps), Attention(c), RMSNorm(c.hidden, c.eps)
        self.w1 = nn.Linear(c.hidden, c.intermediate, bias=False)                   # gate
        self.w3 = nn.Linear(c.hidden, c.intermediate, bias=False)                   # up
        self.w2 = nn.Linear(c.intermediate, c.hidden, bias=False)                   # down

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        h = self.norm2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class MiniGPT(nn.Module):
    """forward(tokens [B, T] int64, targets [B, T] int64 or None) -> logits [B, T, vocab], or with targets (logits, mean cross entropy in nats)."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab, c.hidden)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.head = nn.Linear(c.hidden, c.vocab, bias=False)
        self.head.weight = self.embed.weight                                        # tied
        d = c.hidden // c.heads
        angles = torch.outer(torch.arange(c.max_positions), c.rope_theta ** (-torch.arange(0, d, 2) / d))
        self.register_buffer("cos", angles.cos(), persistent=False)                 # [max_positions, D/2]
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.apply(self._init)
        for name, p in self.named_parameters():                                     # GPT-2: residual projections scaled by depth
            if name.endswith(("wo.weight", "w2.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.layers))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        t = tokens.size(1)
        if t > self.config.max_positions:
            raise ValueError(f"{t} tokens, but max_positions is {self.config.max_positions}; build(max_positions=...) takes more")
        x = self.embed(tokens)
        cos, sin = self.cos[:t], self.sin[:t]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build(size: str = "tiny", **overrides) -> nn.Module:
    """MiniGPT of a size (tiny, small, medium) with single fields of Config overridden; eval mode, seeded."""
    if size not in SIZES:
        raise ValueError(f"there is no size {size!r}; use one of: {', '.join(SIZES)}")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = MiniGPT(Config(**{**SIZES[size], **overrides}))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 1 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor]:
    """(tokens [batch, length] int64,)"""
    return (torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(0)),)
