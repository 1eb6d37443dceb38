"""The contraction of q and k inside a lifted score: which symbol it is, which operand is q, and several contractions as one."""
from __future__ import annotations

import sympy
import torch
from sympy import Integer
from torch.fx import Node

from . import scalar as sc
from .core import Part, RowSum
from .graph import is_call, is_tensor, shape
from .key_text import keys_behind
from .layout import look_behind
from .lift import Dot
from .masking import rebuilt
from .rewrite import NotThePattern, Refused
from .views import VIEWS

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.einsum.default)

MIXED = "a product with a parameter mixes the {} of all heads before {} (talking heads)"
MIX_LATER = "a fused kernel sees one head at a time: mix the heads of q, k, v or of the output instead"


def dot_product(lift, e, roles, scores, no_key_text: str = ""):
    """(score expression of s, q, k, the dots it replaces). Several dots (split nope and rope logits) become one of the concatenated q and k. no_key_text: why the op takes no text of keys."""
    usable, dense = [], []
    for dot in lift.dots.values():
        if dot.symbol in e.free_symbols:
            sides = _sides(dot)
            (usable if sides else dense).append((dot, sides))
    for dot, _ in dense:
        e = e.xreplace({dot.symbol: lift.capture(dot.node, dot.index)})
    if not usable:
        if (mixed := next((dot for dot, _ in dense if _mixes(dot)), None)) is not None:
            raise Refused(MIXED.format("scores", "the softmax"), mixed.node, MIX_LATER)
        for dot, _ in dense:
            if not any(map(is_parameter, (dot.lhs, dot.rhs))):
                raise Refused("the dim of the softmax is no position of k: it is not a dim of one operand of the product alone", scores, "take the softmax over the key positions")
        raise NotThePattern
    operands = []
    for dot, ((q_node, q_index), (k_node, k_index)) in usable:
        sizes = {**roles.sizes, dot.d: dot.length}
        q = look_behind(lift, q_node, q_index, {x: n for x, n in sizes.items() if x != sc.J}, dot.d, "q")
        k = keys_behind(lift, k_node, k_index, {x: n for x, n in sizes.items() if x != sc.I}, dot.d, len(usable) == 1, no_key_text)
        if q is None or k is None:
            which = "q" if q is None else "k"
            raise Refused(f"the layout of {which} ({q_node if q is None else k_node}, shape {[*shape(q_node if q is None else k_node)]}) mixes batch, heads and positions", q_node if q is None else k_node, "keep batch, heads, positions and head dim as separate dims")
        operands.append((dot, q, k))
    if len(operands) == 1:
        (dot, q, k), = operands
        return rebuilt(e, {dot.symbol: product(lift, q, k)}), [Part(q, dot.d, dot.length)], [Part(k, dot.d, dot.length)], [dot]
    return _joined(e, operands, scores)


def _mixes(dot: Dot) -> bool:
    """A parameter times what is of a query and of a key already: a sum over heads."""
    return any(is_parameter(weight) and all(any(isinstance(x, sympy.Basic) and x.has(symbol) for x in index) for symbol in (sc.I, sc.J))
               for weight, index in ((dot.lhs, dot.rhs_index), (dot.rhs, dot.lhs_index)))


def mixing_linear(lift, e) -> Node | None:
    """A linear whose columns are neither queries nor keys, while its rows are both: one over the heads, if its argument are scores."""
    for node, symbol in lift.captures.items():
        for element in sc.loads(e) if is_call(node, aten.linear.default) else ():
            *rows, column = element.args[1:]
            if element.args[0] == symbol and not column.has(sc.I, sc.J) and all(any(row.has(at) for row in rows) for at in (sc.I, sc.J)):
                return node
    return None


