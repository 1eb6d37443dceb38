"""``tileweld::merge_heads``: the weights of an attention layer with fewer KV heads, from those it has. MHA to GQA as an operation on weights.

    q [H d, E], k [Hkv d, E], v [Hkv dv, E], o [Dout, H dv], biases of q, k, v      ->      the same with Hkv = ``kv_heads``

Query head h reads KV head h // (H / Hkv) before and after. The maths is that of compiler/ir/head_merge.py, method "data" with the identity
for E[x x^T]: weights alone decide. **Lossy**, unless the heads of a group are one up to the gauge, then exact. All in float64, rounded once.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .head_groups import group_heads
from .head_merge import Heads, merge_layer, similarity
from .linear_map import pairs_of


@torch.library.custom_op("tileweld::merge_heads", mutates_args=())
def merge_heads(q: Tensor, k: Tensor, v: Tensor, o: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None,
                heads: int, old_heads: int, kv_heads: int, rotary: Sequence[int], permutes: bool) -> list[Tensor]:
    """Merge `old_heads` KV heads into `kv_heads`, a divisor of them.

    q [heads d, E], k [old_heads d, E], v [old_heads dv, E], o [Dout, heads dv], one float dtype; biases [heads d] and so on, or None.
    rotary: (block, half), dims t and t + half of every block of a head are a complex number that positions turn; (0, 0): no rotary.
    permutes: heads may change places; else neighbours are merged (scores that know their head, as ALiBi's).
    Returns q, k, v, o, the biases that are not None, each in its dtype, and float64 [2]: relative error of the scores, and of the output at fixed attention.
    """
    def rows(weight, bias, n):
        wide = weight.double()
        return torch.cat([wide, (wide.new_zeros(len(wide)) if bias is None else bias.double())[:, None]], 1).unflatten(0, (n, -1))

    pairs = pairs_of(*rotary, q.shape[0] // heads)
    old = Heads(rows(q, q_bias, heads), rows(k, k_bias, old_heads), rows(v, v_bias, old_heads), o.double().unflatten(1, (heads, -1)).transpose(0, 1),
                None if pairs is None else pairs.to(q.device))
    size, eye = old_heads // kv_heads, torch.eye(old.q.shape[2], dtype=torch.float64, device=q.device)
    if size == 1:
        return [*(x.clone() for x in (q, k, v, o, q_bias, k_bias, v_bias) if x is not None), eye.new_zeros(2)]
    free = permutes and kv_heads > 1
    groups = group_heads(similarity(old, eye).tolist(), kv_heads) if free else [list(range(i, i + size)) for i in range(0, old_heads, size)]
    new, keys, values = merge_layer(old, eye, groups, "data")
    weights = [w.flatten(0, 1)[:, :-1].to(x.dtype) for w, x in ((new.q, q), (new.k, k), (new.v, v))]
    biases = [w.flatten(0, 1)[:, -1].to(x.dtype) for w, x in ((new.q, q_bias), (new.k, k_bias), (new.v, v_bias)) if x is not None]
    return [*(w.contiguous() for w in weights), new.o.transpose(0, 1).flatten(1).to(o.dtype).contiguous(), *(b.contiguous() for b in biases), eye.new_tensor([keys, values])]


@merge_heads.register_fake
def _(q, k, v, o, q_bias, k_bias, v_bias, heads, old_heads, kv_heads, rotary, permutes):
    torch._check(old_heads % kv_heads == 0, lambda: f"merge_heads: {kv_heads} KV heads do not divide {old_heads}")
    torch._check(heads % old_heads == 0, lambda: f"merge_heads: {heads} query heads are no multiple of {old_heads} KV heads")
    size = old_heads // kv_heads
    few = lambda x: x.new_empty((x.shape[0] // size, *x.shape[1:]))
    biases = [x.new_empty(x.shape) if x is q_bias else few(x) for x in (q_bias, k_bias, v_bias) if x is not None]
    return [q.new_empty(q.shape), few(k), few(v), o.new_empty(o.shape), *biases, q.new_empty(2, dtype=torch.float64)]
