"""attention: softmax(score(q k^T), masked) v  ->  tileweld::attention(q, k, v, score=..., mask=...)

Start at a softmax (or its spelled-out form, or scaled_dot_product_attention). Lift its input at (b, h, i, j) back to the
contraction of q and k: whatever lies between is the score, and what it adds or fills with a huge negative constant is the
mask. Follow its output forward to the contraction with v. Nothing is matched by spelling.

Legality, each with a test that must be refused:
- the softmax runs over the index that the contraction with v sums over;
- scores and weights have no consumer outside the core;
- between softmax and v stand only casts, views and inactive dropout;
- one operand of the first contraction depends on (b, h, i, d), the other on (b, h, j, d);
- q, k, v have a layout made of b, h, h // G, position and head dim.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import sympy
import torch
from sympy import Integer, Symbol
from torch.fx import Graph, Node

from ..compiler.ir import scalar as sc
from ..compiler.ir.core import Core, Part, finish
from ..compiler.ir.graph import argument, is_call, is_tensor, shape, source_of, value
from ..compiler.ir.index import reindex
from ..compiler.ir.layout import look_behind
from ..compiler.ir.lift import Dot, Lift
from ..compiler.ir.masking import rebuilt, split
from ..compiler.ir.rewrite import Match, Refusal
from ..compiler.ir.unliftable import Unliftable
from ..compiler.ir.views import VIEWS

NAME = "attention"
aten = torch.ops.aten
DV = Symbol("dv", integer=True, nonnegative=True)
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
_CONTRACTIONS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.addmm.default, aten.einsum.default)


class Refused(Exception):
    """The place is an attention core, and this is why it stays as it is."""

    def __init__(self, reason: str, node: Node, cure: str = ""):
        super().__init__(reason)
        self.refusal = Refusal(reason, node, cure)


class NotAttention(Exception):
    """A softmax that is no attention core (a router, a head over classes): nothing to report."""


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every softmax attention core of the graph, as a Match or a Refusal."""
    for node in list(graph.nodes):
        try:
            if is_call(node, aten.scaled_dot_product_attention):
                yield finish(_library_core(node), node)
            elif (softmax := softmax_at(node)) is not None:
                yield _match(softmax)
        except Refused as refused:
            yield refused.refusal
        except NotAttention:
            continue


# ---------------------------------------------------------------- softmax and its spellings


@dataclasses.dataclass
class Softmax:
    """node = softmax(scores) over dim; ``inner`` are the nodes between scores and node."""

    node: Node
    scores: Node
    dim: int
    inner: list[Node]
    empty: str = "nan"


def softmax_at(node) -> Softmax | None:
    """Does this node compute a softmax? softmax, _softmax, _safe_softmax, exp(x - m)/sum(exp(x - m)), exp(x - logsumexp(x))."""
    if is_call(node, aten.softmax.int, aten._softmax.default, aten._safe_softmax.default):
        dim = node.args[1] % len(shape(node))
        empty = "zero" if node.target is aten._safe_softmax.default else "nan"
        return _without_shift(Softmax(node, node.args[0], dim, [], empty))
    if is_call(node, aten.div.Tensor) and is_call(node.args[0], aten.exp.default) and is_call(node.args[1], aten.sum.dim_IntList):
        exp, total = node.args
        dims = argument(total, 1, "dim")
        if total.args[0] is exp and argument(total, 2, "keepdim", False) and dims and len(dims) == 1:
            return _without_shift(Softmax(node, exp.args[0], dims[0] % len(shape(node)), [exp, total]))
    if is_call(node, aten.exp.default) and is_call(node.args[0], aten.sub.Tensor) and is_call(node.args[0].args[1], aten.logsumexp.default):
        shifted = node.args[0]
        x, total = shifted.args[:2]
        if total.args[0] is x and argument(total, 2, "keepdim", False) and len(total.args[1]) == 1:
            return Softmax(node, x, total.args[1][0] % len(shape(node)), [shifted, total])
    return None


def _without_shift(softmax: Softmax) -> Softmax:
    """softmax(x - max(x)) is softmax(x)."""
    x = softmax.scores
    if is_call(x, aten.sub.Tensor) and argument(x, 2, "alpha", 1) == 1 and isinstance(x.args[1], Node):
        top = x.args[1]
        taken = top.args[0] if top.op == "call_function" and "getitem" in str(top.target) and top.args[1] == 0 else top
        if is_call(taken, aten.amax.default, aten.max.dim):
            dims = taken.args[1] if isinstance(taken.args[1], (list, tuple)) else [taken.args[1]]
            if taken.args[0] is x.args[0] and argument(taken, 2, "keepdim", False) and [d % len(shape(x)) for d in dims] == [softmax.dim]:
                return dataclasses.replace(softmax, scores=x.args[0], inner=[*softmax.inner, x, top, taken])
    return softmax


