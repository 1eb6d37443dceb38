"""merge_lse: attention that a model computes in chunks of keys  ->  one attention with log-sum-exp for every chunk, and tileweld::merge_lse of them

    sum_k exp(lse_k - lse) softmax(x_k) v_k,  lse = log sum_k exp(lse_k)     ->     merge_lse([softmax(x_k) v_k], [logsumexp(x_k)])

However it is written (compiler/ir/chunks.py): log-sum-exps with the largest taken off, FlashAttention's running maximum and sum (2205.14135), a sigmoid of their difference (ring attention), a softmax over a stack of
chunks; one chunk whose weights are divided by their sum behind the product with v. What this pass leaves is softmax and logsumexp of the same scores, which `attention` makes one kernel of, and one op that merges, a
region. The chunks stay: a model takes its keys in pieces so that no more than a piece is in memory at a time.

Exact in real numbers. A row that sees no key in a chunk gives NaN where the model's softmax of that chunk does; with running maxima it counts nothing, where the model gives NaN if the very first chunk is empty.

Legality, each with a test that must be refused or left alone:
- the result is sum_k E_k O_k / sum_k E_k for every value of the maxima that were taken off: proved in a field of fractions;
- nobody else reads scores or weights;
- no gradient is wanted: the ops have none.

Cost: every product once, as before; scores and weights of a chunk are not written and read.
"""
from __future__ import annotations

from collections.abc import Iterator

import operator

import torch
from torch.fx import Graph, Node

from ..compiler.ir import attention_lse as _op  # noqa: F401 (registers the op)
from ..compiler.ir.chunk_rules import factors
from ..compiler.ir.chunks import WIDTH, Chunk, Chunks
from ..compiler.ir.graph import computed_from, insert, is_call, op_name, shape, value
from ..compiler.ir.products import late
from ..compiler.ir.rewrite import Match, Refusal
from ..compiler.ir.weights import why_trained

NAME = "merge_lse"
aten = torch.ops.aten


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every attention over chunks, the whole one of several that contain each other."""
    if not any(is_call(n, aten.logsumexp.default, aten.exp.default) for n in graph.nodes):
        return
    found = Chunks(graph)
    taken: set[Node] = set()
    for node in reversed(list(found.tensors)):
        if node in taken or (merged := found.merged(found.tensors[node])) is None or merged[0] != "out":
            continue
        chunks = [found.chunks[n] for n in merged[1]]
        if any(c.product is None for c in chunks) or len(chunks) == 1 and (chunks[0].is_plain or node is chunks[0].product):
            continue
        inside = {n for n in computed_from(node) if n in found.tensors}
        taken |= inside
        yield _match(graph, found, node, merged[1], chunks, inside)


def _match(graph: Graph, found: Chunks, root: Node, numbers: tuple[int, ...], chunks: list[Chunk], inside: set[Node]) -> Match | Refusal:
    elements = [n for n, t in found.tensors.items() if t.terms[0].kind in ("scores", "weights") and t.terms[0].chunk in numbers]
    for node in elements:
        for user in node.users:
            if user not in found.tensors and not is_call(user, aten.sym_size.int):
                return Refusal(f"the scores or weights of a chunk are also used by {op_name(user)}", user if user.op != "output" else node, "do not return or reuse them")
    if reason := why_trained(graph, [c.scores for c in chunks]):
        return Refusal(f"attention in chunks, but {reason}; merging by log-sum-exp has no gradient here", root, "compile under torch.no_grad(), or freeze the weights")
    tensor = found.tensors[root]
    if any(x is None and n != 1 for x, n in zip(tensor.labels, shape(root))) or len({(c.labels, c.dim) for c in chunks}) > 1:
        return Refusal("the chunks have their rows and heads in different dims", root, "lay all of them out alike")
    sums = [n for n, t in found.tensors.items() if found.merged(t) == ("lse", numbers) and any(u not in found.tensors for u in n.users) and all(x is not None or n == 1 for x, n in zip(t.labels, shape(n)))]
    roots = sorted([root, *sums[-1:]])
    inputs = [n for c in chunks for n in (c.scores, factors(c.product)[1 - c.position])]
    moved = late(roots[0], inputs, set(roots))
    if moved is None:
        return Refusal("a chunk is computed from a part of the result", root)

    def build(graph: Graph):
        for node in moved:
            roots[0].prepend(node)
        out, lse = _build(graph, chunks)
        made = {n: _as(graph, x, found.tensors[n].labels, n, chunks[0]) for n, x in zip((root, *sums[-1:]), (out, lse))}
        return tuple(made[n] for n in roots) if len(roots) > 1 else made[root]

    text = f"{len(chunks)} chunks of keys" if len(chunks) > 1 else "one chunk, divided behind the product with v"
    return Match(roots[0], tuple(dict.fromkeys(inputs)), build, text, tuple(roots[1:]))


def _build(graph: Graph, chunks: list[Chunk]) -> tuple[Node, Node | None]:
    """(out with dims in the order of the scores' rows and the head dim last, lse without the keys' dim)"""
    outs, sums = [], []
    for c in chunks:
        operands = list(factors(c.product))
        weights = insert(graph, aten.softmax.int, c.scores, c.dim)
        dtype = value(operands[c.position]).dtype
        operands[c.position] = weights if value(weights).dtype == dtype else insert(graph, aten.to.dtype, weights, dtype)
        out = insert(graph, aten.einsum.default, c.product.args[0], operands) if is_call(c.product, aten.einsum.default) else insert(graph, c.product.target, *operands)
        outs.append(_permuted(graph, out, [c.labels.index(x) for x in (*_rows(c), WIDTH)]))
        if len(chunks) > 1:
            sums.append(insert(graph, aten.logsumexp.default, c.scores, [c.dim]))
    if len(chunks) == 1:
        return outs[0], None
    merged = insert(graph, torch.ops.tileweld.merge_lse.default, outs, sums, "zero" if any(c.shifted for c in chunks) else "each")
    return insert(graph, operator.getitem, merged, 0), insert(graph, operator.getitem, merged, 1)


def _rows(c: Chunk) -> list[tuple]:
    return [("row", n) for n in range(value(c.scores).dim()) if n != c.dim]


def _permuted(graph: Graph, x: Node, order: list[int]) -> Node:
    return x if order == list(range(len(order))) else insert(graph, aten.permute.default, x, order)


def _as(graph: Graph, x: Node, labels: tuple, like: Node, c: Chunk) -> Node:
    """x with its dims in the order of labels, dims of one element where a label is None, in the dtype of like."""
    order = [*_rows(c), *([WIDTH] if WIDTH in labels else [])]
    x = _permuted(graph, x, [order.index(k) for k in labels if k is not None])
    for dim, k in enumerate(labels):
        if k is None:
            x = insert(graph, aten.unsqueeze.default, x, dim)
    return x if value(x).dtype == value(like).dtype else insert(graph, aten.to.dtype, x, value(like).dtype)
