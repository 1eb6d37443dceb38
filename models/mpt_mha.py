"""MPT as llm-foundry writes it: one attention function with attn_bias, key_padding_mask, clip_qkv, qk_ln; K held as [B, H, D, S]; MHA, GQA and MQA.

Sources: MosaicML llm-foundry; MQA: Shazeer, arXiv 1911.02150; ALiBi: Press et al., arXiv 2108.12409.
The bias is a buffer for max_positions whose last S columns are taken; masks are masked_fill with finfo.min, so a query
whose every key is hidden (a left-padded position) gets uniform weights, not NaN.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAUSAL_INPUT = 0
VARIANTS = {
    "mqa": dict(kv_heads=1),
    "gqa": dict(kv_heads=2),
    "plain": dict(alibi=False, clip_qkv=None, qk_ln=False),
}


@dataclass
class Config:
    vocab: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4               # heads: MHA; 1: MQA; between: GQA
    expansion: int = 4
    max_positions: int = 512
    alibi: bool = True              # else learned positions
    alibi_bias_max: int = 8
    clip_qkv: float | None = 1.0    # MPT-30B uses 6; here small, so that it clips something
    qk_ln: bool = True
    dropout: float = 0.0


def multihead_attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, attn_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None, is_causal: bool = True, dropout_p: float = 0.0, training: bool = False,
) -> Tensor:
    """query [B, Sq, H*D], key and value [B, Sk, Hkv*D], attn_bias broadcastable to [1, H, >=Sq or 1, >=Sk], key_padding_mask [B, Sk] bool (true: a
    real token) -> [B, Sq, H*D]. Queries are the last Sq of the Sk positions."""
    b, s_q, s_k, d = query.size(0), query.size(1), key.size(1), query.size(2) // heads
    q = query.view(b, s_q, heads, d).permute(0, 2, 1, 3)                # b s (h d) -> b h s d
    k = key.view(b, s_k, kv_heads, d).permute(0, 2, 3, 1)               # b s (h d) -> b h d s
    v = value.view(b, s_k, kv_heads, d).permute(0, 2, 1, 3)             # b s (h d) -> b h s d
    if 1 < kv_heads < heads:                                            # GQA repeats; MQA lets matmul broadcast its one head
        n = heads // kv_heads
        k = k[:, :, None].expand(b, kv_heads, n, d, s_k).reshape(b, heads, d, s_k)
        v = v[:, :, None].expand(b, kv_heads, n, s_k, d).reshape(b, heads, s_k, d)

    attn_weight = q.matmul(k) * (1 / math.sqrt(d))                      # [B, H, Sq, Sk]
    min_val = torch.finfo(q.dtype).min
    if attn_bias is not None:
        start_q, start_k = max(0, attn_bias.size(2) - s_q), max(0, attn_bias.size(3) - s_k)
        attn_weight = attn_weight + attn_bias[:, :, start_q:, start_k:]
    if key_padding_mask is not None:
        attn_weight = attn_weight.masked_fill(~key_padding_mask.view(b, 1, 1, s_k), min_val)
    if is_causal:
        s = max(s_q, s_k)
        causal_mask = attn_weight.new_ones(s, s, dtype=torch.float32).tril().to(torch.bool).logical_not()
        causal_mask = causal_mask[-s_q:, -s_k:]
        attn_weight = attn_weight.masked_fill(causal_mask.view(1, 1, s_q, s_k), min_val)
    attn_weight = torch.softmax(attn_weight, dim=-1)
    if dropout_p:
        attn_weight = F.dropout(attn_weight, p=dropout_p, training=training, inplace=True)
    out = attn_weight.to(v.dtype).matmul(v)                             # [B, H, Sq, D]
    return out.permute(0, 2, 1, 3).reshape(b, s_q, heads * d)           # b h s d -> b s (h d)


def gen_slopes(heads: int, alibi_bias_max: int = 8) -> Tensor:
    """[1, H, 1, 1] fp32: 2^(-max*k/n), k = 1..n, n the next power of two; for other head counts the odd ones first."""
    n = 2 ** math.ceil(math.log2(heads))
    slopes = 1.0 / torch.pow(2, torch.arange(1, n + 1, dtype=torch.float32) * (alibi_bias_max / n))
    if n != heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:heads]
    return slopes.view(1, heads, 1, 1)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        if c.hidden % c.heads or c.heads % c.kv_heads:
            raise ValueError(f"hidden {c.hidden} must be a multiple of heads {c.heads}, and that of kv_heads {c.kv_heads}")
        self.config, kv = c, c.kv_heads * (c.hidden // c.heads)
        self.sizes = [c.hidden, kv, kv]
        self.Wqkv = nn.Linear(c.hidden, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(c.hidden, c.hidden, bias=False)
        if c.qk_ln:
            self.q_ln, self.k_ln = nn.LayerNorm(c.hidden), nn.LayerNorm(kv)     # over all heads at once

    def forward(self, x: Tensor, attn_bias: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        c = self.config
        qkv = self.Wqkv(x)                                              # [B, S, (H + 2 Hkv) * D]
        if c.clip_qkv:
            qkv = qkv.clamp(min=-c.clip_qkv, max=c.clip_qkv)
        query, key, value = qkv.split(self.sizes, dim=2)
        if c.qk_ln:
            query, key = self.q_ln(query).to(query.dtype), self.k_ln(key).to(key.dtype)
        context = multihead_attention(
            query, key, value, c.heads, c.kv_heads, attn_bias, key_padding_mask, dropout_p=c.dropout, training=self.training)
        return self.out_proj(context)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(c.hidden, bias=False), nn.LayerNorm(c.hidden, bias=False)
        self.attn = Attention(c)
        self.up_proj = nn.Linear(c.hidden, c.expansion * c.hidden, bias=False)
        self.down_proj = nn.Linear(c.expansion * c.hidden, c.hidden, bias=False)

    def forward(self, x: Tensor, attn_bias: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm_1(x), attn_bias, key_padding_mask)
        return x + self.down_proj(F.gelu(self.up_proj(self.norm_2(x)), approximate="none"))


class MPT(nn.Module):
    """forward(input_ids [B, S] int64, attention_mask [B, S] bool or None) -> logits [B, S, vocab]."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.wte = nn.Embedding(c.vocab, c.hidden)
        nn.init.normal_(self.wte.weight, std=c.hidden**-0.5)            # tied to the output: logits of order 1
        if c.alibi:                                                     # slope * (1 - max .. 0): equal to -slope * (i - j) up to a constant a row
            distance = torch.arange(1 - c.max_positions, 1, dtype=torch.float32).view(1, 1, 1, c.max_positions)
            self.register_buffer("attn_bias", distance * gen_slopes(c.heads, c.alibi_bias_max), persistent=False)    # [1, H, 1, max]
        else:
            self.wpe, self.attn_bias = nn.Embedding(c.max_positions, c.hidden), None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm_f = nn.LayerNorm(c.hidden, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if input_ids.size(1) > self.config.max_positions:
            raise ValueError(f"{input_ids.size(1)} tokens, but max_positions is {self.config.max_positions}; build(max_positions=...) takes more")
        x = self.wte(input_ids)
        if not self.config.alibi:
            pos = torch.arange(input_ids.size(1), device=input_ids.device).unsqueeze(0)
            if attention_mask is not None:                              # left padding: the first real token is at position 0
                pos = torch.clamp(pos - torch.cumsum((~attention_mask).to(torch.int32), dim=1), min=0)
            x = x + self.wpe(pos)
        for block in self.blocks:
            x = block(x, self.attn_bias, attention_mask)
        return F.linear(self.norm_f(x), self.wte.weight)


def build(**overrides) -> nn.Module:
    """MPT from Config(**overrides), eval mode, seeded."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = MPT(Config(**overrides))
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.1)      # norm weights of exactly 1 and biases of 0 would hide a lost one
    return model.eval()


def example_inputs(batch: int = 2, length: int = 16) -> tuple[Tensor, Tensor]:
    """(input_ids [batch, length] int64, attention_mask [batch, length] bool); every second row begins with a quarter of padding."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, 256, (batch, length), generator=generator)
    attention_mask = torch.ones(batch, length, dtype=torch.bool)
    attention_mask[1::2, : length // 4] = False
    return input_ids, attention_mask
