"""ALiBi: a bias linear in distance instead of positions, computed in the forward pass in two spellings.

Sources: Press et al., arXiv 2108.12409; BLOOM, arXiv 2211.05100.
    bloom     slope * key position as [B*H, 1, T], positions counted by cumsum over the padding mask, added by baddbmm on 3-D q and k
    distance  -slope * (i - j) as [1, H, T, T], added to 4-D scores
Both give the same logits: they differ by a constant in each row, which softmax drops.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_INPUT = 0
VARIANTS = {"distance": dict(style="distance"), "six_heads": dict(heads=6, hidden=96)}


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    style: str = "bloom"

    def __post_init__(self):
        if self.style not in ("bloom", "distance"):
            raise ValueError(f"there is no ALiBi style {self.style!r}; use bloom or distance")
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} must be a multiple of heads {self.heads}")


def slopes(heads: int) -> Tensor:
    """[H] fp32: the geometric sequence that starts at, and has ratio, 2^(-8/n); n a power of two.

    For another head count: the sequence of the power of two below, then every second one of the sequence of twice that."""
    n = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 / n * (k + 1)) for k in range(n)]
    rest = [2 ** (-4 / n * (2 * k + 1)) for k in range(heads - n)]
    return torch.tensor(first + rest, dtype=torch.float32)


def bloom_bias(attention_mask: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    """attention_mask [B, T] (1: a real token), slope [H] -> [B*H, 1, T]."""
    b, t = attention_mask.shape
    mask = attention_mask.to(torch.int64)
    position = ((mask.cumsum(dim=-1) - 1) * mask)[:, None, :]                   # [B, 1, T]: the first real token is 0
    bias = slope[..., None] * position                                          # [B, H, T]
    return bias.reshape(b * slope.shape[0], 1, t).to(dtype)


def distance_bias(length: int, slope: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, H, T, T]: -slope * |i - j|."""
    position = torch.arange(length, device=slope.device)
    distance = (position[:, None] - position[None, :]).abs()
    return (-slope.view(1, -1, 1, 1) * distance).to(dtype)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.head_dim, self.style = c.heads, c.hidden // c.heads, c.style
        self.query_key_value = nn.Linear(c.hidden, 3 * c.hidden)
        self.dense = nn.Linear(c.hidden, c.hidden)

    def forward(self, x: Tensor, bias: Tensor, hidden_keys: Tensor) -> Tensor:
        b, t, _ = x.shape
        h, d = self.heads, self.head_dim
        qkv = self.query_key_value(x).view(b, t, h, 3, d)                       # interleaved by head, as BLOOM stores it
        q, k, v = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
        if self.style == "bloom":
            q = q.transpose(1, 2).reshape(b * h, t, d)
            k = k.permute(0, 2, 3, 1).reshape(b * h, d, t)
            v = v.transpose(1, 2).reshape(b * h, t, d)
            scores = torch.baddbmm(bias, q, k, beta=1.0, alpha=1.0 / math.sqrt(d))      # [B*H, T, T]
            scores = scores.view(b, h, t, t).masked_fill(hidden_keys, torch.finfo(scores.dtype).min)
            weights = F.softmax(scores, dim=-1)
            out = torch.bmm(weights.view(b * h, t, t), v).view(b, h, t, d)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # [B, H, T, D]
            scores = q @ k.transpose(-1, -2) / math.sqrt(d) + bias
            scores = scores.masked_fill(hidden_keys, torch.finfo(scores.dtype).min)
            out = scores.softmax(dim=-1) @ v
        return self.dense(out.permute(0, 2, 1, 3).reshape(b, t, h * d))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(c.hidden), Attention(c), nn.LayerNorm(c.hidden)
        self.up, self.down = nn.Linear(c.hidden, 4 * c.hidden), nn.Linear(4 * c.hidden, c.hidden)

    def forward(self, x: Tensor, bias: Tensor, hidden_keys: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), bias, hidden_keys)
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class AlibiLM(nn.Module):
    """forward(tokens [B, T] int64, attention_mask [B, T] bool or 0/1) -> logits [B, T, vocab]."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed, self.embed_norm = nn.Embedding(c.vocab, c.hidden), nn.LayerNorm(c.hidden)
        nn.init.normal_(self.embed.weight, std=c.hidden**-0.5)                  # tied to the output: logits of order 1
        self.register_buffer("slope", slopes(c.heads), persistent=False)        # [H]
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.hidden)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        t = tokens.shape[1]
        x = self.embed_norm(self.embed(tokens))
        if self.config.style == "bloom":
            bias = bloom_bias(attention_mask, self.slope, x.dtype)
        else:
            bias = distance_bias(t, self.slope, x.dtype)
        position = torch.arange(t, device=x.device)
        hidden_keys = (position[None, :] > position[:, None])[None, None] | (attention_mask == 0)[:, None, None, :]     # [B, 1, T, T]
        for block in self.blocks:
            x = block(x, bias, hidden_keys)
        return F.linear(self.norm(x), self.embed.weight)


def build(**overrides) -> nn.Module:
    """AlibiLM from Config(**overrides), eval mode, seeded."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AlibiLM(Config(**overrides))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 1 and biases of 0 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor, Tensor]:
    """(tokens [batch, length] int64, attention_mask [batch, length] bool); every second row begins with a quarter of padding."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 256, (batch, length), generator=generator)
    attention_mask = torch.ones(batch, length, dtype=torch.bool)
    attention_mask[1::2, : length // 4] = False
    return tokens, attention_mask