# ---------------------------------------------------------------- the core


def _match(softmax: Softmax) -> Match:
    forward = _follow(softmax)
    if forward is None:
        raise NotAttention
    failure = None
    for i_dim in _query_dims(softmax):
        try:
            return finish(_core(softmax, forward, i_dim), softmax.node)
        except Refused as refused:
            failure = failure or refused
    raise failure


@dataclasses.dataclass
class Forward:
    """The way from the softmax to the contraction: the nodes on it, and the first problem met."""

    chain: list[Node]
    contraction: Node | None
    problem: tuple[str, Node, str] | None = None


def _follow(softmax: Softmax) -> Forward | None:
    """Forward from the weights to their contraction with v; None when no contraction is near."""
    chain, node = [softmax.node], softmax.node
    while True:
        users = [u for u in node.users if not is_call(u, aten.sym_size.int)]
        contracting = [u for u in users if is_call(u, *_CONTRACTIONS)]
        if contracting:
            others = [u for u in users if u is not contracting[0]]
            problem = None
            if others:
                where = f" ({source_of(others[0])})" if source_of(others[0]) else ""
                problem = (f"the attention weights are also used outside the core, by {_name(others[0])}{where}", others[0], "do not return or reuse the weights (output_attentions=False)")
            return Forward(chain, contracting[0], problem)
        if len(users) != 1:
            return _escaped(chain, users, softmax) if users else None
        node = users[0]
        if is_call(node, aten.dropout.default) and node.args[2] and node.args[1] != 0:
            return _reaches(node) and Forward(chain, None, (f"dropout of {node.args[1]} on the attention weights in training", node, "set the attention dropout to 0; it is not supported yet"))
        passes = node.target in VIEWS or is_call(node, *_CASTS, aten.dropout.default)
        if not passes:
            return _reaches(node) and Forward(chain, None, (f"{_name(node)} stands between the softmax and v", node, "apply it to the scores or to the output instead"))
        chain.append(node)


def _escaped(chain, users, softmax) -> Forward | None:
    reaching = [u for u in users if _reaches(u)]
    if not reaching or all(u.op == "output" for u in users):
        return None
    other = next((u for u in users if u is not reaching[0]), users[0])
    where = f" ({source_of(other)})" if source_of(other) else ""
    return Forward(chain, None, (f"the attention weights are also used outside the core, by {_name(other)}{where}", other, "do not return or reuse the weights (output_attentions=False)"))


def _reaches(node, depth=6) -> bool:
    """Is a contraction within a few steps? Tells an attention core from any other softmax."""
    if is_call(node, *_CONTRACTIONS):
        return True
    return depth > 0 and node.op == "call_function" and any(_reaches(u, depth - 1) for u in node.users)


def _name(node) -> str:
    return "the graph's output" if node.op == "output" else str(node.target).replace("aten.", "").split(".")[0]


def _query_dims(softmax):
    """Candidates for the query dim: the one next to the keys first."""
    rank = len(shape(softmax.scores))
    order = sorted((d for d in range(rank) if d != softmax.dim), reverse=True)
    return order or [None]


def _core(softmax: Softmax, forward: Forward, i_dim) -> Core:
    scores, dims, sink_node = _without_sink(softmax)
    roles = Roles(dims, i_dim, softmax.dim, _heads_behind(softmax, forward))
    lift = Lift(roles.ranges)
    e = lift.at(scores, roles.index)
    e, q, k, dots = _dot_product(lift, e, roles, scores)
    if forward.problem:
        raise Refused(*forward.problem)
    inside = lift.path({dot.symbol for dot in dots}) | set(softmax.inner) | set(forward.chain) | set(sink_node.between if sink_node else ())
    _nothing_escapes(inside, forward.contraction)
    v, out_index = _values(lift, softmax, forward, roles, sink_node)
    sink = lift.at(sink_node.node, sink_node.index(roles)) if sink_node else None
    parts = split(e, {sc.S})
    return Core(root=forward.contraction, roles=roles, lift=lift, score=parts.score, mask=parts.mask, fill=parts.fill, sink=sink, empty=softmax.empty,
                q=q, k=k, v=v, out_index=out_index, value_symbol=DV)


