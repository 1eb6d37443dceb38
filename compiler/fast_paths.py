"""torch's fused calls that a captured graph would hold as one opaque op, as the operations that they stand for, so that the passes see them.

nn.TransformerEncoderLayer calls torch._transformer_encoder_layer_fwd in eval mode without gradients, nn.MultiheadAttention
torch._native_multi_head_attention. Source: aten/src/ATen/native/transformers/transformer.cpp and attention.cpp, which say that a
mask of floats is taken as booleans: whatever is not zero is hidden.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def self_attention(x: Tensor, heads: int, qkv_weight: Tensor, qkv_bias: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, mask_type: int | None) -> Tensor:
    """x [B, T, E]; qkv_weight [3 E, E]; mask, True where hidden: [T, T] (type 0), [B, T] of the keys (1), or [B, H, T, T] (2). Returns [B, T, E]."""
    batch, length, width = x.shape
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in F.linear(x, qkv_weight, qkv_bias).chunk(3, -1))
    scores = (q / math.sqrt(width // heads)) @ k.transpose(-1, -2)
    if mask is not None:
        hidden = mask.to(torch.bool)
        hidden = hidden.view(batch, 1, 1, length) if mask_type == 1 else hidden
        scores = scores.masked_fill(hidden, -math.inf)
    return F.linear((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2), weight, bias)


def _encoder_layer(src, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, use_gelu, norm_first, eps, norm_weight_1, norm_bias_1, norm_weight_2, norm_bias_2,
                   ffn_weight_1, ffn_bias_1, ffn_weight_2, ffn_bias_2, mask=None, mask_type=None):
    if src.is_nested or not _is_readable(src, mask, mask_type):
        return NotImplemented

    def first(x):
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x):
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def mlp(x):
        return F.linear((F.gelu if use_gelu else F.relu)(F.linear(x, ffn_weight_1, ffn_bias_1)), ffn_weight_2, ffn_bias_2)

    x = src + self_attention(first(src) if norm_first else src, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)
    if norm_first:
        return x + mlp(second(x))
    x = first(x)
    return second(x + mlp(x))


def _multi_head_attention(query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask=None, need_weights=True, average_attn_weights=True, mask_type=None):
    if need_weights or query is not key or key is not value or query.is_nested or not _is_readable(query, mask, mask_type):
        return NotImplemented
    return self_attention(query, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type), None


def _is_readable(x: Tensor, mask: Tensor | None, mask_type: int | None) -> bool:
    """Three dims, and a mask whose type is said and whose shape is that type's."""
    return x.dim() == 3 and (mask is None or (mask_type, mask.dim()) in ((0, 2), (1, 2), (2, 4)))


#: function that Dynamo notes -> what it means, or NotImplemented for arguments that stay one call (nested tensors)
PARTS = {torch._transformer_encoder_layer_fwd: _encoder_layer, torch._native_multi_head_attention: _multi_head_attention}
