"""``tileweld::rotary``: rotary position embedding (Su et al., 2104.09864) of the first ``width`` elements of every row.

    y[d] = x[d] cos[d] + sign(d) x[partner(d)] sin[d]        d < width
    y[d] = x[d]                                              from width on (partial rotary)

    half-split    pairs (d, d + width/2): Llama, NeoX              sign -1 in the first half, +1 in the second
    interleaved   pairs (2t, 2t + 1): GPT-J, the complex product   sign -1 at even d, +1 at odd d
    regrouped     x's pairs are interleaved, y's half-split: DeepSeek, whose scores are the same for q and k in any common order

cos and sin have ``width`` columns, or width/2 of which both elements of a pair share one; they broadcast against the rows of x.
Scalings of the angles or the tables (NTK, YaRN) are in their values. Computed in float32 (float64 for float64), rounded once.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .composite import define
from .rms_norm import compute_dtype

PAIRS = ("half-split", "interleaved", "regrouped")


def expanded(x: Tensor, cos: Tensor, sin: Tensor, width: int, pairs: str) -> Tensor:
    """Rotary position embedding: x [..., D], width <= D and even; cos, sin [..., width] or [..., width/2], broadcast against x; pairs: one of PAIRS. Returns [..., D] in x's dtype."""
    torch._check(pairs in PAIRS, lambda: f"rotary: pairs {pairs!r}, expected one of {PAIRS}")
    torch._check(width % 2 == 0 and 0 <= width <= x.shape[-1], lambda: f"rotary: width {width} of rows of {x.shape[-1]}")
    for name, table in (("cos", cos), ("sin", sin)):
        torch._check(table.shape[-1] in (width, width // 2), lambda: f"rotary: {name} has {table.shape[-1]} columns, expected {width} or {width // 2}")
    half, dtype = width // 2, compute_dtype(x.dtype)
    wide = x.to(dtype)

    def pair(t, interleaved):
        if interleaved:
            return t[..., 0:width:2], t[..., 1:width:2]
        return t[..., :half], t[..., half:width]

    def table(t):
        t = t.to(dtype)
        return pair(t, pairs == "interleaved") if t.shape[-1] == width else (t, t)

    (a, b), (cos_a, cos_b), (sin_a, sin_b) = pair(wide, pairs != "half-split"), table(cos), table(sin)
    first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    y = torch.stack([first, second], -1).flatten(-2) if pairs == "interleaved" else torch.cat([first, second], -1)
    if width < x.shape[-1]:
        y = torch.cat([y, wide[..., width:]], -1)
    return y.to(x.dtype)


rotary = define("rotary(Tensor x, Tensor cos, Tensor sin, int width, str pairs) -> Tensor", expanded)
