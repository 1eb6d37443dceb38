"""Selectors: which implementation a fused op gets. One function an op, a row in `SELECTORS`."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.fx import Node

from ..codegen.cpp import attention as cpp_attention
from .ir.attention import Variant, empty_output, variant_of
from .ir.graph import value
from .ir.kernel import Kernel
from .options import Options


@dataclasses.dataclass
class Choice:
    """How one fused op runs: ``function(*args)`` of the op's own arguments, or a kernel from which ``bind(launch)`` makes that function."""

    op: str
    reason: str
    name: str = "reference"
    function: Callable | None = None
    kernel: Kernel | None = None
    bind: Callable[[Callable], Callable] | None = None


def attention(node: Node, target: str, options: Options) -> Choice:
    """tileweld::attention: a library call where it is at its limit, a generated kernel otherwise, the definition where there is none."""
    q, k, v, captures, sizes, *texts = node.args
    tensors = [value(x) for x in (q, k, v)]
    captured = [value(c) for c in captures]
    variant = variant_of(captured, *texts)
    dtype, width, value_width = tensors[0].dtype, tensors[0].shape[3], tensors[2].shape[3]
    if target == "reference":
        return Choice("attention", "options ask for it")
    if dtype == torch.float64:
        return Choice("attention", "float64 has no kernel")
    if not (isinstance(width, int) and isinstance(value_width, int)):
        return Choice("attention", "the head dim is symbolic")
    if target == "cpp" and (function := _library(variant, dtype)) is not None:
        return Choice("attention", "plain or causal scores: the library kernel is at the limit of the CPU", "aten:scaled_dot_product_attention", function)
    emit = cpp_attention.emit if target == "cpp" else _triton_emit()
    kernel = emit(variant, q_dtype=dtype, capture_dtypes=[c.dtype for c in captured], capture_ranks=[c.dim() for c in captured], head_dim=width, value_dim=value_width, num_sizes=len(sizes))
    return Choice("attention", "generated for this score and mask", kernel=kernel, bind=_bind_attention)


def _triton_emit():
    from ..codegen.triton import attention as triton_attention  # triton is an optional dependency

    return triton_attention.emit


def _library(variant: Variant, dtype: torch.dtype) -> Callable | None:
    """torch's own SDPA for a scaled score, no mask or the causal one, and rows that always see a key."""
    if variant.linear_scale is None or variant.sink or variant.mask not in ("True", "j <= i") or dtype != torch.float32:
        return None
    causal, scale = variant.is_causal, variant.linear_scale

    def scaled_dot_product_attention(q, k, v, captures, sizes, *texts):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1])

    return scaled_dot_product_attention


def _bind_attention(launch):
    def attention_kernel(q, k, v, captures, sizes, *texts):
        out = empty_output(q, v.shape[3])
        launch([out, q, k, v, *captures], sizes, ())
        return out

    return attention_kernel


#: op -> selector(node, target, options) -> Choice
SELECTORS = {torch.ops.tileweld.attention.default: attention}
