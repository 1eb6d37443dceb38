"""embedding_norm: s = emb(tokens) scale + emb(types) + emb(positions) + ...; y = norm(s)  ->  (s, y) = tileweld::embedding_norm(tables, indices, ...)

Start at a norm (tileweld::rms_norm, or aten.layer_norm over the last dim) and go back through the sum in front of it: gathered rows, their
scale (a number, or a scalar tensor as in Gemma), and whatever else is added. s is a second result where it is used elsewhere (a pre-norm
model's residual stream); where the norm is its only reader (BERT) it is never written. It runs after the passes that take a norm into matmuls.

Cost for N = tokens x D elements and k tables: eager reads k N and writes k N for the gathers, 3 (k - 1) N for the sums, 2 N for the norm; the op
reads k N and writes N, or 2 N with s. Order of terms and roundings are eager's.

Legality, each with a test that must be refused or left:
- the embedding's gradient is dense and not scaled by frequency: refused;
- a term that is used elsewhere too stays a tensor, and is added as it is;
- the addition has no factor; the terms have one dtype: the sum is taken as far as that holds.
An index out of range raises as aten.embedding does; the row padding_idx keeps its zero gradient.
"""
from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from ..compiler.ir import embedding_norm as _op  # noqa: F401 (registers the op)
from ..compiler.ir.graph import argument, insert, is_call, is_tensor, value
from ..compiler.ir.products import Writes
from ..compiler.ir.rewrite import Match, Refusal, Refused
from .add_layer_norm import is_row_norm
from .add_rms_norm import place

NAME = "embedding_norm"
aten = torch.ops.aten


@dataclasses.dataclass
class Term:
    """tables[indices] * scale * factor; without an index the tensor itself."""

    table: Node
    index: Node | None = None
    padding: int = -1
    scale: float = 1.0
    factor: Node | None = None
    gathered: Node | None = None  # the call of aten.embedding


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every norm of a sum with an embedding in it, as a Match or a Refusal."""
    taken: set[Node] = set()
    writes = Writes(graph)
    for norm in list(graph.nodes):
        is_rms = is_call(norm, torch.ops.tileweld.rms_norm.default)
        if not (is_rms or is_row_norm(norm)) or norm.args[0] in taken:
            continue
        try:
            terms = _terms(norm.args[0], is_root=True)
            if terms[0].index is None:
                continue
            taken.add(norm.args[0])
            yield _match(norm, terms, is_rms, writes)
        except Refused as refused:
            yield refused.refusal


def _terms(node: Node, is_root: bool = False) -> list[Term]:
    """node as a sum from the left, an embedding first if there is one at that end."""
    if not is_root and len(node.users) > 1:
        return [Term(node)]
    if is_call(node, aten.add.Tensor) and len(node.args) == 2 and not node.kwargs and all(is_tensor(a) and value(a).dtype == value(node).dtype for a in node.args):
        x, y = node.args
        if is_call(y, aten.add.Tensor) and not is_call(x, aten.add.Tensor):
            x, y = y, x  # a sum of two is the same either way round
        left, right = _terms(x), _terms(y)
        if len(left) == 1 and left[0].index is None and len(right) == 1:
            left, right = right, left
        return [*left, *(right if len(right) == 1 else [Term(y)])]
    return [_term(node)]


def _term(node: Node) -> Term:
    scale, factor, gathered = 1.0, None, node
    if is_call(node, aten.mul.Tensor) and is_call(node.args[0], aten.embedding.default) and len(node.args[0].users) == 1:
        gathered, other = node.args
        if isinstance(other, (int, float)) and not isinstance(other, bool):
            scale = float(other)
        elif is_tensor(other) and value(other).dim() == 0:
            factor = other
        else:
            return Term(node)
    if not is_call(gathered, aten.embedding.default):
        return Term(node)
    for position, name in ((3, "scale_grad_by_freq"), (4, "sparse")):
        if argument(gathered, position, name, False):
            raise Refused(f"the embedding has {name}, a gradient of its own kind", gathered, f"{name}=False")
    return Term(gathered.args[0], gathered.args[1], argument(gathered, 2, "padding_idx", -1), scale, factor, gathered)


def _match(norm: Node, terms: list[Term], is_rms: bool, writes: Writes) -> Match:
    total = norm.args[0]
    if is_rms:
        weight, eps, offset, cast = norm.args[1:]
        rest = ("rms", weight, None, eps, offset, cast)
    else:
        rest = ("layer", argument(norm, 2, "weight"), argument(norm, 3, "bias"), argument(norm, 4, "eps", 1e-5), 0.0, "after")
    columns = [[getattr(t, field.name) for t in terms] for field in dataclasses.fields(Term)[:5]]
    inputs = tuple(dict.fromkeys(a for a in (*columns[0], *columns[1], *columns[4], *rest) if isinstance(a, Node)))
    is_used = len(total.users) > 1
    at = place(total, norm, inputs, writes, min(t.gathered for t in terms if t.gathered is not None))
    first = at if is_used else norm

    def build(graph: Graph):
        both = insert(graph, torch.ops.tileweld.embedding_norm.default, *columns, *rest)
        y = insert(graph, operator.getitem, both, 1)
        if not is_used:
            return y
        s = insert(graph, operator.getitem, both, 0)
        return (s, y) if first is total else (y, s)

    gathered = sum(t.index is not None for t in terms)
    detail = f"{gathered} of {len(terms)} terms gathered, {rest[0]} norm" + (", the sum is used elsewhere" if is_used else "")
    return Match(first, inputs, build, detail, also=((norm if first is total else total),) if is_used else ())
