"""fold_norm: weight and bias of a norm move from the prologue into the matrices behind it; off unless options ask: {"passes": {"fold_norm": True}}

    prologue "x*r*c0[j]", weights [W]                 ->     prologue "x*r", weights [W diag(c0)]
    Gemma's "x*r*(c0[j] + 1)"                         ->     the same with c0 + 1
    layer norm "(x - u)*r*c0[j] + c1[j]", bias b      ->     prologue "(x - u)*r", weights [W diag(c0)], bias b + W c1
    in float64 too "(x - u)*r", W                     ->     "x*r", W minus the mean of each of its rows (see `_centred`)

The products are computed in float32 (float64 for float64), rounded once (the bias not at all), kept and watched by compiler/folded.py. On a CPU this saves nothing, since the kernel multiplies x as it reads
it, and costs a copy of every such matrix; it is for machines whose kernels have no prologue, and for weights that are rounded to int8 afterwards.

Legality, each with a test that must be refused:
- no gradient is wanted: the norm's weight would get none of its own;      - the norm's weight and bias depend on weights alone, and so do the matrices;
- every reader of the norm's result is a matmul: what a residual reads (post-norm: BERT) has the norm's weight in it, whatever the matrices hold;
- kept values are not turned off (fold_weights), else every call would compute them.
Each matmul gets a product of its own, so that a tied or shared matrix (lm_head and embedding), and several readers of one norm, are as right as any.

Cost: 2 N K for every matrix when it is folded, M K multiplications less a call (twice that for a layer norm), N K numbers of memory.
"""
from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from ..compiler.ir import scalar as sc
from ..compiler.ir.graph import insert, is_call, op_name, source_of, value
from ..compiler.ir.linear import compute_dtype
from ..compiler.ir.linear_build import call
from ..compiler.ir.nodes import fadd, fmul, fsub
from ..compiler.ir.parser import parse
from ..compiler.ir.printer import text
from ..compiler.ir.prologue import consumers, renamed
from ..compiler.ir.rewrite import Match, Refusal
from ..compiler.ir.weights import is_constant, why_trained

NAME = "fold_norm"
OPTION = "fold_weights"
DEFAULT = False
aten, tileweld = torch.ops.aten, torch.ops.tileweld
NORMS = (aten.layer_norm.default, tileweld.rms_norm.default, tileweld.add_rms_norm.default, tileweld.add_layer_norm.default)


def find(graph: Graph, fold: bool = True) -> Iterator[Match | Refusal]:
    """Every fused matmul whose prologue multiplies by, or adds, a vector over the columns of x; and every norm with a weight that matmuls read beside others."""
    for node in list(graph.nodes):
        if is_call(node, *NORMS) and (found := _standing(node)) is not None:
            yield found
        if not is_call(node, tileweld.linear.default) or not node.args[4]:
            continue
        rest, factors, terms = _split(parse(node.args[6]))
        items = sorted(u for u in node.users if is_call(u, operator.getitem))
        if not (factors or terms) or not items or len(items) != len(node.users):
            continue
        captures = [node.args[2][k] for e in (*factors, *terms) for k in _numbers(e)]
        sources = [*captures, *node.args[1]]
        if reason := why_trained(graph, sources):
            yield Refusal(f"the norm's weight stays apart: {reason}", node, "run it under torch.no_grad()")
        elif not fold:
            yield Refusal("fold_weights is off: the products would be computed at every call", node, "leave fold_weights on")
        elif not all(map(is_constant, sources)):
            yield Refusal("the norm's weight or bias, or the matrix, is no weight of the model", node)
        else:
            rest, centred = _centred(rest, value(node.args[1][0]).dtype)
            inputs = tuple(n for n in dict.fromkeys(node.all_input_nodes))
            words = f"{text(rest)}, {len(node.args[1])} x {[*value(node.args[1][0]).shape]}" + (", its bias in theirs" if terms else "") + (", rows centred" if centred else "")
            yield Match(items[0], inputs, lambda graph, node=node, rest=rest, factors=factors, terms=terms, centred=centred, items=items: _build(graph, node, rest, factors, terms, centred, items), words, tuple(items[1:]))


