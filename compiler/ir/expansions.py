"""What each fused op is in plain torch operations, for region codegen: it traces these where no kernel of the op's own runs.

A row is op -> function of the op's own arguments that returns what the op returns, in dtypes and places of rounding too.
"""
from __future__ import annotations

import torch

from . import add_norm, attention_lse, embedding_norm, linear, rms_norm, rotary

EXPANSIONS = {
    torch.ops.tileweld.rms_norm.default: rms_norm.reference,  # x rsqrt(mean(x^2) + eps) w
    torch.ops.tileweld.linear.default: linear.expanded,  # norm, library matmuls, epilogues
    torch.ops.tileweld.add_rms_norm.default: add_norm.expanded_add_rms_norm,  # s = x + residual, and its norm
    torch.ops.tileweld.add_layer_norm.default: add_norm.expanded_add_layer_norm,
    torch.ops.tileweld.rotary.default: rotary.expanded,  # x cos + partner(x) sin
    torch.ops.tileweld.merge_lse.default: attention_lse.expanded,  # chunks of keys weighted by exp(lse_k - lse)
    torch.ops.tileweld.embedding_norm.default: embedding_norm.expanded,  # gathers, their sum, and its norm
}
