"""An int8 KV cache: a byte an element, and a scale for every token and KV head.

    scale[b, h, j] = max_d |x[b, h, j, d]| / 127        q = round(x / scale)        x ~ q scale, |x - q scale| <= scale / 2

Tokens are quantised alone, so that appending gives what quantising all at once gives, bit by bit. `update` returns the dequantised tensors by
plain torch operations: in eager they are made anew at every step, which is right and slow; under torch.compile(backend="tileweld")
attention reads the int8 elements, and the scales fold into its score and its weights (passes/attention.py).

A row with an inf or a NaN has a scale that is one: everything read from it is NaN. A row of zeros has the scale 0.
"""
from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127  # of a quantised element: the range is symmetric
ROUND = 1.5 * 2.0**23  # adding it to a float32 rounds to the nearest integer, to even from halfway; unlike torch.round it becomes part of one kernel with all the rest


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q int8 [..., D], scale float32 [..., 1]) of keys or values x [..., D] of a float dtype; symmetric, one scale for the last dim."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / LARGEST
    divisor = torch.where(scale == 0, 1, scale)
    q = ((wide / divisor).clamp(-LARGEST, LARGEST) + ROUND) - ROUND
    return torch.where(q == q, q, 0).to(torch.int8), scale


def dequantize_kv(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q [..., D] int8 times scale float32 [..., 1], rounded once to ``dtype``."""
    return (q.float() * scale).to(dtype)


class Int8KV:
    """Keys and values of one layer, for a loop that is written by hand.

        cache = tileweld.Int8KV(batch, kv_heads, length, head_dim, dtype=torch.float32)
        k, v = cache.update(k, v, positions)          # in a model's forward; then attention over k and v with a mask for what is not filled yet

    keys, values: int8 [batch, KV heads, length, head dim]; key_scales, value_scales: float32 [batch, KV heads, length, 1].
    dtype: of what `update` returns.
    """

    def __init__(self, batch: int, heads: int, length: int, head_dim: int, value_dim: int | None = None, *, dtype: torch.dtype = torch.float32, device=None):
        self.keys = torch.zeros((batch, heads, length, head_dim), dtype=torch.int8, device=device)
        self.values = torch.zeros((batch, heads, length, value_dim or head_dim), dtype=torch.int8, device=device)
        self.key_scales, self.value_scales = (torch.zeros((batch, heads, length, 1), dtype=torch.float32, device=device) for _ in range(2))
        self.dtype = dtype

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """keys, key_scales, values, value_scales"""
        return self.keys, self.key_scales, self.values, self.value_scales

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors)

    def update(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise and store k and v [batch, KV heads, T, head dim] at ``positions`` [T] (int64); returns the whole cache, dequantised."""
        for x, q, scale in ((k, self.keys, self.key_scales), (v, self.values, self.value_scales)):
            new, new_scale = quantize_kv(x)
            q.index_copy_(2, positions, new)
            scale.index_copy_(2, positions, new_scale)
        return dequantize_kv(self.keys, self.key_scales, self.dtype), dequantize_kv(self.values, self.value_scales, self.dtype)

    def reset(self) -> None:
        """Forget all tokens, in the same memory."""
        for x in self.tensors:
            x.zero_()
