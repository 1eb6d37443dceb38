"""Attention over keys in chunks, put together exactly from the chunks' results and the logarithms of their sums.

    out_k = softmax(s_k) v_k        lse_k = log sum exp s_k        out = sum_k exp(lse_k - lse) out_k        lse = log sum_k exp lse_k

Associative and commutative, so that a prefix may be cut anywhere and merged in any order (FlashAttention-2, 2307.08691, section 3.1; vLLM and SGLang merge MLA's prefix chunks so). A chunk in which a row sees no
key has lse -inf and weight 0, whatever its result is; a row that sees none at all has result 0 and lse -inf.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_lse(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of all chunks. outs: [..., D], lses: [...], float dtypes; sums in float32, in float64 for float64. Returns out in outs' dtype, lse in the dtype of the sums.

    Raises ValueError for no chunks, or for a chunk without its lse.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge_lse: {len(outs)} results and {len(lses)} logarithms of sums; expected one of each for every chunk, and at least one chunk")
    dtype = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    stacked = torch.stack([x.to(dtype) for x in lses])
    lse = torch.logsumexp(stacked, 0)
    weights = torch.where(stacked == -torch.inf, 0.0, torch.exp(stacked - lse)).unsqueeze(-1)  # -inf - -inf is NaN where no chunk has a key
    parts = torch.where(weights == 0, 0.0, torch.stack([x.to(dtype) for x in outs]))  # NaN of a softmax over no key
    return (weights * parts).sum(0).to(outs[0].dtype), lse
