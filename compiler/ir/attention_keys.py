"""``tileweld::attention_keys``: attention whose keys are made of what is stored, element by element, where a kernel reads them.

    attention_keys(q, k, v, ..., key="k*c0[b, h, floordiv(j, 64), d]") = attention(q, k8 * scales of channels for every 64 positions, v, ...)

``key`` is text of the scalar language: of ``k``, the stored element, ``b``, ``h``, the head of k (not of q), ``j``, the position, ``d``, the place in the head dim, and captures. KIVI's keys (2402.02750)
need it: a scale that differs from channel to channel and from group to group of positions is a factor neither of the scores nor of the queries, and the newest positions are floats in another tensor,
"where(j < c2, k*c0[b, h, floordiv(j, 64), d], c1[b, h, mod(j, 64), d])". Keys are never written in floats: a kernel applies the text to the tile that it has just loaded, once for all queries of a block.

k may have fewer positions than v: those behind read k as 0. No gradient: the rewrite makes it in inference.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import Variant, compute_dtype, empty_output, reference, variant_of
from .evaluate import Evaluator


def keys_of(k: Tensor, captures: Sequence[Tensor], sizes: Sequence[int], variant: Variant, keys: int, dtype: torch.dtype) -> Tensor:
    """What k [B, Hk, at most ``keys``, D] is taken for: [B, Hk, keys, D] in ``dtype``."""
    stored = torch.nn.functional.pad(k.to(dtype), (0, 0, 0, keys - k.shape[2]))
    ranges = {"b": (stored.shape[0], 0), "h": (stored.shape[1], 1), "j": (keys, 2), "d": (stored.shape[3], 3)}
    env = {name: torch.arange(n, device=k.device).view([-1 if axis == a else 1 for a in range(4)]) for name, (n, axis) in ranges.items()}
    evaluate = Evaluator(env | {"Tk": keys, **{f"n{n}": size for n, size in enumerate(sizes)}, "k": stored}, captures, dtype, k.device)
    return evaluate.float(variant.key_expr).expand(stored.shape)


def definition(q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], sizes: Sequence[int], variant: Variant) -> Tensor:
    """attention's definition over `keys_of`."""
    keys = keys_of(k, captures, sizes, variant, v.shape[2], compute_dtype(q.dtype))
    return reference(q, keys, v, captures, sizes, dataclasses.replace(variant, key=""))


@torch.library.custom_op("tileweld::attention_keys", mutates_args=())
def attention_keys(q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], sizes: Sequence[int], score: str, mask: str, fill: float, sink: str, empty: str, value: str, key: str) -> Tensor:
    """Attention (compiler/ir/attention.py) over keys that are a text of what is stored.

    q [B, H, Tq, D], k [B, Hk, at most Tk, D], v [B, Hv, Tk, Dv]; the rest as in attention. Returns [B, H, Tq, Dv] in q's dtype over [B, Tq, H, Dv] memory.
    """
    return definition(q, k, v, captures, sizes, variant_of(captures, score, mask, fill, sink, empty, value, key))


@attention_keys.register_fake
def _(q, k, v, captures, sizes, score, mask, fill, sink, empty, value, key):
    torch._check(k.shape[3] == q.shape[3], lambda: f"q has head dim {q.shape[3]}, k has {k.shape[3]}")
    torch._check(k.shape[2] <= v.shape[2], lambda: f"k has {k.shape[2]} positions, v has {v.shape[2]}")
    return empty_output(q, v.shape[3])
