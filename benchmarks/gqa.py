"""Contenders of algebra.py's gqa cases: a decode step over 4096 cached tokens with 16 KV heads, and with the 4 that convert.to_gqa makes of them.

The 16 heads are four, each four times over, so that the conversion is exact and all contenders give one result. 16 heads of 64, 1024 wide, float32: 33.6 MB of
keys and values become 8.4.
"""
from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

HEADS, KV_HEADS, CACHED, D = 16, 4, 4096, 64
OLD = f", {HEADS} KV heads"


def attention() -> dict:
    """The attention op alone: one query over the cache."""
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, HEADS, 1, D), torch.randn(2, 1, KV_HEADS, CACHED, D)
    many = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v)]

    def contender(backend, k, v):
        attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] < HEADS)
        run = attend if backend is None else torch.compile(attend, backend=backend, dynamic=False)

        def call():
            with torch.no_grad():
                return run(q, k, v)
        return call

    return {f"{name}{suffix}": contender(backend, *kv) for suffix, kv in ((OLD, many), ("", (k, v))) for name, backend in (("eager", None), ("tileweld", "tileweld"))}


def block() -> dict:
    """A whole layer of models/llama_gqa, and the same converted: norms, projections, rotary, cache update, attention, MLP of 2816, a head over 64 tokens."""
    from tileweld import convert, models

    module = models.load("llama_gqa")
    model = module.build(vocab=64, hidden=HEADS * D, layers=1, heads=HEADS, kv_heads=HEADS, head_dim=D, intermediate=2816)
    size = HEADS // KV_HEADS
    with torch.no_grad():
        for linear in (model.layers[0].self_attn.k_proj, model.layers[0].self_attn.v_proj):
            rows = linear.weight.unflatten(0, (KV_HEADS, size, D))
            rows.copy_(rows[:, :1].expand_as(rows).clone())
    few = copy.deepcopy(model)
    report = convert.to_gqa(few, KV_HEADS)
    if report.kv_bytes_before != size * report.kv_bytes_after:
        raise SystemExit(f"gqa: KV bytes {report.kv_bytes_before} -> {report.kv_bytes_after}, expected a {size}th")
    tokens = torch.randint(64, (1, CACHED), generator=torch.Generator().manual_seed(0))

    def contender(backend, model):
        cache = model.new_cache(1, CACHED)
        run = model if backend is None else torch.compile(model, backend=backend, dynamic=False)
        with torch.no_grad():
            for start in range(0, CACHED, 512):
                model(tokens[:, start:start + 512], cache, torch.arange(start, start + 512))
        token, position = tokens[:, -1:], torch.tensor([CACHED - 1])

        def call():
            with torch.no_grad():
                return run(token, cache, position)
        return call

    return {f"{name}{suffix}": contender(backend, m) for suffix, m in ((OLD, model), ("", few)) for name, backend in (("eager", None), ("tileweld", "tileweld"))}
