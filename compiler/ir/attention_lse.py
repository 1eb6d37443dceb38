"""``tileweld::attention_lse``: attention that also gives the logarithm of its denominator, and ``tileweld::merge_lse``, which puts chunks of keys together again.

    out, lse = attention_lse(q, k, v, ...)       out as in attention;  lse[b, h, i] = log sum_j exp(score), masked keys with the score fill, a sink as one more key

What a long prefix needs whose keys are expanded a chunk at a time, and what models that attend in chunks compute by hand (passes/merge_lse.py). The kernels are attention's: the maximum
and the sum that they hold for every row are stored as m + log l. Neither op has a gradient: the passes make them in inference.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import compute_dtype, empty_output, reference, variant_of
from .composite import define
from .merge_lse import merge_lse as _merge


@torch.library.custom_op("tileweld::attention_lse", mutates_args=())
def attention_lse(q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], sizes: Sequence[int], score: str, mask: str, fill: float, sink: str, empty: str, value: str = "") -> list[Tensor]:
    """Attention (compiler/ir/attention.py) and its log-sum-exp.

    Arguments as attention's. Returns [out [B, H, Tq, Dv] in q's dtype over [B, Tq, H, Dv] memory, lse [B, H, Tq] contiguous in float32, in float64 for float64]. A row that sees no key, and no
    key at all, has lse -inf.
    """
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))
    return [reference(q, k, v, captures, sizes, variant_of(captures, score, mask, fill, sink, empty, value), lse), lse]


@attention_lse.register_fake
def _(q, k, v, captures, sizes, score, mask, fill, sink, empty, value=""):
    torch._check(k.shape[3] == q.shape[3], lambda: f"q has head dim {q.shape[3]}, k has {k.shape[3]}")
    torch._check(k.shape[2] == v.shape[2], lambda: f"k has {k.shape[2]} positions, v has {v.shape[2]}")
    return [empty_output(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))]


def expanded(outs: Sequence[Tensor], lses: Sequence[Tensor], empty: str) -> list[Tensor]:
    """What the op is: compiler/ir/merge_lse.py. Laid out as attention's results, [B, T, H, D] in memory, so that the transpose that follows is free."""
    if outs[0].dim() != 4:
        return [x.contiguous() for x in _merge(outs, lses, empty)]
    out, lse = _merge([x.transpose(1, 2) for x in outs], [x.transpose(1, 2) for x in lses], empty)
    return [out.contiguous().transpose(1, 2), lse.transpose(1, 2).contiguous()]


#: merge_lse(outs [..., D] each, lses [...] each, empty): [out, lse] of all chunks
merge_lse = define("merge_lse(Tensor[] outs, Tensor[] lses, str empty) -> Tensor[]", expanded)
