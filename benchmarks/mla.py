"""Contenders of the MLA cases of algebra.py: one attention layer of models/deepseek_mla with DeepSeek-V2-Lite's sizes, whose cache holds latents that the model expands at every call."""
from __future__ import annotations

from collections.abc import Callable

import torch
from tileweld.models import deepseek_mla

CONFIG = deepseek_mla.Config(hidden=2048, heads=16, q_lora_rank=None, kv_lora_rank=512, nope_dim=128, rope_dim=64, v_dim=128)


class _Layer(torch.nn.Module):
    """forward(x [1, T, hidden], positions [T]) through an MLA layer, causal; with a cache of `capacity` tokens, written in place."""

    def __init__(self, capacity: int | None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.mla = deepseek_mla.MLA(CONFIG).eval()
            shapes = ((1, capacity, CONFIG.kv_lora_rank), (1, capacity, CONFIG.rope_dim)) if capacity else ()
            self.cache = tuple(torch.randn(shape) for shape in shapes) or None

    def forward(self, x, positions):
        cos, sin = deepseek_mla.rope_tables(positions, CONFIG.rope_dim, CONFIG.rope_theta)
        slots = positions if self.cache is None else torch.arange(self.cache[0].shape[1])
        hidden = slots > positions.unsqueeze(1)
        mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, float("-inf"))
        return self.mla(x, cos, sin, mask, self.cache, positions)


class _Block(torch.nn.Module):
    """The attention block of that layer, between its projections: forward(q_nope [1, T, H, P], q_pe [1, T, H, R]) over a full cache, each latent of which becomes a key and a value."""

    def __init__(self, capacity: int):
        super().__init__()
        layer = _Layer(capacity)
        self.cache, self.wkv_b, self.scale = layer.cache, layer.mla.wkv_b, layer.mla.scale

    def forward(self, q_nope, q_pe):
        c, (latent, k_pe) = CONFIG, self.cache
        k_nope, v = self.wkv_b(latent).view(*latent.shape[:2], c.heads, -1).split([c.nope_dim, c.v_dim], dim=-1)
        q, k = torch.cat([q_nope, q_pe], -1), torch.cat([k_nope, k_pe.unsqueeze(2).expand(-1, -1, c.heads, -1)], -1)
        weights = (torch.einsum("bshd,bthd->bsht", q, k) * self.scale).softmax(-1)
        return torch.einsum("bsht,bthd->bshd", weights, v)


def _contenders(tokens: int, capacity: int | None) -> dict[str, Callable[[], torch.Tensor]]:
    x = torch.randn(1, tokens, CONFIG.hidden, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(tokens) if capacity is None else torch.arange(capacity - tokens, capacity)

    def contender(backend, **options):
        layer = _Layer(capacity)
        run = layer if backend is None else torch.compile(layer, backend=backend, dynamic=False, **({"options": options} if options else {}))

        def call():
            with torch.no_grad():
                return run(x, positions)
        return call

    return {"eager": contender(None), "tileweld": contender("tileweld"), "tileweld, as written": contender("tileweld", passes={"reassociate": False}), "inductor": contender("inductor")}


def decode() -> dict[str, Callable[[], torch.Tensor]]:
    """One new token over 2047 cached ones: 16 heads, latent 512, rotary 64, nope and v 128, hidden 2048, float32. Absorbed, a step reads 4.7 MB of cache and 60 MB of weights; naive it does 8.6 GFLOP besides."""
    return _contenders(1, 2048)


def block() -> dict[str, Callable[[], torch.Tensor]]:
    """One query over 2048 cached latents, without the projections to q and from the heads: 8.6 GFLOP naive; absorbed 16.8 MB of W_UK and W_UV, 4.7 MB of cache and 0.1 GFLOP."""
    q = [torch.randn(1, 1, CONFIG.heads, n, generator=torch.Generator().manual_seed(1)) for n in (CONFIG.nope_dim, CONFIG.rope_dim)]

    def contender(backend):
        run = _Block(2048)
        if backend:
            run = torch.compile(run, backend=backend, dynamic=False)

        def call():
            with torch.no_grad():
                return run(*q)
        return call

    return {"eager": contender(None), "tileweld": contender("tileweld"), "inductor": contender("inductor")}


def prefill() -> dict[str, Callable[[], torch.Tensor]]:
    """512 tokens without a cache: nothing is to be gained by absorbing, and the pass leaves it."""
    return _contenders(512, None)
