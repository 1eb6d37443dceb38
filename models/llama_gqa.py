"""Llama with grouped-query attention: half-split RoPE, repeat_kv by expand, RMSNorm written out, SwiGLU, an optional static KV cache.

Sources: Touvron et al., Llama 2, arXiv 2307.09288; GQA: Ainslie et al., arXiv 2305.13245; RoPE: Su et al., arXiv 2104.09864.

    cache = model.new_cache(batch=2, capacity=64)
    logits = model(prompt, cache, torch.arange(prompt.shape[1]))        # prefill
    logits = model(token, cache, torch.tensor([prompt.shape[1]]))       # decode one token a step
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_INPUT = 0
VARIANTS = {"mha": dict(kv_heads=4), "mqa": dict(kv_heads=1)}

Cache = list[tuple[Tensor, Tensor]]                 # a layer: k and v, each [B, Hkv, C, D]


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None                     # None: hidden / heads
    intermediate: int = 176
    rope_theta: float = 10000.0
    eps: float = 1e-5

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.head_dim is None:
            self.head_dim = self.hidden // self.heads


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden)), eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        return self.weight * x.to(dtype)            # rounds to the model's dtype before the weight


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions [T] -> cos, sin [T, D]; angles in fp32 whatever the model's dtype."""
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)
    freqs = positions[:, None].float() * inv_freq[None, :]                          # [T, D/2]
    emb = torch.cat((freqs, freqs), dim=-1)
    return emb.cos().to(dtype), emb.sin().to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2:]
    return torch.cat((-x2, x1), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D]; dimension i is paired with i + D/2."""
    return x * cos + rotate_half(x) * sin


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """[B, Hkv, S, D] -> [B, Hkv * n_rep, S, D]; query head h reads KV head h // n_rep."""
    if n_rep == 1:
        return x
    b, h_kv, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h_kv, n_rep, s, d).reshape(b, h_kv * n_rep, s, d)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: tuple[Tensor, Tensor] | None, positions: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)            # [B, H, T, D]
        k = self.k_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)         # [B, Hkv, T, D]
        v = self.v_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k_cache, v_cache = cache
            k = k_cache.index_copy_(2, positions, k.to(k_cache.dtype)).to(q.dtype)          # [B, Hkv, C, D]
            v = v_cache.index_copy_(2, positions, v.to(v_cache.dtype)).to(q.dtype)
        k, v = repeat_kv(k, self.heads // self.kv_heads), repeat_kv(v, self.heads // self.kv_heads)

        scores = torch.matmul(q, k.transpose(2, 3)) * self.head_dim**-0.5                   # [B, H, T, S]
        scores = scores + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(weights, v)                                                      # [B, H, T, D]
        return self.o_proj(out.transpose(1, 2).contiguous().view(b, t, -1))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_norm, self.self_attn = RMSNorm(c.hidden, c.eps), Attention(c)
        self.post_attention_norm, self.mlp = RMSNorm(c.hidden, c.eps), MLP(c)

    def forward(self, x: Tensor, *args) -> Tensor:
        x = x + self.self_attn(self.input_norm(x), *args)
        return x + self.mlp(self.post_attention_norm(x))


class Llama(nn.Module):
    """forward(tokens [B, T] int64, cache=None, cache_position=None) -> logits [B, T, vocab].

    With a cache (from `new_cache`, written in place) `cache_position` [T] int64 gives the slots of these tokens, which are their positions too;
    query t sees slots j <= cache_position[t]."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype | None = None) -> Cache:
        """Zeroed buffers for `capacity` positions, with the weights' device, and their dtype unless another is given: keys and values are rounded to it."""
        c, weight = self.config, self.lm_head.weight
        return [
            tuple(torch.zeros(batch, c.kv_heads, capacity, c.head_dim, dtype=dtype or weight.dtype, device=weight.device) for _ in "kv")
            for _ in range(c.layers)
        ]

    def forward(self, tokens: Tensor, cache: Cache | None = None, cache_position: Tensor | None = None) -> Tensor:
        if (cache is None) != (cache_position is None):
            raise ValueError("cache and cache_position go together: pass both or neither")
        x = self.embed_tokens(tokens)
        t = tokens.shape[1]
        positions = torch.arange(t, device=x.device) if cache is None else cache_position
        s = t if cache is None else cache[0][0].shape[2]
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        visible = torch.arange(s, device=x.device)[None, :] <= positions[:, None]                   # [T, S]
        mask = torch.zeros(t, s, dtype=x.dtype, device=x.device).masked_fill(~visible, torch.finfo(x.dtype).min)
        mask = mask[None, None, :, :]
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, None if cache is None else cache[i], positions)
        return self.lm_head(self.norm(x))


def build(**overrides) -> nn.Module:
    """Llama from Config(**overrides), eval mode, seeded."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = Llama(Config(**overrides))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 1 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor]:
    """(tokens [batch, length] int64,)"""
    return (torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(0)),)
