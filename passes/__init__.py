"""Rewrites of the captured graph into fused ops, one file each.

A rewrite is a module with NAME and find(graph), see compiler/ir/rewrite.py; a normalisation has transform(gm) instead.
"""
from . import attention, canonicalise, layer_norm, rms_norm

PIPELINE = (
    canonicalise,  # first: what means the same is spelled the same, and nothing is written in place any more
    attention,  # softmax(score(q k^T)) v -> tileweld::attention
    layer_norm,  # (x - mean) / sqrt(var + eps) w + b, spelled out -> aten.layer_norm, which the passes below look for
    rms_norm,  # x rsqrt(mean(x^2) + eps) w -> tileweld::rms_norm
)
