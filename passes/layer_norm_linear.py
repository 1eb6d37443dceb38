"""layer_norm_linear: a layer norm that matmuls alone read  ->  the prologue of their tileweld::linear

    linear(layer_norm(x, [K], w, b, eps))   ->   norm "layer", prologue "(x - u)*r*c0[j] + c1[j]"
                                                 with u = mean(x), r = rsqrt(mean((x - u)^2) + eps) of the row

Weight and bias may be absent. All else, legality and cost, is as in rms_norm_linear. GPT-2, Falcon, Whisper and ViT have their norms
before the matmuls; BERT's are behind a residual that reads them too, and are refused.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph

from ..compiler.ir.graph import argument, is_call
from ..compiler.ir.products import Writes
from ..compiler.ir.prologue import Norm, fold
from ..compiler.ir.rewrite import Match, Refusal, Refused

NAME = "layer_norm_linear"
aten = torch.ops.aten


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every aten.layer_norm that a fused matmul reads, as a Match or as a Refusal."""
    writes = Writes(graph)
    for node in list(graph.nodes):
        if not is_call(node, aten.layer_norm.default):
            continue
        x, dims = node.args[:2]
        weight, bias, eps = argument(node, 2, "weight"), argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)
        try:
            vectors = tuple(t for t in (weight, bias) if t is not None)
            problem = f"the norm is over the last {len(dims)} dims, expected one" if len(dims) != 1 else ""
            found = fold(Norm(node, x, "layer", eps, vectors, lambda *names, w=weight, b=bias: _prologue(w, b, *names), problem), writes)
        except Refused as refused:
            yield refused.refusal
            continue
        if found is not None:
            yield found


def _prologue(weight, bias, *names: str) -> str:
    words, rest = "(x - u)*r", list(names)
    if weight is not None:
        words += f"*{rest.pop(0)}"
    return f"{words} + {rest[0]}" if bias is not None else words