def hidden_product(lift, e) -> Node | None:
    """The node that keeps a product of two activations from being lifted, where a capture of e is computed from one of the same shape."""
    for node, symbol in lift.captures.items():
        current, sizes = node, shape(node)
        while symbol in e.free_symbols and current.op == "call_function" and shape(current) == sizes:
            sources = [a for a in current.all_input_nodes if is_tensor(a)]
            if is_call(current, *PRODUCTS):
                if not any(map(is_parameter, sources)):
                    return node
                break
            current = next((a for a in sources if shape(a) == sizes), None)
            if current is None:
                break
    return None


def is_parameter(node) -> bool:
    """A weight of the model, through views and casts: what a router multiplies with, and no key."""
    while node.op == "call_function" and node.all_input_nodes and (node.target in VIEWS or is_call(node, aten.to.dtype)):
        node = node.all_input_nodes[0]
    return node.meta.get("is_weight", False)


def times(*factors):
    result = sc.S
    for factor in factors:
        result = sc.mul(factor, result)
    return result


def product(lift, q, k):
    """q . k of two operands as an expression of s: (a c k8 + t) . q = a (k8 . (c q)) + t . q, with the last a number of every query (`RowSum`)."""
    e = times(q.factor, k.factor)
    for term in k.terms:
        e = sc.add(e, sc.mul(q.factor, sc.mul(term.factor, sc.load(lift.row_sum(RowSum(term.channels, term.added)), sc.B, sc.H, sc.I))))
    return e


def _joined(e, operands, scores):
    """c1*s1 + c2*s2 = [q1, q2*c2/c1] . [k1, k2] * c1."""
    total = {dot.symbol: times(q.factor, k.factor) for dot, q, k in operands}
    found = _linear_part(e, set(total))
    if found is None or any(not sc.is_const(f.xreplace({sc.S: Integer(1)}) if f != sc.S else Integer(1)) and not _constant_factor(f) for f in total.values()):
        raise Refused("the scores combine several products of q and k in a way that is no sum of them", scores, "add the products before any other function of them")
    part, coefficients = found
    scales = {symbol: coefficients[symbol] * _constant_factor(total[symbol]) for symbol in total}
    first = next(iter(scales.values()))
    qs = [Part(q, dot.d, dot.length, scales[dot.symbol] / first) for dot, q, k in operands]
    ks = [Part(k, dot.d, dot.length) for dot, q, k in operands]
    return rebuilt(e, {part: sc.mul(sc.number(first), sc.S)}), qs, ks, [dot for dot, _, _ in operands]


def _constant_factor(f):
    if f == sc.S:
        return 1.0
    return float(f.args[0]) if isinstance(f, sc.fmul) and sc.is_const(f.args[0]) and f.args[1] == sc.S else None


def _linear_part(e, symbols):
    """The smallest part of e that is a weighted sum of all the symbols: (part, symbol -> weight)."""
    weights = _weights(e, symbols)
    if weights is not None and set(weights) == symbols:
        return e, weights
    for a in e.args:
        if symbols <= a.free_symbols:
            return _linear_part(a, symbols)
    return None


def _weights(e, symbols):
    if e in symbols:
        return {e: 1.0}
    if isinstance(e, sc.fmul) and sc.is_const(e.args[0]):
        inner = _weights(e.args[1], symbols)
        return inner and {k: w * float(e.args[0]) for k, w in inner.items()}
    if isinstance(e, (sc.fadd, sc.fsub)):
        x, y = (_weights(a, symbols) for a in e.args)
        if x is None or y is None or set(x) & set(y):
            return None
        return {**x, **{k: w if isinstance(e, sc.fadd) else -w for k, w in y.items()}}
    return None


def _sides(dot: Dot):
    """((q node, index), (k node, index)) of a contraction over (b, h, i, d) x (b, h, j, d), else None."""
    def has(index, symbol):
        return any(isinstance(x, sympy.Basic) and x.has(symbol) for x in index)

    lhs, rhs = (dot.lhs, dot.lhs_index), (dot.rhs, dot.rhs_index)
    for q, k in ((lhs, rhs), (rhs, lhs)):
        if has(k[1], sc.J) and not has(k[1], sc.I) and not has(q[1], sc.J):
            return q, k
    return None
