"""Gemma 2: scores capped by 50 tanh(s / 50), every other layer a sliding window, (1 + w) RMSNorm before and after each part, GeGLU.

Source: Gemma 2, arXiv 2408.00118. Grouped queries are kept as a fifth dimension, K and V broadcast over it.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_INPUT = 0
VARIANTS = {"no_window": dict(window=None), "no_softcap": dict(softcap=None)}


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 128
    query_scalar: float = 24.0          # scores are divided by its root; not always head_dim (27B: 144 against 128)
    softcap: float | None = 50.0
    final_softcap: float = 30.0
    window: int | None = 6              # tokens a query sees, itself included, in layers 0, 2, 4, ...
    rope_theta: float = 10000.0
    eps: float = 1e-6


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + w), all in fp32, one rounding at the end."""

    def __init__(self, hidden: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(hidden)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        y = y * (1.0 + self.weight.float())
        return y.type_as(x)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D], cos and sin [T, D]; dimension i is paired with i + D/2."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos) + (rotated * sin)


class Attention(nn.Module):
    def __init__(self, c: Config, window: int | None):
        super().__init__()
        if c.heads % c.kv_heads:
            raise ValueError(f"heads {c.heads} must be a multiple of kv_heads {c.kv_heads}")
        self.config, self.window, self.scaling = c, window, c.query_scalar**-0.5
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        nn.init.normal_(self.q_proj.weight, std=24 * c.hidden**-0.5)    # scores of 10 to 40, so that the cap bites

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, (b, t, _) = self.config, x.shape
        q = apply_rope(self.q_proj(x).view(b, t, c.heads, c.head_dim).transpose(1, 2), cos, sin)
        k = apply_rope(self.k_proj(x).view(b, t, c.kv_heads, c.head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, t, c.kv_heads, c.head_dim).transpose(1, 2)
        q = q.reshape(b, c.kv_heads, c.heads // c.kv_heads, t, c.head_dim)                  # [B, Hkv, G, T, D]
        k, v = k.unsqueeze(2), v.unsqueeze(2)                                               # [B, Hkv, 1, T, D]

        scores = torch.matmul(q, k.transpose(-1, -2)) * self.scaling                        # [B, Hkv, G, T, T]
        if c.softcap is not None:
            scores = scores / c.softcap
            scores = torch.tanh(scores)
            scores = scores * c.softcap
        hidden = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        if self.window is not None:
            hidden = hidden | torch.ones(t, t, dtype=torch.bool, device=x.device).tril(-self.window)
        scores = scores + torch.zeros(t, t, dtype=x.dtype, device=x.device).masked_fill(hidden, torch.finfo(x.dtype).min)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype)
        out = torch.matmul(weights, v).reshape(b, c.heads, t, c.head_dim)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    def __init__(self, c: Config, window: int | None):
        super().__init__()
        self.attn = Attention(c, window)
        self.pre_attn, self.post_attn, self.pre_mlp, self.post_mlp = (RMSNorm(c.hidden, c.eps) for _ in range(4))
        self.gate_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.post_attn(self.attn(self.pre_attn(x), cos, sin))
        h = self.pre_mlp(x)
        h = self.down_proj(F.gelu(self.gate_proj(h), approximate="tanh") * self.up_proj(h))
        return x + self.post_mlp(h)


class Gemma2(nn.Module):
    """forward(tokens [B, T] int64) -> logits [B, T, vocab], themselves capped at +-final_softcap."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab, c.hidden)
        nn.init.normal_(self.embed.weight, std=c.hidden**-0.5)          # scaled back by the normaliser, and tied to the output
        self.blocks = nn.ModuleList(Block(c, c.window if i % 2 == 0 else None) for i in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)

    def forward(self, tokens: Tensor) -> Tensor:
        c = self.config
        x = self.embed(tokens)
        x = x * torch.tensor(c.hidden**0.5, dtype=x.dtype, device=x.device)     # the normaliser is rounded to the model's dtype
        positions = torch.arange(tokens.shape[1], device=x.device).float()
        inv_freq = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=x.device).float() / c.head_dim)
        angles = positions[:, None] * inv_freq[None, :]
        angles = torch.cat((angles, angles), dim=-1)                            # [T, D]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return torch.tanh(logits / c.final_softcap) * c.final_softcap


def build(**overrides) -> nn.Module:
    """Gemma2 from Config(**overrides), eval mode, seeded."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = Gemma2(Config(**overrides))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 0 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor]:
    """(tokens [batch, length] int64,)"""
    return (torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(0)),)
