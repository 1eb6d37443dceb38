"""rms_norm_linear: an RMS norm that matmuls alone read  ->  the prologue of their tileweld::linear; the normalised x is never stored

    linear(rms_norm(x, w, eps))     ->     norm "rms", prologue "x*r*c0[j]"           with r = rsqrt(mean(x^2) + eps) of the row
    Gemma's weight                  ->     prologue "x*r*(c0[j] + 1)"

Sum over k of (x_k r w_k) W_jk is linear in r, so a kernel may apply r to x or to the accumulator; it says in its file which.
Runs after the matmuls are fused; several ops that read one norm (a parallel block's attention and MLP) become one.

Legality, each with a test that must be refused:
- every reader of the norm is a matmul of it (a norm whose result is also the residual, or is returned, is computed anyway);
- the norm is over the last dim, its weight a vector of it; eps is a number; x, weight and matmul have one dtype;
- the ops do not depend on each other;   - nothing is written in place that they read.
Half types: the norm's result is not rounded before the product, which is more precise than eager. A norm behind the matmul
(Gemma 2's second ones, BERT's) is not this.

Cost for M rows of K: the FLOPs of the norm, 4 M K, once more for every panel of the kernel that recomputes it; saved are a write
and the reads of M K elements, and a launch.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph

from ..compiler.ir import rms_norm as _rms_norm_op  # noqa: F401 (registers the op)
from ..compiler.ir import scalar as sc
from ..compiler.ir.graph import is_call
from ..compiler.ir.printer import text
from ..compiler.ir.products import Writes
from ..compiler.ir.prologue import Norm, fold
from ..compiler.ir.rewrite import Match, Refusal, Refused

NAME = "rms_norm_linear"


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every tileweld::rms_norm that a fused matmul reads, as a Match or as a Refusal."""
    writes = Writes(graph)
    for node in list(graph.nodes):
        if not is_call(node, torch.ops.tileweld.rms_norm.default):
            continue
        x, weight, eps, offset, _ = node.args
        try:
            found = fold(Norm(node, x, "rms", eps, () if weight is None else (weight,), lambda *w, offset=offset: _prologue(offset, *w)), writes)
        except Refused as refused:
            yield refused.refusal
            continue
        if found is not None:
            yield found


def _prologue(offset: float, weight: str | None = None) -> str:
    if weight is None:
        return "x*r"
    return f"x*r*{weight}" if offset == 0 else f"x*r*({weight} + {text(sc.number(offset))})"
