"""Encoder-decoder transformer as "The Annotated Transformer" writes it: views and transposes, `masked_fill(mask == 0, -1e9)`.

Sources: Vaswani et al., Attention Is All You Need, arXiv 1706.03762; Rush, The Annotated Transformer, 2018.
-1e9 does not fit fp16, so this spelling runs in fp32 and bf16 only: an old and well-known trap.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CAUSAL_INPUT = 1                                            # tgt
VARIANTS = {"keep_weights": dict(keep_weights=True)}


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 64
    layers: int = 1             # of the encoder and of the decoder
    heads: int = 4
    intermediate: int = 128
    max_positions: int = 512
    dropout: float = 0.0
    pad_id: int = 0
    keep_weights: bool = False  # store the attention weights on the module, as the tutorial does: no fused kernel may then replace them


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: nn.Dropout) -> tuple[Tensor, Tensor]:
    """query [B, H, T, D], key and value [B, H, S, D], mask [B, 1, 1 or T, S] (0 hides) -> [B, H, T, D] and the weights [B, H, T, S]."""
    d_k = query.size(-1)
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
    scores = scores.masked_fill(mask == 0, -1e9)
    weights = dropout(scores.softmax(dim=-1))
    return torch.matmul(weights, value), weights


class MultiHeadedAttention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.h, self.d_k = c.heads, c.hidden // c.heads
        self.linears = nn.ModuleList(nn.Linear(c.hidden, c.hidden) for _ in range(4))       # q, k, v, out
        self.dropout = nn.Dropout(c.dropout)
        self.keep_weights, self.weights = c.keep_weights, None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        mask = mask.unsqueeze(1)                                                            # one mask for every head
        batch = query.size(0)
        query, key, value = [
            linear(x).view(batch, -1, self.h, self.d_k).transpose(1, 2)                     # [B, H, T, D]
            for linear, x in zip(self.linears, (query, key, value))
        ]
        x, weights = attention(query, key, value, mask, self.dropout)
        if self.keep_weights:
            self.weights = weights
        x = x.transpose(1, 2).contiguous().view(batch, -1, self.h * self.d_k)               # [B, T, H*D]
        return self.linears[-1](x)


class LayerNorm(nn.Module):
    """The tutorial's own: unbiased standard deviation, eps outside the root. Not nn.LayerNorm."""

    def __init__(self, hidden: int, eps: float = 1e-6):
        super().__init__()
        self.scale, self.shift, self.eps = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.zeros(hidden)), eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return self.scale * (x - mean) / (std + self.eps) + self.shift


class FeedForward(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(c.hidden, c.intermediate), nn.Linear(c.intermediate, c.hidden)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(self.w_1(x).relu()))


class EncoderLayer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.self_attn, self.feed_forward = MultiHeadedAttention(c), FeedForward(c)
        self.norms = nn.ModuleList(LayerNorm(c.hidden) for _ in range(2))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.dropout(self.self_attn(y, y, y, mask))
        return x + self.dropout(self.feed_forward(self.norms[1](x)))


class DecoderLayer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.self_attn, self.src_attn, self.feed_forward = MultiHeadedAttention(c), MultiHeadedAttention(c), FeedForward(c)
        self.norms = nn.ModuleList(LayerNorm(c.hidden) for _ in range(3))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, memory: Tensor, src_mask: Tensor, tgt_mask: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.dropout(self.self_attn(y, y, y, tgt_mask))
        x = x + self.dropout(self.src_attn(self.norms[1](x), memory, memory, src_mask))
        return x + self.dropout(self.feed_forward(self.norms[2](x)))


class Embedding(nn.Module):
    """Token embedding * sqrt(hidden) plus the sinusoid table."""

    def __init__(self, c: Config):
        super().__init__()
        self.lut, self.scale, self.max_positions = nn.Embedding(c.vocab, c.hidden), math.sqrt(c.hidden), c.max_positions
        position = torch.arange(c.max_positions).unsqueeze(1)
        frequency = torch.exp(torch.arange(0, c.hidden, 2) * -(math.log(10000.0) / c.hidden))
        table = torch.zeros(c.max_positions, c.hidden)
        table[:, 0::2], table[:, 1::2] = torch.sin(position * frequency), torch.cos(position * frequency)
        self.register_buffer("table", table.unsqueeze(0), persistent=False)                 # [1, max_positions, hidden]

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.size(1) > self.max_positions:
            raise ValueError(f"{tokens.size(1)} tokens, but the position table has {self.max_positions}; build(max_positions=...) takes more")
        return self.lut(tokens) * self.scale + self.table[:, : tokens.size(1)]


def subsequent_mask(length: int, device: torch.device) -> Tensor:
    """[1, T, T] bool, true where query i may see key j: j <= i."""
    return torch.triu(torch.ones(1, length, length, device=device), diagonal=1).type(torch.uint8) == 0


class AnnotatedTransformer(nn.Module):
    """forward(src [B, S] int64, tgt [B, T] int64) -> log-probabilities [B, T, vocab]. Tokens equal to pad_id are hidden as keys."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.src_embed, self.tgt_embed = Embedding(c), Embedding(c)
        self.encoder = nn.ModuleList(EncoderLayer(c) for _ in range(c.layers))
        self.decoder = nn.ModuleList(DecoderLayer(c) for _ in range(c.layers))
        self.encoder_norm, self.decoder_norm = LayerNorm(c.hidden), LayerNorm(c.hidden)
        self.generator = nn.Linear(c.hidden, c.vocab)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        src_mask = (src != self.config.pad_id).unsqueeze(-2)                                # [B, 1, S]
        tgt_mask = (tgt != self.config.pad_id).unsqueeze(-2) & subsequent_mask(tgt.size(-1), tgt.device)
        memory = self.src_embed(src)
        for layer in self.encoder:
            memory = layer(memory, src_mask)
        memory = self.encoder_norm(memory)
        x = self.tgt_embed(tgt)
        for layer in self.decoder:
            x = layer(x, memory, src_mask, tgt_mask)
        return torch.log_softmax(self.generator(self.decoder_norm(x)), dim=-1)


def build(**overrides) -> nn.Module:
    """AnnotatedTransformer from Config(**overrides), eval mode, seeded."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AnnotatedTransformer(Config(**overrides))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 1 and biases of 0 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor, Tensor]:
    """(src, tgt), each [batch, length] int64; every second source ends in a quarter of padding."""
    generator = torch.Generator().manual_seed(0)
    src, tgt = torch.randint(1, 256, (2, batch, length), generator=generator)
    src[1::2, length - length // 4:] = 0
    return src, tgt
