"""Attention over keys in chunks, put together exactly from the chunks' results and the logarithms of their sums.

    out_k = softmax(s_k) v_k        lse_k = log sum exp s_k        out = sum_k exp(lse_k - lse) out_k        lse = log sum_k exp lse_k

Associative and commutative, so that a prefix may be cut anywhere and merged in any order (FlashAttention-2, 2307.08691, section 3.1; vLLM and SGLang merge MLA's prefix chunks so). A chunk in which a row sees no
key has lse -inf and weight 0, whatever its result is; a row that sees none at all has result 0 and lse -inf.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_lse(outs: Sequence[Tensor], lses: Sequence[Tensor], empty: str = "zero") -> tuple[Tensor, Tensor]:
    """(out, lse) of all chunks. outs: [..., D], lses: [...], float dtypes; sums in float32, in float64 for float64. Returns out in outs' dtype, lse in the dtype of the sums.

    empty: what a row gives that sees no key in any chunk, "zero" or "nan"; "each": NaN where it sees none in one of them, as exp(lse_k - lse) out_k does where out_k is NaN.
    Small regions for the weights of every row, one for the sum. Raises ValueError for no chunks, or for a chunk without its lse.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge_lse: {len(outs)} results and {len(lses)} logarithms of sums; expected one of each for every chunk, and at least one chunk")
    dtype = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    stacked = torch.stack([x.to(dtype) for x in lses], -1)  # chunks last: the columns of a region's rows
    top = (stacked if empty == "each" else torch.maximum(stacked, torch.full_like(stacked, torch.finfo(dtype).min))).amax(-1, keepdim=True)  # -inf - -inf is NaN where no chunk has a key
    weights = torch.exp(stacked - top)
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(weights == 0, 0.0, weights / total) if empty == "zero" else weights / total  # "nan": 0 / 0
    out = None
    for x, w in zip(outs, weights.unsqueeze(-2).unbind(-1)):
        part = x.to(dtype) * w
        part = part if empty == "each" else torch.where(w == 0, 0.0, part)  # NaN of a softmax over no key
        out = part if out is None else out + part
    return out.to(outs[0].dtype), (top + torch.log(total)).squeeze(-1)
