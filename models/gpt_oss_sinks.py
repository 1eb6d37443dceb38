"""GPT-OSS: a learned sink logit for each head joins the softmax as one more column and is dropped after it; alternating sliding window.

Sources: GPT-OSS model card, arXiv 2508.10925; sinks: Xiao et al., arXiv 2309.17453. The sink takes a share of the weight and gives no value: its only
effect is exp(sink) in the denominator. The feed-forward keeps the clamped, shifted SwiGLU; the mixture of experts has no part in attention.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_INPUT = 0
VARIANTS = {"no_window": dict(window=None)}


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 96
    window: int | None = 6          # tokens a query sees, itself included, in layers 0, 2, 4, ...; 128 in the real model
    alpha: float = 1.702
    limit: float = 7.0
    rope_theta: float = 150000.0
    eps: float = 1e-5


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden)), eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * x).to(dtype)              # the weight before the rounding, unlike Llama


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D], cos and sin [T, D/2]; dimension i is paired with i + D/2."""
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    b, h_kv, s, d = x.shape
    return x[:, :, None].expand(b, h_kv, n_rep, s, d).reshape(b, h_kv * n_rep, s, d)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        if c.heads % c.kv_heads:
            raise ValueError(f"heads {c.heads} must be a multiple of kv_heads {c.kv_heads}")
        self.config, self.scaling = c, c.head_dim**-0.5
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden)
        self.sinks = nn.Parameter(torch.linspace(-1.0, 2.0, c.heads))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        c, (b, t, _) = self.config, x.shape
        q = apply_rope(self.q_proj(x).view(b, t, -1, c.head_dim).transpose(1, 2), cos, sin)     # [B, H, T, D]
        k = apply_rope(self.k_proj(x).view(b, t, -1, c.head_dim).transpose(1, 2), cos, sin)     # [B, Hkv, T, D]
        v = self.v_proj(x).view(b, t, -1, c.head_dim).transpose(1, 2)
        k, v = repeat_kv(k, c.heads // c.kv_heads), repeat_kv(v, c.heads // c.kv_heads)

        scores = torch.matmul(q, k.transpose(2, 3)) * self.scaling + mask                       # [B, H, T, T]
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(b, -1, t, -1)
        logits = torch.cat([scores, sinks], dim=-1)                                             # [B, H, T, T + 1]
        logits = logits - logits.max(dim=-1, keepdim=True).values                               # against overflow in bf16
        probabilities = F.softmax(logits, dim=-1, dtype=logits.dtype)
        weights = probabilities[..., :-1]                                                       # drop the sink: rows sum to less than 1
        out = torch.matmul(weights, v)
        return self.o_proj(out.transpose(1, 2).contiguous().reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.alpha, self.limit = c.alpha, c.limit
        self.gate_up_proj = nn.Linear(c.hidden, 2 * c.intermediate)                             # gate and up interleaved
        self.down_proj = nn.Linear(c.intermediate, c.hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(x)
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate = gate.clamp(min=None, max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        return self.down_proj((up + 1) * (gate * torch.sigmoid(gate * self.alpha)))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.norm_1, self.attn = RMSNorm(c.hidden, c.eps), Attention(c)
        self.norm_2, self.mlp = RMSNorm(c.hidden, c.eps), MLP(c)

    def forward(self, x: Tensor, *args) -> Tensor:
        x = x + self.attn(self.norm_1(x), *args)
        return x + self.mlp(self.norm_2(x))


class GptOss(nn.Module):
    """forward(tokens [B, T] int64) -> logits [B, T, vocab]."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab, c.hidden)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.head = nn.Linear(c.hidden, c.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        c, x = self.config, self.embed(tokens)
        i = torch.arange(tokens.shape[1], device=x.device)[:, None]
        j = torch.arange(tokens.shape[1], device=x.device)[None, :]
        seen, unseen = x.new_zeros(()), x.new_full((), torch.finfo(x.dtype).min)
        full = torch.where(j <= i, seen, unseen)                                                # [T, T]
        sliding = full
        if c.window is not None:
            sliding = torch.where((j <= i) & (j > i - c.window), seen, unseen)
        inv_freq = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=x.device).float() / c.head_dim)
        angles = i.float() * inv_freq
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)                           # [T, D/2]
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, sliding if index % 2 == 0 else full)
        return self.head(self.norm(x))


def build(**overrides) -> nn.Module:
    """GptOss from Config(**overrides), eval mode, seeded."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = GptOss(Config(**overrides))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 1 and biases of 0 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor]:
    """(tokens [batch, length] int64,)"""
    return (torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(0)),)