def _standing(node: Node) -> Refusal | None:
    """A norm with a weight that stayed an op of its own, although matmuls read it."""
    weight = 1 if is_call(node, tileweld.rms_norm.default) else 2
    results = [u for u in node.users if u.args[1] == 1] if isinstance(value(node), (tuple, list)) else [node]
    if len(node.args) <= weight or node.args[weight] is None or not results:
        return None
    ops, others = consumers(results[0])
    residual = [n for n in others if is_call(n, tileweld.linear.default)]  # its rows, and added to its result
    if not ops and not residual:
        return None
    if not others:
        return Refusal(f"{len(ops)} matmuls read the norm's result, which is computed once for all of them", node)
    other = next((n for n in others if n not in residual), others[0])
    where, name = source_of(other), "the residual behind a matmul" if other in residual else f"{op_name(other)}, which is no matmul"
    return Refusal(f"the norm's weight stays apart: its result is also read by {name}" + (f" ({where})" if where else ""), node)


def _split(e) -> tuple[object, list, list]:
    """(the prologue without them, its factors that depend on the column alone, terms that do): each an element of a vector, or that and a number."""
    terms = []
    while isinstance(e, fadd) and any(map(_is_vector, e.args)) and not all(map(_is_vector, e.args)):
        e, term = sorted(e.args, key=_is_vector)
        terms.append(term)
    rest, factors = _factors(e)
    return rest, factors, terms


def _factors(e) -> tuple[object, list]:
    if not isinstance(e, fmul):
        return e, []
    kept, found = None, []
    for part in e.args:
        if _is_vector(part):
            found.append(part)
            continue
        rest, inner = _factors(part)
        found += inner
        kept = rest if kept is None else sc.mul(kept, rest)
    return (kept, found) if kept is not None else (e, [])


def _is_vector(e) -> bool:
    if isinstance(e, fadd):
        return sum(map(_is_vector, e.args)) == 1 and sum(map(sc.is_const, e.args)) == 1
    return isinstance(e, sc.load) and e.args[1:] == (sc.J,)


def _numbers(e) -> list[int]:
    return [int(x.args[0].name[1:]) for x in sc.loads(e)]


def _centred(e, dtype: torch.dtype) -> tuple[object, bool]:
    """(the prologue with x for x - u, True) where the rows of the matrix may be made to add up to 0 instead: sum_k (x_k - u) w_k = sum_k x_k (w_k - mean(w)).

    In float64 alone: rounded rows do not add up to 0, and u times what is left is added to the result. In float32, K = 768, rows of mean 30 (1000) and deviation 1 have errors of
    5.9e-5 (1.4e-3) so, of 1.4e-5 (2.8e-4) with x - u, and of 1.2e-5 (2.1e-4) in eager; a subtraction a loaded element is what it would save.
    """
    x, u = sc.X, sc.U
    without = e.xreplace({fsub(x, u): x})
    return (without, True) if dtype == torch.float64 and without != e and u not in without.free_symbols else (e, False)


# ---------------------------------------------------------------- building


