"""attention: softmax(score(q k^T), masked) v  ->  tileweld::attention(q, k, v, score=..., mask=...)

Start at a softmax (or its spelled-out form, or scaled_dot_product_attention). Lift its input at (b, h, i, j) back to the
contraction of q and k: whatever lies between is the score, and what it adds or fills with a huge negative constant is the
mask. Follow its output forward to the contraction with v. Nothing is matched by spelling.

Legality, each with a test that must be refused:
- the softmax runs over the index that the contraction with v sums over;
- scores and weights have no consumer outside the core, but the scores' log-sum-exp, which is a second result (tileweld::attention_lse), in inference;
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
from ..compiler.ir.contraction import MIX_LATER, MIXED, dot_product, hidden_product, is_parameter, mixing_linear, product
from ..compiler.ir.core import Core, Part, finish
from ..compiler.ir.graph import argument, is_call, op_name, shape, source_of, value
from ..compiler.ir.key_text import keys_behind
from ..compiler.ir.layout import look_behind
from ..compiler.ir.lift import Lift
from ..compiler.ir.masking import split_where_seen
from ..compiler.ir.rewrite import Match, NotThePattern, Refusal, Refused
from ..compiler.ir.roles import Roles, heads_behind, query_dims
from ..compiler.ir.softmax import Forward, Softmax, between_products, follow, forward_index, is_made_of_a_product, log_sums, softmax_at, without_sink
from ..compiler.ir.unliftable import Unliftable
from ..compiler.ir.weights import why_trained

NAME = "attention"
SETTLES = (torch.ops.tileweld.attention.default,)
aten = torch.ops.aten
DV = Symbol("dv", integer=True, nonnegative=True)


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every softmax attention core of the graph, as a Match or a Refusal."""
    for node in list(graph.nodes):
        try:
            if is_call(node, aten.scaled_dot_product_attention):
                yield finish(_library_core(node), node)
            elif (softmax := softmax_at(node)) is not None:
                yield _match(softmax)
        except Refused as refused:
            at_output = refused.refusal.node.op == "output"  # which has no line of the user's: the softmax has
            yield dataclasses.replace(refused.refusal, node=node) if at_output else refused.refusal
        except NotThePattern:
            if between_products(softmax, is_parameter):
                yield Refusal("the way from the product of q and k to the softmax, or from the softmax to the product with v, has no formula (a chunked layout, a gather, padding)", node,
                              "write the mask over the whole score matrix: tiles that it empties are skipped")


# ---------------------------------------------------------------- the core


def _match(softmax: Softmax) -> Match:
    forward = follow(softmax)
    if forward is None:
        raise NotThePattern
    failures: list[Exception] = []
    for i_dim in query_dims(softmax):
        try:
            return finish(_core(softmax, forward, i_dim), softmax.node)
        except (Refused, NotThePattern) as failure:
            failures.append(failure)
    raise next((f for f in failures if isinstance(f, Refused)), failures[0])


def _core(softmax: Softmax, forward: Forward, i_dim) -> Core:
    scores, dims, sink_node = without_sink(softmax)
    roles = Roles(dims, i_dim, softmax.dim, heads_behind(softmax, forward))
    lift = Lift(roles.ranges)
    e = lift.at(scores, roles.index)
    try:
        sums = log_sums(softmax)
        e, q, k, dots = dot_product(lift, e, roles, scores, "the log-sum-exp of their scores is a result" if sums else "")
    except NotThePattern:
        if forward.problem is None and (node := hidden_product(lift, e)) is not None:
            raise Refused(f"{op_name(node)} between the product of q and k and the softmax has no scalar expression", node) from None
        if forward.problem is None and (node := mixing_linear(lift, e)) is not None and is_made_of_a_product(node.args[0], is_parameter):
            raise Refused(MIXED.format("scores", "the softmax"), node, MIX_LATER) from None
        raise
    except Refused:
        if forward.problem:  # no product with v is near
            raise NotThePattern from None
        raise
    if forward.problem:
        if all(is_parameter(part.operand.node) for part in k):  # a router: softmax(x @ weight), and then whatever it likes
            raise NotThePattern
        raise Refused(*forward.problem)
    inside = lift.path({dot.symbol for dot in dots}) | set(softmax.inner) | set(forward.chain) | set(sink_node.between if sink_node else ())
    _nothing_escapes(inside, {forward.contraction, *sums}, sums)
    if sums and sink_node:
        raise Refused("the log-sum-exp of scores with a sink", sums[0])
    if sums and (reason := why_trained(scores.graph, [scores])):
        raise Refused(f"the log-sum-exp of the scores is used, which has no gradient here, and {reason}", sums[0], "compile under torch.no_grad(), or freeze the weights")
    v, out_index = _values(lift, softmax, forward, roles, sink_node)
    sink = lift.at(sink_node.node, sink_node.index(roles)) if sink_node else None
    parts = split_where_seen(e, {sc.S}, roles)
    return Core(root=forward.contraction, roles=roles, lift=lift, score=parts.score, mask=parts.mask, fill=parts.fill, sink=sink, empty=softmax.empty,
                q=q, k=k, v=v, out_index=out_index, value_symbol=DV, spelling=softmax.spelling, added=parts.added, sums=[(n, _sum_index(n, softmax, roles)) for n in sums])


