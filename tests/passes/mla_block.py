"""One attention with a latent, spelled so that every legality rule of reassociate can be broken by an argument; no casts, so that float64 stays float64."""

import torch
import torch.nn.functional as F
from torch import nn


def rotary(x, positions, layout):
    """x [B, H, T, R], positions [T]; pairs are halves or neighbours."""
    angles = torch.outer(positions.to(x.dtype), 10000.0 ** (-torch.arange(0, x.shape[-1], 2, dtype=x.dtype) / x.shape[-1]))
    cos, sin = angles.cos(), angles.sin()
    if layout == "halves":
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class Block(nn.Module):
    """forward(x [B, Sq, hidden], latents [B, C, L], keys [B, C, R]): the cached tokens come first; returns [B, Sq, hidden].

    broken: "norm" (of the expanded keys), "rotary" (on them), "returned" (they leave), "sink" (one more logit), "gate" (a score that is not linear), "finite" (a fill that leaves weight).
    bias: of kv_b; "v": of the values alone.
    """

    def __init__(self, hidden=24, heads=4, latent=16, nope=15, rope=4, v=15, q_rank=None, bias=False, layout="halves", pad=0, split=False, separate=False, scale=1.0, broken="", own_kv_products=False):
        super().__init__()
        torch.manual_seed(0)
        self.sizes = heads, latent, nope, rope, v
        self.layout, self.pad, self.split, self.separate, self.broken, self.scale = layout, pad, split, separate, broken, scale * (nope + rope) ** -0.5
        self.q_a = nn.Linear(hidden, q_rank, bias=False) if q_rank else None
        width = q_rank or hidden
        self.q = nn.ModuleList([nn.Linear(width, heads * nope, bias=False), nn.Linear(width, heads * rope, bias=False)]) if separate else nn.Linear(width, heads * (nope + rope), bias=False)
        self.kv_a = nn.Linear(hidden, latent + rope, bias=False)
        self.kv_b = nn.ModuleList([nn.Linear(latent, heads * nope, bias=bias is True), nn.Linear(latent, heads * v, bias=bool(bias))]) if own_kv_products else nn.Linear(latent, heads * (nope + v), bias=bias)
        self.out = nn.Linear(heads * v, hidden, bias=False)

    def forward(self, x, latents, keys):
        heads, latent, nope, rope, v = self.sizes
        b, t, _ = x.shape
        past = latents.shape[1]
        positions = torch.arange(past, past + t)
        y = x if self.q_a is None else F.rms_norm(self.q_a(x), (self.q_a.out_features,))
        if self.separate:
            q_nope, q_pe = (layer(y).view(b, t, heads, -1).transpose(1, 2) for layer in self.q)
        else:
            q_nope, q_pe = self.q(y).view(b, t, heads, nope + rope).transpose(1, 2).split([nope, rope], -1)
        c, k_pe = self.kv_a(x).split([latent, rope], -1)
        c = torch.cat([latents, F.rms_norm(c, (latent,))], 1)
        k_pe = torch.cat([keys, rotary(k_pe[:, None], positions, self.layout)[:, 0]], 1)[:, None]
        if isinstance(self.kv_b, nn.ModuleList):
            k_nope, values = (layer(c).view(b, past + t, heads, -1).transpose(1, 2) for layer in self.kv_b)
        else:
            k_nope, values = self.kv_b(c).view(b, past + t, heads, nope + v).transpose(1, 2).split([nope, v], -1)
        if self.broken == "norm":
            k_nope = F.rms_norm(k_nope, (nope,))
        if self.broken == "rotary":
            k_nope = torch.cat([rotary(k_nope[..., :-1], torch.arange(past + t), self.layout), k_nope[..., -1:]], -1)
        q_pe = rotary(q_pe, positions, self.layout)
        if self.pad:
            values = F.pad(values, (0, self.pad))
        if self.split:
            scores = q_nope @ k_nope.mT + q_pe @ k_pe.mT
        else:
            scores = torch.cat([q_nope, q_pe], -1) @ torch.cat([k_nope, k_pe.expand(-1, heads, -1, -1)], -1).mT
        scores = scores * self.scale
        if self.broken == "gate":
            scores = 5 * torch.tanh(scores / 5)
        causal = torch.arange(past + t) <= positions[:, None]
        scores = scores.masked_fill(~causal, -2e3 if self.broken == "finite" else float("-inf"))
        if self.broken == "sink":
            weights = torch.cat([scores, scores.new_zeros(b, heads, t, 1)], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        result = weights @ values
        if self.pad:
            result = result[..., :v]
        result = self.out(result.transpose(1, 2).flatten(2))
        return (result, k_nope) if self.broken == "returned" else result


def inputs(new, cached, batch=2, hidden=24, latent=16, rope=4, dtype=torch.float64):
    """(x, latents, keys)"""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((batch, new, hidden), (batch, cached, latent), (batch, cached, rope)))
