"""fold_norm: the weight of an RMS norm moves from the prologue into the matrices behind it; off unless options ask: {"passes": {"fold_norm": True}}

    prologue "x*r*c0[j]", weights [W]           ->     prologue "x*r", weights [W diag(c0)]
    Gemma's "x*r*(c0[j] + 1)"                   ->     the same with c0 + 1

The products are computed in float32 (float64 for float64), rounded once, kept and watched by compiler/folded.py. On a CPU this saves nothing, since the kernel multiplies x as it reads it, and costs a copy
of every such matrix; it is for machines whose kernels have no prologue, and for weights that are rounded to int8 afterwards.

Legality, each with a test that must be refused:
- no gradient is wanted: the norm's weight would get none of its own;      - the norm's weight depends on weights alone, and so do the matrices;
- kept values are not turned off (fold_weights), else every call would compute them.
Each matmul gets a product of its own, so that a tied or shared matrix (lm_head and embedding), and several readers of one norm, are as right as any. A layer norm stays: its bias would go through the matrix too.

Cost: 2 N K for every matrix when it is folded, M K multiplications less a call, N K numbers of memory.
"""
from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from ..compiler.ir import scalar as sc
from ..compiler.ir.graph import insert, is_call, value
from ..compiler.ir.linear import compute_dtype
from ..compiler.ir.linear_build import call
from ..compiler.ir.nodes import fadd, fmul
from ..compiler.ir.parser import parse
from ..compiler.ir.printer import text
from ..compiler.ir.prologue import renamed
from ..compiler.ir.rewrite import Match, Refusal
from ..compiler.ir.weights import is_constant, why_trained

NAME = "fold_norm"
OPTION = "fold_weights"
DEFAULT = False
aten = torch.ops.aten


def find(graph: Graph, fold: bool = True) -> Iterator[Match | Refusal]:
    """Every fused matmul whose prologue multiplies by a vector over the columns of x."""
    for node in list(graph.nodes):
        if not is_call(node, torch.ops.tileweld.linear.default) or not node.args[4]:
            continue
        rest, vectors = _split(parse(node.args[6]))
        items = sorted(u for u in node.users if is_call(u, operator.getitem))
        if not vectors or not items or len(items) != len(node.users):
            continue
        captures = [node.args[2][k] for e in vectors for k in _numbers(e)]
        sources = [*captures, *node.args[1]]
        if reason := why_trained(graph, sources):
            yield Refusal(f"the norm's weight stays apart: {reason}", node, "run it under torch.no_grad()")
        elif not fold:
            yield Refusal("fold_weights is off: the products would be computed at every call", node, "leave fold_weights on")
        elif not all(map(is_constant, sources)):
            yield Refusal("the norm's weight, or the matrix, is no weight of the model", node)
        else:
            inputs = tuple(n for n in dict.fromkeys(node.all_input_nodes))
            yield Match(items[0], inputs, lambda graph, node=node, rest=rest, vectors=vectors, items=items: _build(graph, node, rest, vectors, items), f"{text(rest)}, {len(node.args[1])} x {[*value(node.args[1][0]).shape]}", tuple(items[1:]))


def _split(e) -> tuple[object, list]:
    """(the prologue without them, its factors that depend on the column alone: an element of a vector, or that and a number)."""
    if not isinstance(e, fmul):
        return e, []
    kept, found = None, []
    for part in e.args:
        if _is_vector(part):
            found.append(part)
            continue
        rest, inner = _split(part)
        found += inner
        kept = rest if kept is None else sc.mul(kept, rest)
    return (kept, found) if kept is not None else (e, [])


def _is_vector(e) -> bool:
    if isinstance(e, fadd):
        return sum(map(_is_vector, e.args)) == 1 and sum(map(sc.is_const, e.args)) == 1
    return isinstance(e, sc.load) and e.args[1:] == (sc.J,)


def _numbers(e) -> list[int]:
    return [int(x.args[0].name[1:]) for x in sc.loads(e)]


def _build(graph: Graph, node: Node, rest, vectors: list, items: list[Node]):
    rows, weights, captures, sizes, norm, eps, _, epilogues, pairs = node.args
    wide = compute_dtype(value(weights[0]).dtype)
    factor = None
    for e in vectors:
        (number,) = _numbers(e)
        made = insert(graph, aten.to.dtype, captures[number], wide)
        for constant in (sc.value_of(x) for x in (e.args if isinstance(e, fadd) else ()) if sc.is_const(x)):
            made = insert(graph, aten.add.Tensor, made, float(constant))
        factor = made if factor is None else insert(graph, aten.mul.Tensor, factor, made)
    folded = [insert(graph, aten.to.dtype, insert(graph, aten.mul.Tensor, insert(graph, aten.to.dtype, w, wide), factor), value(w).dtype) for w in weights]
    integers = frozenset(k for k, c in enumerate(captures) if not value(c).dtype.is_floating_point)
    texts = [text(rest), *epilogues]
    used = sorted({k for words in texts for k in _numbers(parse(words, integers))})
    names = {sc.capture_symbol(k, k in integers): sc.capture_symbol(place, k in integers) for place, k in enumerate(used)}
    prologue, *epilogues = (renamed(words, names, integers) for words in texts)
    op = call(graph, [x.shape[1] for x in value(node)], rows, folded, [captures[k] for k in used], sizes, norm, eps, prologue, epilogues, pairs)
    made = tuple(insert(graph, operator.getitem, op, item.args[1]) for item in items)
    return made if len(made) > 1 else made[0]