def _nothing_escapes(inside: set[Node], contraction: Node) -> None:
    for node in inside:
        for user in node.users:
            if user not in inside and user is not contraction and not is_call(user, aten.sym_size.int):
                where = f" ({source_of(user)})" if source_of(user) else ""
                raise Refused(f"the attention scores are also used outside the core, by {_name(user)}{where}", user, "do not return or reuse the scores")


# ---------------------------------------------------------------- roles of the score's dims


class Roles:
    """Which dim of the scores is what: j the softmax's, i the queries', the others b and h (h is the product of all but the first)."""

    def __init__(self, dims, i_dim, j_dim, heads=None):
        lead = [n for k, n in enumerate(dims) if k not in (i_dim, j_dim)]
        self.rows = dims[i_dim] if i_dim is not None else Integer(1)
        self.keys = dims[j_dim]
        if len(lead) == 1:
            self.heads = heads if heads is not None else Integer(1)
            self.batch = sympy.cancel(lead[0] / self.heads)
        else:
            self.batch = lead[0] if lead else Integer(1)
            self.heads = sympy.Mul(*lead[1:])
        self.ranges = {sc.B: (Integer(0), self.batch - 1), sc.H: (Integer(0), self.heads - 1), sc.I: (Integer(0), self.rows - 1), sc.J: (Integer(0), self.keys - 1)}
        self.sizes = {sc.B: self.batch, sc.H: self.heads, sc.I: self.rows, sc.J: self.keys}
        self.index = []
        lead_index = iter(self._lead_index(lead))
        for k, n in enumerate(dims):
            e = sc.I if k == i_dim else sc.J if k == j_dim else next(lead_index)
            self.index.append(Integer(0) if n == 1 and k != j_dim else e)

    def _lead_index(self, lead):
        if len(lead) == 1:
            return [sc.B if self.heads == 1 else sc.H if self.batch == 1 else sc.B * self.heads + sc.H]
        rest, result = sc.H, []
        stride = self.heads
        for n in lead[1:]:
            stride = stride / n
            result.append(sc.floordiv(rest, stride) if n == lead[1] and not result else sc.mod(sc.floordiv(rest, stride), n) if stride != 1 else sc.mod(rest, n))
        if len(lead) == 2:
            result = [sc.H]
        return [sc.B, *result] if lead else []


def _heads_behind(softmax, forward):
    """For scores of shape [N, T, S] with N = B*H: the H, read off the first reshape around the core that splits or merges N."""
    dims = shape(softmax.scores)
    if len(dims) != 3:
        return None
    behind, ahead, seen = [softmax.scores], list(forward.contraction.users) if forward.contraction else [], 0
    while (behind or ahead) and seen < 40:
        seen += 1
        node = behind.pop(0) if behind else ahead.pop(0)
        if is_call(node, aten.view, aten.reshape, aten._unsafe_view):
            for wide in (shape(node), shape(node.args[0])):
                if len(wide) >= 4 and sympy.expand(wide[0] * wide[1] - dims[0]) == 0:
                    return wide[1]
        if node.op == "call_function":
            behind += [a for a in node.all_input_nodes if is_tensor(a) and seen < 20]
    return None


# ---------------------------------------------------------------- the contraction of q and k


def _dot_product(lift, e, roles, scores):
    """(score expression of s, q, k, the dots it replaces). Several dots (split nope and rope logits) become one of the concatenated q and k."""
    usable, dense = [], []
    for dot in lift.dots.values():
        if dot.symbol in e.free_symbols:
            sides = _sides(dot)
            (usable if sides else dense).append((dot, sides))
    for dot, _ in dense:
        e = e.xreplace({dot.symbol: lift.capture(dot.node, dot.index)})
    if not usable:
        raise NotAttention
    operands = []
    for dot, ((q_node, q_index), (k_node, k_index)) in usable:
        sizes = {**roles.sizes, dot.d: dot.length}
        q = look_behind(lift, q_node, q_index, {x: n for x, n in sizes.items() if x != sc.J}, dot.d, "q")
        k = look_behind(lift, k_node, k_index, {x: n for x, n in sizes.items() if x != sc.I}, dot.d, "k")
        if q is None or k is None:
            which = "q" if q is None else "k"
            raise Refused(f"the layout of {which} ({q_node if q is None else k_node}, shape {[*shape(q_node if q is None else k_node)]}) mixes batch, heads and positions", q_node if q is None else k_node, "keep batch, heads, positions and head dim as separate dims")
        operands.append((dot, q, k))
    if len(operands) == 1:
        (dot, q, k), = operands
        return rebuilt(e, {dot.symbol: _times(q.factor, k.factor)}), [Part(q, dot.d, dot.length)], [Part(k, dot.d, dot.length)], [dot]
    return _joined(e, operands, scores)


