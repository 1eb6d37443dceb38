"""Keys and values that a constant makes larger than what they are made of, a chunk at a time: naive multi-head latent attention whose expansion is never in memory as a whole.

    attention(q, W_UK c, W_UV c)    ->    merge_lse over chunks s of  attention_lse(q, W_UK c[s], W_UV c[s])

The same work (each token is expanded once) in more passes over the results, [B, H, Sq, Dv] a chunk: by its cost never the cheapest order, it is what a limit on memory asks for (vLLM's chunked context does the same for
a prefill with a long prefix). Positions in score, mask and value are shifted in their texts, so that no mask is cut.
"""
from __future__ import annotations

import operator
from collections.abc import Sequence

import sympy
import torch
from torch.fx import Graph, Node

from . import attention_lse as _op  # noqa: F401 (registers the op)
from . import scalar as sc
from .association_trace import Piece, _coefficients, tensor_view
from .attention import variant_of
from .graph import aten, insert, shape, value
from .layout import size_node
from .printer import text
from .unliftable import Unliftable

tileweld = torch.ops.tileweld
MOST = 64  # chunks: each is a kernel launch and a pass over the results
STEP = 64  # keys: chunks are whole tiles


def length_of(keys: int, bytes_of_a_key: int, limit: int) -> int | None:
    """Keys of a chunk, so that its expansion has at most ``limit`` bytes; None where one chunk is enough."""
    if keys * bytes_of_a_key <= limit:
        return None
    return max(STEP, limit // bytes_of_a_key // STEP * STEP, -(-keys // MOST // STEP) * STEP)


def is_chunkable(pieces_of_k: Sequence[Piece], pieces_of_v: Sequence[Piece], free) -> bool:
    """Are all free pieces products with a matrix whose rows stand head by head, and is nothing of the keys padding?"""
    if any(p.zero for p in pieces_of_k) or any(p.zero for p in pieces_of_v[:1]):
        return False
    for p in (*pieces_of_k, *pieces_of_v):
        if free(p):
            if p.factor.row is None:
                return False
            try:
                per_head, per_place, first = _coefficients(p.factor.row)
            except Unliftable:
                return False
            if per_place != 1 or per_head < p.length or first % per_head + p.length > per_head or shape(p.factor.node)[-1] % per_head != 0:
                return False
        elif p.factor is not None:
            return False
    return True


def build(graph: Graph, node: Node, pieces_of_k: Sequence[Piece], pieces_of_v: Sequence[Piece], free, heads: int, batch, keys, length: int, count: int, sources) -> Node:
    """Attention over ``count`` chunks of ``length`` keys, the last one up to the end."""
    q, _, _, captures, sizes, *texts = node.args
    total = size_node(graph, keys, sources)
    views = {p: tensor_view(graph, p, batch, heads, keys, sc.J, sources) for p in (*pieces_of_k, *pieces_of_v) if not p.zero}
    outs, sums = [], []
    for n in range(count):
        start, stop = n * length, (n + 1) * length if n + 1 < count else total
        expanded: dict[Node, Node] = {}

        def part(p: Piece) -> Node:
            x = insert(graph, aten.slice.Tensor, views[p], 2, start, stop)
            if not free(p):
                return insert(graph, aten.expand.default, x, [-1, heads, -1, -1]) if shape(x)[1] != heads else x
            if p.factor.node not in expanded:
                weight = insert(graph, aten.permute.default, p.factor.weight, [1, 0]) if p.factor.transposed else p.factor.weight
                expanded[p.factor.node] = insert(graph, aten.linear.default, insert(graph, aten.squeeze.dim, x, 1), weight, *([p.factor.bias] if p.factor.bias is not None else []))
            y = expanded[p.factor.node]
            per_head, _, first = _coefficients(p.factor.row)
            lead = [insert(graph, aten.sym_size.int, y, d) for d in (0, 1)]
            y = insert(graph, aten.reshape.default, y, [*lead, int(shape(y)[-1]) // per_head, per_head])
            for dim, (low, size) in ((2, (first // per_head, heads)), (3, (first % per_head, p.length))):
                if low or size != shape(y)[dim]:
                    y = insert(graph, aten.slice.Tensor, y, dim, low, low + size)
            return insert(graph, aten.permute.default, y, [0, 2, 1, 3])

        k = _joined(graph, [part(p) for p in pieces_of_k])
        v = _joined(graph, [part(p) for p in pieces_of_v if not p.zero])
        if pieces_of_v[-1].zero:
            v = insert(graph, aten.constant_pad_nd.default, v, [0, sum(p.length for p in pieces_of_v if p.zero)], 0.0)
        made = insert(graph, tileweld.attention_lse.default, q, k, v, captures, [*sizes, total], *_shifted(captures, len(sizes), texts, start))
        outs.append(insert(graph, operator.getitem, made, 0))
        sums.append(insert(graph, operator.getitem, made, 1))
    merged = insert(graph, tileweld.merge_lse.default, outs, sums, "zero" if texts[4] == "zero" else "nan")
    return insert(graph, operator.getitem, merged, 0)


def _joined(graph: Graph, parts: list[Node]) -> Node:
    return parts[0] if len(parts) == 1 else insert(graph, aten.cat.default, parts, -1)


def _shifted(captures, count: int, texts: list, start: int) -> list:
    """score, mask, fill, sink, empty, value for keys that begin at ``start``: j is j + start, Tk the size after the others; a sink counts in the first chunk alone."""
    variant = variant_of([value(c) for c in captures], *texts)
    names = {sc.J: sc.J + sympy.Integer(start), sc.TK: sc.size_symbol(count)}
    move = lambda e: "" if e is None else text(e.xreplace(names))
    return [move(variant.score_expr), move(variant.mask_expr), texts[2], move(variant.sink_expr) if start == 0 else "", texts[4], *([move(variant.value_expr)] if variant.value else [])]