def _sum_index(node: Node, softmax: Softmax, roles: Roles) -> list:
    """The index of an element of the log-sum-exp of the scores: theirs, without the keys."""
    return [e for k, e in enumerate(roles.index) if k != softmax.dim] if len(shape(node)) < len(roles.index) else [Integer(0) if k == softmax.dim else e for k, e in enumerate(roles.index)]


def _nothing_escapes(inside: set[Node], outside: set[Node], sums: list[Node]) -> None:
    for node in inside.difference(sums):
        for user in node.users:
            if user not in inside and user not in outside and not is_call(user, aten.sym_size.int):
                where = f" ({source_of(user)})" if source_of(user) else ""
                raise Refused(f"the attention scores are also used outside the core, by {op_name(user)}{where}", user if user.op != "output" else node, "do not return or reuse the scores")


# ---------------------------------------------------------------- the contraction with v


def _values(lift, softmax, forward, roles, sink):
    """(v operand, index of the result): the weights stand at (b, h, i, j) and the contraction sums over j."""
    weights = forward.chain[-1]
    position = forward_index(lift, softmax, forward, roles, sink)
    contraction = forward.contraction
    fresh = [Symbol(f"y{k}", integer=True, nonnegative=True) for k in range(len(shape(contraction)))]
    inner = Lift({y: (Integer(0), n - 1) for y, n in zip(fresh, shape(contraction))})
    try:
        e = inner.at(contraction, [Integer(0) if n == 1 else y for y, n in zip(fresh, shape(contraction))])
    except Unliftable:
        e = None
    dots = list(inner.dots.values())
    if len(dots) != 1 or e != dots[0].symbol:
        raise Refused(f"{op_name(contraction)} with v is no plain product of weights and values", contraction)
    dot = dots[0]
    d = dot.d
    p_index, (v_node, v_index) = (dot.lhs_index, (dot.rhs, dot.rhs_index)) if dot.lhs is weights else (dot.rhs_index, (dot.lhs, dot.lhs_index))
    known = {}
    for e, at in zip(p_index, position):
        if e == d:
            if at != sc.J:
                if is_parameter(v_node):
                    raise Refused(MIXED.format("weights", "v"), contraction, MIX_LATER)
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
        full, role = index(sizes, position, width), "qkv"[len(operands)]
        found = keys_behind(lift, x, full, known, width) if role == "k" else look_behind(lift, x, full, known, width, role)
        if found is None:
            raise Refused(f"the layout of {x}, shape {[*sizes]}, mixes batch, heads and positions", node)
        operands.append([Part(found, width, length)])
    if scale is None:
        if not dims_q[-1].is_Integer:
            raise Refused("a symbolic head dim", node)
        scale = 1.0 / math.sqrt(int(dims_q[-1]))
    e = sc.mul(lift.at(scale), product(lift, operands[0][0].operand, operands[1][0].operand))
    if is_causal:
        e = sc.select(sc.relation("<=", sc.J, sc.I), e, sc.number(-math.inf))
    if attn_mask is not None:
        m = lift.broadcast(attn_mask, roles.index)
        e = sc.select(m, e, sc.number(-math.inf)) if value(attn_mask).dtype == torch.bool else sc.add(e, m)
    parts = split_where_seen(e, {sc.S}, roles)
    return Core(root=node, roles=roles, lift=lift, score=parts.score, mask=parts.mask, fill=parts.fill, sink=None, empty="zero",
                q=operands[0], k=operands[1], v=operands[2], out_index=[*lead, sc.I if out[-2] != 1 else Integer(0), DV], value_symbol=DV, added=parts.added)