def _times(*factors):
    result = sc.S
    for factor in factors:
        result = sc.mul(factor, result)
    return result


def _joined(e, operands, scores):
    """c1*s1 + c2*s2 = [q1, q2*c2/c1] . [k1, k2] * c1."""
    total = {dot.symbol: _times(q.factor, k.factor) for dot, q, k in operands}
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


# ---------------------------------------------------------------- sinks


@dataclasses.dataclass
class Sink:
    """A column concatenated to the scores and dropped after the softmax."""

    node: Node
    dim: int
    between: list[Node]

    def index(self, roles):
        return [Integer(0) if k == self.dim else e for k, e in enumerate(roles.index)]


def _without_sink(softmax):
    """(scores, their dims, Sink or None)."""
    node, between = softmax.scores, []
    while is_call(node, *_CASTS):
        between.append(node)
        node = node.args[0]
    if is_call(node, aten.cat.default) and len(node.args[0]) == 2:
        dim = argument(node, 1, "dim", 0) % len(shape(node))
        scores, extra = node.args[0]
        if dim == softmax.dim and shape(extra)[dim] == 1:
            shifted = _without_shift(Softmax(softmax.node, softmax.scores, softmax.dim, []))
            return scores, shape(scores), Sink(extra, dim, [*between, node, *shifted.inner])
    return softmax.scores, shape(softmax.scores), None


# ---------------------------------------------------------------- the contraction with v


def _values(lift, softmax, forward, roles, sink):
    """(v operand, index of the result): the weights stand at (b, h, i, j) and the contraction sums over j."""
    weights = forward.chain[-1]
    position = _forward_index(lift, softmax, forward, roles, sink)
    contraction = forward.contraction
    fresh = [Symbol(f"y{k}", integer=True, nonnegative=True) for k in range(len(shape(contraction)))]
    inner = Lift({y: (Integer(0), n - 1) for y, n in zip(fresh, shape(contraction))})
    try:
        e = inner.at(contraction, [Integer(0) if n == 1 else y for y, n in zip(fresh, shape(contraction))])
    except Unliftable:
        e = None
    dots = list(inner.dots.values())
    if len(dots) != 1 or e != dots[0].symbol:
        raise Refused(f"{_name(contraction)} with v is no plain product of weights and values", contraction)
    dot = dots[0]
    d = dot.d
    p_index, (v_node, v_index) = (dot.lhs_index, (dot.rhs, dot.rhs_index)) if dot.lhs is weights else (dot.rhs_index, (dot.lhs, dot.lhs_index))
    known = {}
    for e, at in zip(p_index, position):
        if e == d:
            if at != sc.J:
                raise Refused(f"the softmax runs over dim {softmax.dim} of the scores, the contraction with v sums over another", contraction, f"take the softmax over the key dim ({source_of(softmax.node)})" if source_of(softmax.node) else "")
            known[d] = sc.J
        elif e == 0:
            if at != 0:
                raise Refused("the weights are broadcast against v", contraction)
        else:
            known[e] = at
    if d not in known:
        raise Refused("the contraction with v does not sum over the keys", contraction)
    values = [y for y, n in zip(fresh, shape(contraction)) if y not in known and n != 1]
    if len(values) > 1:
        raise Refused("v has batch dims that the attention weights lack", contraction, "expand the weights' batch explicitly")
    width = shape(contraction)[fresh.index(values[0])] if values else Integer(1)
    known |= {y: DV for y in values}
    out_index = [Integer(0) if n == 1 else known[y] for y, n in zip(fresh, shape(contraction))]
    lift.ranges[DV] = (Integer(0), width - 1)
    v_index = [x.xreplace(known) if isinstance(x, sympy.Basic) else x for x in v_index]
    sizes = {x: n for x, n in roles.sizes.items() if x != sc.I} | {DV: width}
    v = look_behind(lift, v_node, v_index, sizes, DV, "v")
    if v is None:
        raise Refused(f"the layout of v ({v_node}, shape {[*shape(v_node)]}) mixes batch, heads and positions", v_node, "keep batch, heads, positions and head dim as separate dims")
    return [Part(v, DV, width)], out_index


