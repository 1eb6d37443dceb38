"""bias_rules: biases of keys and values that attention makes superfluous

    softmax_j(f q.(W x_j + b)) = softmax_j(f q.W x_j)              the bias adds f q.b to all scores of a row, and softmax does not see it: it is dropped
    W_O (sum_j p_j (v_j + c)) + b = W_O (sum_j p_j v_j) + (W_O c + b)    the weights of a row add up to 1: the bias of the values moves into the output projection's

Legality, each with a test that must stay as it is. Keys: the score is affine in s = q.k, with a slope alike for all keys (no softcap, no relative factor); no rotary or other change of k by its
position lies between; no sink, which is a score without a bias; masked keys have a fill that no shift reaches (-inf, finfo.min). Values: no sink, no factor of the weights, no row that
gives zero because it sees no key. Both: the projection has no other reader (a cache), and no gradient is wanted: the bias would get none.

Where the shapes fit but one of these does not hold, the report says so (`report.kept`); it is no refusal, the model is fine as it is. Cost: two additions of [tokens, KV width] less; the folded bias is
computed once (compiler/folded.py). Both questions are compiler/ir/attention_bias.py's, which passes/reassociate.py asks too where it moves a bias out of its way. Source: Collaborative attention, Cordonnier et al., 2006.16362, section 3, for keys.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import sympy
import torch
from torch.fx import Graph, Node

from ..compiler.ir import scalar as sc
from ..compiler.ir.association_trace import E, Piece, bias_view, trace
from ..compiler.ir.attention import variant_of
from ..compiler.ir.attention_bias import why_key_bias_counts, why_value_bias_counts
from ..compiler.ir.graph import insert, is_call, shape, value
from ..compiler.ir.lift import Lift
from ..compiler.ir.linear import compute_dtype
from ..compiler.ir.products import Product, product_of
from ..compiler.ir.rewrite import Kept, Match
from ..compiler.ir.unliftable import Unliftable
from ..compiler.ir.views import VIEWS
from ..compiler.ir.weights import is_constant, why_trained

NAME = "bias_rules"
OPTION = "fold_weights"
aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Output:
    """The output projection of an attention: its product, and the views between."""

    product: Product
    inside: tuple[Node, ...]


def find(graph: Graph, fold: bool = True) -> Iterator[Match | Kept]:
    """Every attention whose keys or values come from a linear with a bias, and from nothing else."""
    for node in list(graph.nodes):
        if not is_call(node, torch.ops.tileweld.attention.default):
            continue
        variant = variant_of([value(c) for c in node.args[3]], *node.args[5:])
        k, v = (_biased(node.args[n]) for n in (1, 2))
        output = _output(node) if v is not None else None
        v = v if output is not None else None
        if k is None and v is None:
            continue
        trained = why_trained(graph, [p.factor.bias for p in (k, v) if p is not None])
        reasons = {"key": k is not None and (trained or why_key_bias_counts(variant)), "value": v is not None and (trained or why_value_bias_counts(variant) or (None if fold else "nothing is kept between calls"))}
        for name, reason in reasons.items():
            if reason:
                yield Kept(node, f"the {name} bias stays: {reason}")
        k, v = None if reasons["key"] else k, None if reasons["value"] else v
        if k is None and v is None:
            continue
        root = output.product.node if v is not None else node
        biases = [p.factor.bias for p in (k, v) if p is not None]
        detail = " and ".join([*(["key bias dropped"] if k is not None else []), *(["value bias into the output's"] if v is not None else [])])
        extra = [output.product.weight, *([output.product.bias] if output.product.bias is not None else [])] if v is not None else []
        inputs = tuple(dict.fromkeys([node.args[0], *(n for n, p in ((node.args[1], k), (node.args[2], v)) if p is None), *(a for p in (k, v) if p is not None for a in p.factor.node.all_input_nodes if a not in biases), *biases, *extra]))
        yield Match(root, inputs, lambda graph, node=node, k=k, v=v, output=output: _build(graph, node, k, v, output), detail)


def _biased(operand: Node) -> Piece | None:
    """The one linear with a bias that an operand is a view of, if nobody else reads it."""
    try:
        pieces = trace(operand, sc.J)
    except Unliftable:
        return None
    if len(pieces) != 1 or (found := pieces[0]).factor is None or found.factor.row is None or found.factor.bias is None:
        return None
    inside = {*found.inside, operand}
    readers = [u for n in found.inside for u in n.users if u not in inside and not is_call(u, aten.sym_size.int)]
    return found if all(is_call(u, torch.ops.tileweld.attention.default) for u in readers) and len(set(readers) | set(operand.users)) == 1 else None


def _output(attention: Node) -> _Output | None:
    """The linear that alone reads an attention, with its columns ordered by head and place."""
    inside, node = [], attention
    for _ in range(8):
        readers = [u for u in node.users if not is_call(u, aten.sym_size.int)]
        if len(readers) != 1:
            return None
        product = product_of(reader := readers[0])
        if isinstance(product, Product):
            if product.x is not node or not is_constant(product.weight) or (product.bias is not None and not is_constant(product.bias)):
                return None
            return _Output(product, tuple(inside)) if _by_head(attention, node) else None
        if reader.target not in VIEWS:
            return None
        inside.append(reader)
        node = reader
    return None


def _by_head(attention: Node, x: Node) -> bool:
    """Is x[..., c] the attention's result of head c // D at place c % D?"""
    heads, width = shape(attention)[1], shape(attention)[3]
    symbols = [sympy.Symbol(f"t{d}", integer=True, nonnegative=True) for d in range(len(shape(x)) - 1)]
    lift = Lift({**{t: (sympy.Integer(0), n - 1) for t, n in zip(symbols, shape(x))}, E: (sympy.Integer(0), shape(x)[-1] - 1)})
    node, index = x, [*symbols, E]
    if not (heads.is_Integer and width.is_Integer) or sympy.expand(heads * width - shape(x)[-1]) != 0:
        return False
    try:
        while node is not attention:
            node, index = VIEWS[node.target](lift, node, index)
    except (Unliftable, KeyError):
        return False
    places = [[sympy.sympify(e).subs(E, c) for e in (index[1], index[3])] for c in range(int(heads * width))]
    return all((h, d) == (c // int(width), c % int(width)) for c, (h, d) in enumerate(places))


def _build(graph: Graph, node: Node, k: Piece | None, v: Piece | None, output: _Output | None) -> Node:
    q, keys, values, *rest = node.args
    attention = insert(graph, torch.ops.tileweld.attention.default, q, _without_bias(graph, keys, k), _without_bias(graph, values, v), *rest)
    if v is None:
        return attention
    product = output.product
    heads, width = (int(n) for n in (shape(node)[1], shape(node)[3]))
    dtype = value(product.weight).dtype
    wide = compute_dtype(dtype)
    bias = insert(graph, aten.to.dtype, bias_view(graph, v.factor, int(shape(values)[1]), width), wide)  # [KV heads or 1, Dv]
    kv = int(shape(bias)[0])
    bias = insert(graph, aten.reshape.default, insert(graph, aten.expand.default, insert(graph, aten.unsqueeze.default, bias, 1), [kv, heads // kv, width]), [heads * width])
    weight = insert(graph, aten.to.dtype, product.weight, wide)
    if product.transposed:
        weight = insert(graph, aten.permute.default, weight, [1, 0])
    folded = insert(graph, aten.mv.default, weight, bias)
    if product.bias is not None:
        folded = insert(graph, aten.add.Tensor, folded, insert(graph, aten.to.dtype, product.bias, wide))
    made = attention
    for view in output.inside:
        made = _copied(graph, view, {view.args[0]: made})
    weight = insert(graph, aten.permute.default, product.weight, [1, 0]) if product.transposed else product.weight
    return insert(graph, aten.linear.default, made, weight, insert(graph, aten.to.dtype, folded, dtype))


def _without_bias(graph: Graph, operand: Node, piece: Piece | None) -> Node:
    """The operand again, from its linear without the bias."""
    if piece is None:
        return operand
    factor = piece.factor
    product = product_of(factor.node)
    weight = insert(graph, aten.permute.default, factor.weight, [1, 0]) if factor.transposed else factor.weight
    made = {factor.node: insert(graph, aten.linear.default, product.x, weight)}
    for view in sorted(n for n in {*piece.inside, operand} if n is not factor.node):
        made[view] = _copied(graph, view, made)
    return made[operand]


def _copied(graph: Graph, view: Node, made: dict[Node, Node]) -> Node:
    args, kwargs = torch.fx.node.map_arg((view.args, view.kwargs), lambda n: made.get(n, n))
    return insert(graph, view.target, *args, **kwargs)
