"""``tileweld::attention_parts``: attention whose keys are several tensors side by side along the head dim.

    attention_parts(q, [a, b], v, ...) = attention(q, cat([a, b], -1), v, ...)

Absorbed multi-head latent attention reads keys cat([latent, k_pe]) out of two caches. Joined, they are a copy of the whole cache at every step;
a kernel that is given both copies nothing. Lowering makes this op (compiler/key_parts.py), behind AOT: it has no gradient.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import empty_output, reference, variant_of


def joined(parts: Sequence[Tensor], heads: int) -> Tensor:
    """One tensor [B, heads, Tk, sum of D]; a part with fewer heads is repeated as grouped heads are."""
    return torch.cat([x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1) for x in parts], -1)


@torch.library.custom_op("tileweld::attention_parts", mutates_args=())
def attention_parts(q: Tensor, parts: Sequence[Tensor], v: Tensor, captures: Sequence[Tensor], sizes: Sequence[int], score: str, mask: str, fill: float, sink: str, empty: str, value: str = "") -> Tensor:
    """Attention (compiler/ir/attention.py) with keys in parts.

    q [B, H, Tq, D]; parts [B, Hk, Tk, Dk], each with an Hk of its own that divides H, their Dk adding up to D; the rest as in attention.
    Returns [B, H, Tq, Dv] in q's dtype over [B, Tq, H, Dv] memory.
    """
    heads = max(x.shape[1] for x in parts)
    heads = heads if all(heads % x.shape[1] == 0 for x in parts) else q.shape[1]
    return reference(q, joined(parts, heads), v, captures, sizes, variant_of(captures, score, mask, fill, sink, empty, value))


@attention_parts.register_fake
def _(q, parts, v, captures, sizes, score, mask, fill, sink, empty, value=""):
    width = sum(x.shape[3] for x in parts)
    torch._check(q.shape[3] == width, lambda: f"q has head dim {q.shape[3]}, the parts of k have {width}")
    for x in parts:
        torch._check(x.shape[2] == v.shape[2], lambda: f"a part of k has {x.shape[2]} positions, v has {v.shape[2]}")
    return empty_output(q, v.shape[3])