def _build(graph: Graph, node: Node, rest, factors: list, terms: list, centred: bool, items: list[Node]):
    rows, weights, captures, sizes, norm, eps, _, epilogues, pairs = node.args
    dtype = value(weights[0]).dtype
    wide = compute_dtype(dtype)

    def vector(e) -> Node:
        (number,) = _numbers(e)
        made = insert(graph, aten.to.dtype, captures[number], wide)
        for constant in (sc.value_of(x) for x in (e.args if isinstance(e, fadd) else ()) if sc.is_const(x)):
            made = insert(graph, aten.add.Tensor, made, float(constant))
        return made

    def combined(op, nodes: list[Node]) -> Node | None:
        made = None
        for n in nodes:
            made = n if made is None else insert(graph, op, made, n)
        return made

    factor, term = combined(aten.mul.Tensor, [vector(e) for e in factors]), combined(aten.add.Tensor, [vector(e) for e in terms])
    wides = [insert(graph, aten.to.dtype, w, wide) for w in weights]
    folded = []
    for w in wides:
        if factor is not None:
            w = insert(graph, aten.mul.Tensor, w, factor)
        if centred:
            w = insert(graph, aten.sub.Tensor, w, insert(graph, aten.mean.dim, w, [-1], True))
        folded.append(insert(graph, aten.to.dtype, w, dtype) if w not in wides else weights[len(folded)])
    integers = frozenset(k for k, c in enumerate(captures) if not value(c).dtype.is_floating_point)
    captures = list(captures)
    if term is not None:
        biases = [insert(graph, aten.mv.default, w, term) for w in wides]
        epilogues = [_biased(graph, text(parse(words, integers)), integers, biases, captures, pairs[2 * o:2 * o + 2], wide) for o, words in enumerate(epilogues)]
    texts = [text(rest), *epilogues]
    used = sorted({k for words in texts for k in _numbers(parse(words, integers))})
    names = {sc.capture_symbol(k, k in integers): sc.capture_symbol(place, k in integers) for place, k in enumerate(used)}
    prologue, *epilogues = (renamed(words, names, integers) for words in texts)
    op = call(graph, [x.shape[1] for x in value(node)], rows, folded, [captures[k] for k in used], sizes, norm, eps, prologue, epilogues, pairs)
    made = tuple(insert(graph, operator.getitem, op, item.args[1]) for item in items)
    return made if len(made) > 1 else made[0]


def _biased(graph: Graph, words: str, integers, biases: list[Node], captures: list[Node], pair, wide: torch.dtype) -> str:
    """The epilogue with a_w + (W c1)[j] for every accumulator a_w, and what stands at the partner's column for p_w. Vectors that it needs are added to `captures`; a constant bias that
    is added to a_w already becomes one with it."""
    e = parse(words, integers)

    def element(made: Node):
        if made not in captures:
            captures.append(made)
        return sc.load(sc.capture_symbol(captures.index(made)), sc.J)

    new = {}
    for symbol in sorted(e.free_symbols, key=str):
        if (number := sc.accumulator_number(symbol)) is None:
            continue
        if symbol.name[0] == "p":
            new[symbol] = sc.add(symbol, element(_partner(graph, biases[number], *pair)))
            continue
        new[symbol] = sc.add(symbol, element(biases[number]))
        for sum_ in (a for a in e.atoms(fadd) if symbol in a.args):
            if (bias := _added(sum_, symbol, captures)) is not None:  # xreplace takes the larger expression first
                new[sum_] = sc.add(symbol, element(insert(graph, aten.add.Tensor, biases[number], insert(graph, aten.to.dtype, bias, wide))))
    return text(e.xreplace(new))


def _added(e, symbol, captures: list[Node]) -> Node | None:
    """The constant bias b of a_w + b[j]."""
    other = next((a for a in e.args if a != symbol), None) if isinstance(e, fadd) else None
    if not (isinstance(other, sc.load) and other.args[1:] == (sc.J,)):
        return None
    found = captures[int(other.args[0].name[1:])]
    return found if value(found).dim() == 1 and is_constant(found) else None


def _partner(graph: Graph, vector: Node, block: int, half: int) -> Node:
    """vector [N] with the columns of every pair exchanged, as compiler/ir/linear.py's `partner`."""
    n = value(vector).shape[0]
    parts = insert(graph, aten.reshape.default, vector, [n // block, block])
    pieces = [insert(graph, aten.slice.Tensor, parts, 1, a, b) for a, b in ((half, 2 * half), (0, half), (2 * half, block)) if a < b]
    return insert(graph, aten.reshape.default, insert(graph, aten.cat.default, pieces, 1), [n])