def _forward_index(lift, softmax, forward, roles, sink):
    """Where the weights' element (b, h, i, j) is at the contraction: views on the way are undone by trying to reach them backwards."""
    index = list(roles.index)
    dropped = sink is None
    for node in forward.chain[1:]:
        if is_call(node, *_CASTS, aten.dropout.default):
            continue
        if is_call(node, aten.slice.Tensor):
            dim = argument(node, 1, "dim", 0) % len(index)
            keeps_all = shape(node)[dim] == roles.sizes[sc.J] and (argument(node, 2, "start", 0) or 0) == 0
            if shape(node) == shape(node.args[0]):
                continue
            if dropped or dim != softmax.dim or not keeps_all or argument(node, 4, "step", 1) != 1:
                raise Refused("the attention weights are sliced before v", node)
            dropped = True
            continue
        if node.target in VIEWS:
            index = _undo(lift, node, index)
            continue
        raise Refused(f"{_name(node)} stands between the softmax and v", node)
    if not dropped:
        raise Refused("a column is concatenated to the scores and not dropped before v", softmax.node)
    return index


def _undo(lift, node, index):
    """The index behind a view for the index before it: the inverse of VIEWS, found on fresh symbols."""
    before, after = shape(node.args[0]), shape(node)
    if is_call(node, aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze):
        return reindex(index, after, before, lift.ranges)
    fresh = [Symbol(f"z{k}", integer=True, nonnegative=True) for k in range(len(after))]
    _, source = VIEWS[node.target](lift, node, fresh)
    if before != after and sorted(map(str, before)) != sorted(map(str, after)):
        raise Refused(f"{_name(node)} changes the size of the attention weights", node)
    position = {e: k for k, e in enumerate(source)}
    return [index[position[z]] if z in position else Integer(0) for z in fresh]


# ---------------------------------------------------------------- scaled_dot_product_attention


def _library_core(node: Node) -> Core:
    q, k, v = node.args[:3]
    attn_mask, dropout = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    is_causal, scale = argument(node, 5, "is_causal", False), argument(node, 6, "scale")
    if not (isinstance(dropout, (int, float)) and dropout == 0):
        raise Refused(f"dropout of {dropout} on the attention weights", node, "set the attention dropout to 0; it is not supported yet")
    out, dims_q, dims_k, dims_v = (shape(x) for x in (node, q, k, v))
    dims = [*out[:-1], dims_k[-2]]
    roles = Roles(dims, len(dims) - 2, len(dims) - 1)
    lift = Lift(roles.ranges)
    d = lift.reduction_index(dims_q[-1])
    lift.ranges[DV] = (Integer(0), out[-1] - 1)
    lead = roles.index[:-2]

    def index(sizes, position, width):
        full = []
        for at, n, total in zip(lead[len(lead) - (len(sizes) - 2):], sizes[:-2], out[len(out) - len(sizes):-2]):
            full.append(Integer(0) if n == 1 else at if n == total else sc.floordiv(at, total / n))
        return [*full, Integer(0) if sizes[-2] == 1 else position, width]

    operands = []
    for x, sizes, position, width, length, other in ((q, dims_q, sc.I, d, dims_q[-1], sc.J), (k, dims_k, sc.J, d, dims_q[-1], sc.I), (v, dims_v, sc.J, DV, out[-1], sc.I)):
        known = {s: n for s, n in roles.sizes.items() if s != other} | {width: length}
        found = look_behind(lift, x, index(sizes, position, width), known, width, "qkv"[len(operands)])
        if found is None:
            raise Refused(f"the layout of {x}, shape {[*sizes]}, mixes batch, heads and positions", node)
        operands.append([Part(found, width, length)])
    if scale is None:
        if not dims_q[-1].is_Integer:
            raise Refused("a symbolic head dim", node)
        scale = 1.0 / math.sqrt(int(dims_q[-1]))
    e = sc.mul(lift.at(scale), _times(operands[0][0].operand.factor, operands[1][0].operand.factor))
    if is_causal:
        e = sc.select(sc.relation("<=", sc.J, sc.I), e, sc.number(-math.inf))
    if attn_mask is not None:
        m = lift.broadcast(attn_mask, roles.index)
        e = sc.select(m, e, sc.number(-math.inf)) if value(attn_mask).dtype == torch.bool else sc.add(e, m)
    parts = split(e, {sc.S})
    return Core(root=node, roles=roles, lift=lift, score=parts.score, mask=parts.mask, fill=parts.fill, sink=None, empty="zero",
                q=operands[0], k=operands[1], v=operands[2], out_index=[*lead, sc.I if out[-2] != 1 else Integer(0), DV], value_symbol=DV)
