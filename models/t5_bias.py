"""T5: encoder and decoder with a learned bias for each (bucket of the relative position, head), buckets growing with the log of the distance.

Source: Raffel et al., arXiv 1910.10683. Scores are not scaled (the initialisation absorbs it); the bias is computed once, by the first layer's
table, and shared; cross attention has none. RMSNorm without centring; tied output scaled by hidden^-0.5.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_INPUT = 2
VARIANTS = {"gated": dict(gated=True)}


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 64
    layers: int = 2             # of the encoder and of the decoder
    heads: int = 4
    head_dim: int = 12          # heads * head_dim need not be hidden
    intermediate: int = 128
    buckets: int = 8            # 32 in the paper's models
    max_distance: int = 20      # 128 in the paper's models
    gated: bool = False         # v1.1: gated GELU; else ReLU
    eps: float = 1e-6


def relative_position_bucket(relative_position: Tensor, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """relative_position (key - query, any shape, int64) -> bucket in [0, buckets), int64.

    Half of the buckets are one distance each, the others grow with the logarithm up to max_distance, beyond which all fall in the last.
    Bidirectional: half of all are for keys ahead. Otherwise keys ahead share bucket 0 with distance 0."""
    bucket = 0
    if bidirectional:
        buckets //= 2
        bucket = bucket + (relative_position > 0).to(torch.long) * buckets
        relative_position = torch.abs(relative_position)
    else:
        relative_position = -torch.min(relative_position, torch.zeros_like(relative_position))
    max_exact = buckets // 2
    is_small = relative_position < max_exact
    # log(0) = -inf is cast to some integer at distance 0; torch.where never picks it
    large = max_exact + (
        torch.log(relative_position.float() / max_exact) / math.log(max_distance / max_exact) * (buckets - max_exact)
    ).to(torch.long)
    large = torch.min(large, torch.full_like(large, buckets - 1))
    return bucket + torch.where(is_small, relative_position, large)


class LayerNorm(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(c.hidden)), c.eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)            # the fp32 factor promotes a bf16 x
        return self.weight * x.to(self.weight.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.head_dim, inner = c.heads, c.head_dim, c.heads * c.head_dim
        self.q, self.k, self.v = (nn.Linear(c.hidden, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, c.hidden, bias=False)
        nn.init.normal_(self.q.weight, std=(c.hidden * c.head_dim) ** -0.5)     # in place of the 1/sqrt(d) on the scores

    def forward(self, x: Tensor, memory: Tensor, position_bias: Tensor) -> Tensor:
        b = x.shape[0]
        q = self.q(x).view(b, -1, self.heads, self.head_dim).transpose(1, 2)            # [B, H, T, D]
        k = self.k(memory).view(b, -1, self.heads, self.head_dim).transpose(1, 2)       # [B, H, S, D]
        v = self.v(memory).view(b, -1, self.heads, self.head_dim).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(3, 2))
        scores = scores + position_bias                                                 # [B or 1, H or 1, T or 1, S]
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        out = torch.matmul(weights, v)
        return self.o(out.transpose(1, 2).contiguous().view(b, -1, self.heads * self.head_dim))


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.wi, self.wo = nn.Linear(c.hidden, c.intermediate, bias=False), nn.Linear(c.intermediate, c.hidden, bias=False)
        self.wi_1 = nn.Linear(c.hidden, c.intermediate, bias=False) if c.gated else None

    def forward(self, x: Tensor) -> Tensor:
        if self.wi_1 is None:
            return self.wo(F.relu(self.wi(x)))
        return self.wo(F.gelu(self.wi(x), approximate="tanh") * self.wi_1(x))


class Block(nn.Module):
    def __init__(self, c: Config, decoder: bool):
        super().__init__()
        self.norm_1, self.self_attn = LayerNorm(c), Attention(c)
        if decoder:
            self.norm_2, self.cross_attn = LayerNorm(c), Attention(c)
        self.norm_3, self.ff = LayerNorm(c), FeedForward(c)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None, memory_bias: Tensor | None = None) -> Tensor:
        h = self.norm_1(x)
        x = x + self.self_attn(h, h, bias)
        if memory is not None:
            x = x + self.cross_attn(self.norm_2(x), memory, memory_bias)
        return x + self.ff(self.norm_3(x))


class Stack(nn.Module):
    def __init__(self, c: Config, decoder: bool):
        super().__init__()
        self.config, self.decoder = c, decoder
        self.relative_attention_bias = nn.Embedding(c.buckets, c.heads)                 # the table: buckets x H, not T x T
        self.blocks = nn.ModuleList(Block(c, decoder) for _ in range(c.layers))
        self.norm = LayerNorm(c)

    def position_bias(self, length: int) -> Tensor:
        """[1, H, T, T]"""
        device = self.relative_attention_bias.weight.device
        context = torch.arange(length, dtype=torch.long, device=device)[:, None]
        memory = torch.arange(length, dtype=torch.long, device=device)[None, :]
        bucket = relative_position_bucket(memory - context, not self.decoder, self.config.buckets, self.config.max_distance)
        return self.relative_attention_bias(bucket).permute([2, 0, 1]).unsqueeze(0)     # [T, T, H] -> [1, H, T, T]

    def forward(self, x: Tensor, mask: Tensor, *cross) -> Tensor:
        bias = self.position_bias(x.shape[1]) + mask
        for block in self.blocks:
            x = block(x, bias, *cross)
        return self.norm(x)


class T5(nn.Module):
    """forward(input_ids [B, S] int64, attention_mask [B, S] bool or 0/1, decoder_input_ids [B, T] int64) -> logits [B, T, vocab]."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.shared = nn.Embedding(c.vocab, c.hidden)
        self.encoder, self.decoder = Stack(c, decoder=False), Stack(c, decoder=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        x, y = self.shared(input_ids), self.shared(decoder_input_ids)
        min_value = torch.finfo(x.dtype).min
        source_mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * min_value                  # [B, 1, 1, S]
        position = torch.arange(y.shape[1], device=y.device)
        causal = (position[None, None, :] <= position[None, :, None]).to(y.dtype)                       # [1, T, T]
        target_mask = (1.0 - causal[:, None, :, :]) * min_value
        memory = self.encoder(x, source_mask)
        y = self.decoder(y, target_mask, memory, source_mask)
        return F.linear(y * self.config.hidden**-0.5, self.shared.weight)


def build(**overrides) -> nn.Module:
    """T5 from Config(**overrides), eval mode, seeded."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = T5(Config(**overrides))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 1 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask bool, decoder_input_ids), each [batch, length]; every second source ends in a quarter of padding."""
    generator = torch.Generator().manual_seed(0)
    input_ids, decoder_input_ids = torch.randint(1, 256, (2, batch, length), generator=generator)
    attention_mask = torch.ones(batch, length, dtype=torch.bool)
    attention_mask[1::2, length - length // 4:] = False
    return input_ids, attention_mask, decoder_input_ids
