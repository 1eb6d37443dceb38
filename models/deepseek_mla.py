"""DeepSeek's multi-head latent attention in its naive form: the latent is expanded to full keys and values before attention.

Sources: DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437, whose inference code's einsum layout (heads in dim 2) is used here.
What a cache holds is the normed latent and one roped key for all heads; every step expands the whole prefix through kv_b. That is the
work which absorption removes. The feed-forward is dense: the mixture of experts has no part in attention.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_INPUT = 0
VARIANTS = {"split_logits": dict(split_logits=True), "no_q_lora": dict(q_lora_rank=None)}

Cache = list[tuple[Tensor, Tensor]]                 # a layer: latent [B, C, kv_lora_rank] and k_pe [B, C, rope_dim]


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    q_lora_rank: int | None = 24                    # None: one full projection, as in V2-Lite
    kv_lora_rank: int = 20
    nope_dim: int = 16
    rope_dim: int = 8
    v_dim: int = 12
    intermediate: int = 128
    rope_theta: float = 10000.0
    eps: float = 1e-6
    split_logits: bool = False                      # True: nope and rope logits added; False: one product of the concatenations


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(torch.mean(torch.square(y), dim=-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


def rope_tables(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions [T] -> cos, sin [T, dim/2] fp32."""
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim))
    angles = torch.outer(positions.float(), freqs)
    return torch.cos(angles), torch.sin(angles)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, R]; neighbours (2i, 2i+1) are paired: DeepSeek's layout, not Llama's."""
    pairs = x.float().view(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(3).to(x.dtype)


class MLA(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config, self.scale = c, (c.nope_dim + c.rope_dim) ** -0.5
        q_out = c.heads * (c.nope_dim + c.rope_dim)
        if c.q_lora_rank is None:
            self.wq = nn.Linear(c.hidden, q_out, bias=False)
        else:
            self.wq_a, self.q_norm = nn.Linear(c.hidden, c.q_lora_rank, bias=False), RMSNorm(c.q_lora_rank, c.eps)
            self.wq_b = nn.Linear(c.q_lora_rank, q_out, bias=False)
        self.wkv_a = nn.Linear(c.hidden, c.kv_lora_rank + c.rope_dim, bias=False)
        self.kv_norm = RMSNorm(c.kv_lora_rank, c.eps)
        self.wkv_b = nn.Linear(c.kv_lora_rank, c.heads * (c.nope_dim + c.v_dim), bias=False)
        self.wo = nn.Linear(c.heads * c.v_dim, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: tuple[Tensor, Tensor] | None, positions: Tensor) -> Tensor:
        c, (b, t, _) = self.config, x.shape
        q = self.wq(x) if c.q_lora_rank is None else self.wq_b(self.q_norm(self.wq_a(x)))
        q = q.view(b, t, c.heads, c.nope_dim + c.rope_dim)
        q_nope, q_pe = torch.split(q, [c.nope_dim, c.rope_dim], dim=-1)
        q_pe = apply_rotary(q_pe, cos, sin)                                                 # [B, T, H, R]

        latent, k_pe = torch.split(self.wkv_a(x), [c.kv_lora_rank, c.rope_dim], dim=-1)
        latent = self.kv_norm(latent)                                                       # [B, T, L]
        k_pe = apply_rotary(k_pe.unsqueeze(2), cos, sin).squeeze(2)                         # [B, T, R]: one for all heads
        if cache is not None:
            latent = cache[0].index_copy_(1, positions, latent)                             # [B, S, L]
            k_pe = cache[1].index_copy_(1, positions, k_pe)
        s = latent.shape[1]
        kv = self.wkv_b(latent).view(b, s, c.heads, c.nope_dim + c.v_dim)
        k_nope, v = torch.split(kv, [c.nope_dim, c.v_dim], dim=-1)                          # [B, S, H, P], [B, S, H, V]

        if c.split_logits:
            scores = torch.einsum("bshd,bthd->bsht", q_nope, k_nope) + torch.einsum("bshr,btr->bsht", q_pe, k_pe)
            scores = scores * self.scale
        else:
            q = torch.cat([q_nope, q_pe], dim=-1)
            k = torch.cat([k_nope, k_pe.unsqueeze(2).expand(-1, -1, c.heads, -1)], dim=-1)
            scores = torch.einsum("bshd,bthd->bsht", q, k) * self.scale                     # [B, T, H, S]
        scores = scores + mask.unsqueeze(1)                                                 # mask [T, S] -> [T, 1, S]
        weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
        out = torch.einsum("bsht,bthd->bshd", weights, v)                                   # [B, T, H, V]
        return self.wo(out.flatten(2))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attn, self.attn_norm, self.ffn_norm = MLA(c), RMSNorm(c.hidden, c.eps), RMSNorm(c.hidden, c.eps)
        self.w1 = nn.Linear(c.hidden, c.intermediate, bias=False)                           # gate
        self.w3 = nn.Linear(c.hidden, c.intermediate, bias=False)                           # up
        self.w2 = nn.Linear(c.intermediate, c.hidden, bias=False)                           # down

    def forward(self, x: Tensor, *args) -> Tensor:
        x = x + self.attn(self.attn_norm(x), *args)
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class DeepSeek(nn.Module):
    """forward(tokens [B, T] int64, cache=None, cache_position=None) -> logits [B, T, vocab].

    With a cache (from `new_cache`, written in place) `cache_position` [T] int64 gives the slots of these tokens, which are their positions too;
    query t sees slots j <= cache_position[t]."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.head = nn.Linear(c.hidden, c.vocab, bias=False)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Zeroed buffers for `capacity` positions, kv_lora_rank + rope_dim numbers each, with the weights' dtype and device."""
        c, weight = self.config, self.head.weight
        return [
            tuple(torch.zeros(batch, capacity, d, dtype=weight.dtype, device=weight.device) for d in (c.kv_lora_rank, c.rope_dim))
            for _ in range(c.layers)
        ]

    def forward(self, tokens: Tensor, cache: Cache | None = None, cache_position: Tensor | None = None) -> Tensor:
        if (cache is None) != (cache_position is None):
            raise ValueError("cache and cache_position go together: pass both or neither")
        x, t = self.embed(tokens), tokens.size(1)
        if cache is None:
            positions = torch.arange(t, device=x.device)
            mask = torch.full((t, t), float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
        else:
            positions = cache_position
            slots = torch.arange(cache[0][0].size(1), device=x.device)
            hidden = slots > positions.unsqueeze(1)                                         # [T, C]
            mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, float("-inf"))
        cos, sin = rope_tables(positions, self.config.rope_dim, self.config.rope_theta)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, None if cache is None else cache[i], positions)
        return self.head(self.norm(x))


def build(**overrides) -> nn.Module:
    """DeepSeek from Config(**overrides), eval mode, seeded."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = DeepSeek(Config(**overrides))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 1 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor]:
    """(tokens [batch, length] int64,)"""
    return (torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(0)),)
