"""Tables of embeddings that no quantised layer is tied to: which of them become int8 rows, and why the others stay float.

A table is a quarter to a half of a small model (SmolLM2-135M: 21 %, MiniLM: 52 %), and looking a row up costs the same in either form: it is for memory alone, so that
small tables (positions, token types), whose rounding would save nothing, are left.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Collection

from torch import Tensor, nn

from ..compiler.ir.int8_scheme import Int8

LARGE = 1 << 20  # elements: 4 MiB of float32


def choose_tables(model: nn.Module, settings: Int8, embedding: bool | None, filter_fn: Callable[[nn.Module, str], bool] | None, chosen: Collection[nn.Module]) -> tuple[dict[str, nn.Embedding], dict[str, str]]:
    """(tables to quantise, those left out with the reason) by name. chosen: the linear layers that become int8, with which the tables that are tied to them go."""
    tied = {id(m.weight) for m in chosen}
    others = {id(p): name for name, m in model.named_modules() if not isinstance(m, nn.Embedding) for p in m._parameters.values() if p is not None}
    tables, left_out = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and id(module.weight) not in tied:
            if (reason := _why_left(name, module, settings, embedding, filter_fn, others.get(id(module.weight)))) is None:
                tables[name] = module
            else:
                left_out[name] = reason
    return tables, left_out


def _why_left(name: str, table: nn.Embedding, settings: Int8, embedding: bool | None, filter_fn, other: str | None) -> str | None:
    if embedding is False:
        return "a table, left out by embedding=False"
    if (reason := settings.left_out(name)) is not None:
        return reason
    if other is not None:
        return f"a table whose weight is also that of {other}, which stays float"
    if embedding is None:
        if settings.scheme != "weight_only":
            return f"a table is left out of {settings.scheme} (embedding=True takes it in)"
        if filter_fn is not None:
            return "a table, and filter_fn is asked for linear layers (embedding=True asks it for tables too)"
        if table.weight.numel() < LARGE:
            return f"a table of less than {LARGE:,} numbers saves little (embedding=True takes it in)"
    elif filter_fn is not None and not filter_fn(table, name):
        return "left out by filter_fn"
    if type(table) is not nn.Embedding:
        return f"a {type(table).__name__}, whose forward may be another than that of nn.Embedding"
    if table.max_norm is not None:
        return "a table with max_norm, which is scaled where it is looked up"
    if table._forward_hooks or table._forward_pre_hooks or table._backward_hooks or table._backward_pre_hooks:
        return "a table with hooks, which its replacement would not have"
    weight = table.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or weight.is_quantized or weight.is_meta or tuple(weight.shape) != (table.num_embeddings, table.embedding_dim):
        return "a table whose weight is quantised, sharded, or without numbers"
    if (problem := settings.problem(weight.shape[1], weight.dtype)) is not None:
        return problem[0]
    return None if is_finite(weight) else "its weight has inf or NaN"


def is_finite(x: Tensor) -> bool:
    """x.isfinite().all() without its copies of x, 1.75 times the weight: the largest would be the peak of memory."""
    return x.numel() == 0 or all(math.isfinite(end.item()) for end in x.detach().aminmax())
