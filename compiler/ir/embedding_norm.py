"""``tileweld::embedding_norm``: a sum of embeddings and the norm of it, with both results.

    s = t_0 + t_1 + ...        from the left, every term and every sum rounded as eager does
    t_k = tables[k][indices[k]] scales[k]      a gathered row; without an index the table itself, which broadcasts (position rows)
    y = norm(s)                "rms": tileweld::rms_norm; "layer": aten.layer_norm over the last dim

Its parts are aten.embedding, mul, add and the norm. An index out of range raises as aten.embedding does; ``padding`` (-1: none) is the row of a table
whose gradient stays zero. One kernel reads the rows and writes s (where it is used) and y; apart, every term and sum is written and read again.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .add_norm import layer_norm_parts
from .composite import define
from .rms_norm import reference


def _sum(tables, indices, padding, scales, factors):
    total = None
    for table, index, pad, scale, factor in zip(tables, indices, padding, scales, factors, strict=True):
        term = table if index is None else torch.embedding(table, index, pad)
        term = term if scale == 1.0 else term * scale
        term = term if factor is None else term * factor
        total = term if total is None else total + term
    return total


def expanded(tables: Sequence[Tensor], indices: Sequence[Tensor | None], padding: Sequence[int], scales: Sequence[float], factors: Sequence[Tensor | None], norm: str,
             weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, cast: str) -> tuple[Tensor, Tensor]:
    """(s, y), both [..., D].

    tables: [rows, D] each, with integer indices of any shape, or a tensor that broadcasts where the index is None (not the first); scales: numbers;
    factors: scalar tensors or None; norm "rms" (weight, eps, offset, cast as tileweld::rms_norm) or "layer" (weight, bias, eps).
    """
    s = _sum(tables, indices, padding, scales, factors)
    return s, reference(s, weight, eps, offset, cast) if norm == "rms" else layer_norm_parts(s, weight, bias, eps)[0]


def _differentiable(tables, indices, padding, scales, factors, norm, weight, bias, eps, offset, cast):
    s = _sum(tables, indices, padding, scales, factors)
    return s, torch.ops.tileweld.rms_norm(s, weight, eps, offset, cast) if norm == "rms" else torch.nn.functional.layer_norm(s, s.shape[-1:], weight, bias, eps)


embedding_norm = define("embedding_norm(Tensor[] tables, Tensor?[] indices, int[] padding, float[] scales, Tensor?[] factors, str norm, Tensor? weight, Tensor? bias, float eps, float offset, "
                        "str cast) -> (Tensor, Tensor)", expanded, _differentiable)
