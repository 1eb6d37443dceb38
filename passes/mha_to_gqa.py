"""mha_to_gqa: attention whose q, k, v and output are projections  ->  the same with G KV heads, its weights merged      options {"gqa": G}

    o(attention(q(x), k(x), v(x)))     ->     o'(attention(q'(x), k'(x), v'(x))),   q', k', v', o' = tileweld::merge_heads(q, k, v, o)

**Lossy**, and never made unless the option asks for it; exact where the heads of a group are one up to the gauge (compiler/ir/head_merge.py).
merge_heads reads weights alone, so it is computed once and again when they change (compiler/folded.py), not at every call. The residual is in
the report. For a model that keeps a KV cache, or is to be saved or trained on, convert.to_gqa changes the model itself, with calibration.

Legality, each with a test that must be refused:
- q, k, v are outputs of tileweld::linear of one x, through views alone, with a bias or none, rotary or none (compiler/ir/linear_map.py): a norm of q and k, a KV
  cache that enters or leaves the graph, cross attention are none of that;       - nobody else reads them, or the attention's output;
- the output projection is one tileweld::linear of the attention's output, head by head, nothing in between (a gate, a norm);
- the weights are parameters, or computed from parameters alone, of a float dtype, and no gradient is wanted of the graph;
- G divides the KV heads. A score, mask or sink that depends on the head (ALiBi) keeps the heads in place: neighbours are merged.

Cost: the projections of k and v, and the bytes of k and v that attention reads, by Hkv / G.
"""
from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator

import sympy
import torch
from sympy import Integer, Symbol
from torch.fx import Graph, Node

from ..compiler.ir import merge_heads as _merge_heads_op  # noqa: F401 (registers the op)
from ..compiler.ir import scalar as sc
from ..compiler.ir.attention import variant_of
from ..compiler.ir.graph import computed_from, insert, is_call, is_tensor, op_name, shape, value
from ..compiler.ir.layout import size_node, sizes_of_nodes
from ..compiler.ir.lift import Lift
from ..compiler.ir.linear_build import call, rows_of
from ..compiler.ir.linear_map import LinearMap, linear_map
from ..compiler.ir.linear import spec_of
from ..compiler.ir.products import late
from ..compiler.ir.rewrite import Match, NotThePattern, Refusal, Refused
from ..compiler.ir.unliftable import Unliftable
from ..compiler.ir.views import VIEWS
from ..compiler.ir.weights import is_constant, is_weight_input, why_trained

NAME, OPTION = "mha_to_gqa", "gqa"
aten, tileweld = torch.ops.aten, torch.ops.tileweld
D = Symbol("d", integer=True, nonnegative=True)
NORMS = (tileweld.rms_norm.default, aten.layer_norm.default, aten.rms_norm.default, aten.linalg_vector_norm.default, aten.rsqrt.default)
CONVERT = "tileweld.convert.to_gqa(model, {}) changes the model itself, and with it its cache"


@dataclasses.dataclass(frozen=True)
class Projection:
    """One of q, k, v: output number ``output`` of a tileweld::linear node, with heads of ``d`` columns."""

    role: str
    op: Node
    output: int
    heads: int
    d: int
    map: LinearMap

    @property
    def weight(self) -> Node:
        return self.op.args[1][self.map.weight]

    @property
    def bias(self) -> Node | None:
        return None if self.map.bias is None else self.op.args[2][self.map.bias]


def find(graph: Graph, groups: int | None) -> Iterator[Match | Refusal]:
    """Every attention with more than ``groups`` KV heads, as a Match, or as a Refusal that says what stands in the way; nothing where groups is None."""
    if groups is None:
        return
    for node in list(graph.nodes):
        if is_call(node, tileweld.attention.default):
            try:
                yield _match(graph, node, groups)
            except Refused as refused:
                yield refused.refusal
            except NotThePattern:
                continue


def _match(graph: Graph, attention: Node, groups: int) -> Match:
    heads, kv_heads, value_heads = (int(shape(a)[1]) if shape(a)[1].is_Integer else 0 for a in attention.args[:3])
    if kv_heads == groups == value_heads:
        raise NotThePattern
    if kv_heads != value_heads or not heads or not kv_heads:
        raise Refused(f"{heads} query heads, {kv_heads} of keys and {value_heads} of values: expected as many of keys as of values", attention)
    if kv_heads % groups:
        divisors = ", ".join(str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0)
        raise Refused(f"{groups} does not divide its {kv_heads} KV heads", attention, f"choose one of {divisors}")
    parts = [_projection(attention, role, node, groups) for role, node in zip(("queries", "keys", "values"), attention.args[:3])]
    q, k, v = parts
    if len({(p.op, p.output) for p in parts}) < 3:
        raise Refused("two of queries, keys and values are one tensor: shared KV", attention, "such heads cannot be merged apart")
    if len({rows_of(p.op.args[0]) for p in parts}) > 1:
        raise Refused("queries, keys and values are made from different inputs: cross attention", attention, "only self attention is merged")
    if v.map.pair != (0, 0) or q.map.pair != k.map.pair:
        raise Refused("rotary embedding of the values, or another one of queries than of keys", attention)
    output = _output(attention, v.d)
    _check_weights(graph, parts, output)
    ops = sorted({p.op for p in parts})
    inputs = [w for p in parts for w in (p.weight, p.bias) if w is not None] + [output.args[1][0]]
    moved = late(ops[0], inputs, set(ops))
    if moved is None:
        raise Refused("a weight is computed after it is needed", attention)
    permutes = not _knows_heads(attention)

    def build(graph: Graph):
        return _build(graph, attention, parts, output, ops, moved, groups, permutes)

    size = value(k.weight).element_size() * (k.d + v.d)
    detail = f"{kv_heads} -> {groups} KV heads, {kv_heads * size} -> {groups * size} bytes of keys and values a token; lossy" + ("" if permutes else "; neighbours: the score knows its head")
    return Match(ops[0], tuple(inputs), build, detail, (*ops[1:], attention, output), tolerance=math.inf)


# ---------------------------------------------------------------- what q, k, v are


def _projection(attention: Node, role: str, node: Node, groups: int) -> Projection:
    _, heads, length, d = shape(node)
    if not d.is_Integer:
        raise Refused("a symbolic head dim", attention)
    symbols = [s if n != 1 else Integer(0) for s, n in zip((sc.B, sc.H, sc.J, D), shape(node))]
    lift = Lift({s: (Integer(0), n - 1) for s, n in zip((sc.B, sc.H, sc.J, D), shape(node))})
    e = lift.at(node, symbols)
    cached = CONVERT.format(groups)
    if not isinstance(e, sc.load) or any(is_call(n, *NORMS) for n in _since_projection(node)):
        raise _between(attention, role, node, cached)
    item = next(n for n, symbol in lift.captures.items() if symbol == e.args[0])
    op = item.args[0] if is_call(item, operator.getitem) else None
    if not is_call(op, tileweld.linear.default):
        if is_call(op, tileweld.int8_linear.default):
            raise Refused(f"the projection of {role} has int8 weights", attention, "merge heads before quantising")
        raise _between(attention, role, node, cached)
    batch, rows = shape(node)[0], [sc.B, sc.J]
    wanted = sympy.Add(*(s * n for s, n in zip(rows, (length, Integer(1))))) if batch != 1 else sc.J
    wanted = wanted.xreplace({s: Integer(0) for s, n in zip((sc.B, sc.J), (batch, length)) if n == 1})
    found = [Integer(0), *e.args[1:]] if shape(item)[0] == 1 else list(e.args[1:])
    columns = sympy.Add(d * symbols[1], symbols[3])
    if len(found) != 2 or sympy.expand(found[0] - wanted) != 0 or sympy.expand(found[1] - columns) != 0:
        raise Refused(f"the heads of {role} do not stand side by side in the projection's columns", attention, "lay the projection out as [heads, head dim]")
    if (other := _other_reader(item, attention)) is not None:
        raise Refused(f"{role} are also read by {op_name(other)}, which takes {heads} heads: a KV cache that leaves the graph, or the model's own use", attention, cached)
    try:
        found = linear_map(op, item.args[1], int(d))
    except Unliftable as error:
        raise Refused(f"{role} are no plain projection: {error}", attention, cached) from None
    return Projection(role, op, item.args[1], int(heads), int(d), found)


def _since_projection(node: Node) -> list[Node]:
    """What it is computed by, back to fused matmuls and inputs of the graph."""
    found, stack = [], [node]
    while stack:
        n = stack.pop()
        if n not in found and not is_call(n, tileweld.linear.default, tileweld.int8_linear.default):
            found.append(n)
            stack.extend(a for a in n.all_input_nodes if is_tensor(a) or is_call(a, tileweld.linear.default))
    return found


def _between(attention: Node, role: str, node: Node, cached: str) -> Refused:
    """Why what is not a projection alone is none."""
    steps = _since_projection(node)
    if any(is_call(n, *NORMS) for n in steps):
        return Refused(f"a norm stands between projection and {role} (QK-norm): such heads cannot be rescaled or turned to fit each other", attention, "QK-norm models are not merged")
    while steps and node.op == "call_function" and node.target in VIEWS and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    if role != "queries" and (any(n.op == "placeholder" and not is_weight_input(n) and value(n).dim() == 4 for n in steps) or is_call(node, aten.cat.default, aten.index_put.default, aten.index_copy.default)):
        return Refused(f"{role} come from {op_name(node) if node.op == 'call_function' else 'an input of the graph'}, not from a projection alone: a KV cache holds the heads that it was made for", attention, cached)
    return Refused(f"{role} are no projection alone, but what {op_name(node) if node.op == 'call_function' else 'an input'} makes of one", attention, cached)


def _readers(node: Node) -> list[tuple[Node, Node]]:
    """(what is read, who reads it), views and sizes aside."""
    found, stack = [], [(node, u) for u in node.users]
    while stack:
        source, user = stack.pop()
        if user.op == "call_function" and (user.target in VIEWS or is_call(user, aten.contiguous.default, aten.clone.default)):
            stack.extend((user, u) for u in user.users)
        elif not is_call(user, aten.sym_size.int):
            found.append((source, user))
    return found


def _other_reader(item: Node, attention: Node) -> Node | None:
    return next((user for _, user in _readers(item) if user is not attention), None)


def _output(attention: Node, dv: int) -> Node:
    """The output projection: the one reader, a linear of the heads side by side."""
    readers = _readers(attention)
    if len(readers) != 1 or not is_call(readers[0][1], tileweld.linear.default) or readers[0][1].args[0] is not readers[0][0]:
        named = ", ".join(sorted({op_name(user) for _, user in readers})) or "nothing"
        raise Refused(f"its output is read by {named}; expected one output projection alone", attention, "no gate or norm between attention and projection can be merged")
    op = readers[0][1]
    x, weights = op.args[0], op.args[1]
    if len(weights) != 1 or op.args[4] != "" or op.args[6] != "x":
        raise Refused("between attention and output projection stands a norm or a gate, or there are two projections", attention)
    row, head = Symbol("row", integer=True, nonnegative=True), sc.H
    rows, columns = shape(x)
    lift = Lift({row: (Integer(0), rows - 1), head: (Integer(0), columns // dv - 1), D: (Integer(0), Integer(dv - 1))})
    e = lift.at(x, (row if rows != 1 else Integer(0), dv * head + D if dv > 1 else head))
    source = next((n for n, symbol in lift.captures.items() if isinstance(e, sc.load) and symbol == e.args[0]), None)
    kept = [n for n, size in zip(range(4), shape(attention)) if size != 1]
    index = dict(zip(kept, e.args[1:])) if source is attention else {}
    expected = {1: head, 3: D}
    if source is not attention or any(sympy.expand(index.get(n, Integer(0)) - (s if n in kept else 0)) != 0 for n, s in expected.items()) or any(index[n].has(head) or index[n].has(D) for n in (0, 2) if n in index):
        raise Refused("its heads do not stand side by side in the columns that the output projection reads", attention)
    return op


# ---------------------------------------------------------------- whether it may be


def _check_weights(graph: Graph, parts: list[Projection], output: Node) -> None:
    named = [(f"{p.role}' {kind}", node) for p in parts for kind, node in (("weight", p.weight), ("bias", p.bias)) if node is not None]
    named.append(("output projection's weight", output.args[1][0]))
    for name, node in named:
        if not is_constant(node):
            raise Refused(f"the {name} is computed from what is no parameter, by {op_name(node) if node.op == 'call_function' else 'an input of the graph'}", output, "pass the model's parameters as parameters")
        if (source := _quantised(node)) is not None:
            raise Refused(f"the {name} is quantised: {source.meta.get('label') or source.name} is {value(source).dtype}", output, "merge heads before quantising")
    if (reason := why_trained(graph, [node for _, node in named])) is not None:
        raise Refused(f"{reason}: it would go to weights that the merge replaces", output, f"compile under torch.no_grad(); to train with fewer heads, {CONVERT.format('G')}")
    for p in parts:
        spec = _spec(p.op)
        for other in range(len(spec.epilogues)):
            if other != p.output and (p.map.weight in spec.accumulators(other) or p.map.bias is not None and any(sc.capture_symbol(p.map.bias) == x.args[0] for x in sc.loads(spec.epilogue_exprs[other]))):
                raise Refused(f"the {p.role}' weight or bias is read by another output of the same matmul", output)


def _spec(op: Node):
    return spec_of([value(c) for c in op.args[2]], *op.args[4:5], *op.args[6:])


def _quantised(node: Node) -> Node | None:
    """A parameter of an integer dtype that the weight is computed from."""
    return next((n for n in sorted(computed_from(node)) if n.op == "placeholder" and not value(n).dtype.is_floating_point), None)


def _knows_heads(attention: Node) -> bool:
    """Do score, mask, sink, factor or offset depend on the query head?"""
    _, _, _, captures, _, *texts = attention.args
    variant = variant_of([value(c) for c in captures], *texts)
    return any(sc.H in e.free_symbols for e in (variant.score_expr, variant.mask_expr, variant.sink_expr, variant.value_expr, variant.offset_expr) if e is not None)


# ---------------------------------------------------------------- the rewrite


def _build(graph: Graph, attention: Node, parts: list[Projection], output: Node, ops: list[Node], moved: list[Node], groups: int, permutes: bool) -> tuple[Node, ...]:
    q, k, v = parts
    for node in moved:
        ops[0].prepend(node)
    with graph.inserting_before(ops[0]):
        merged = insert(graph, tileweld.merge_heads.default, q.weight, k.weight, v.weight, output.args[1][0], q.bias, k.bias, v.bias, q.heads, k.heads, groups, list(k.map.pair), permutes)
        numbers = iter(range(len(value(merged)) - 1))
        item = lambda: insert(graph, operator.getitem, merged, next(numbers))
        weights, projection = {p: item() for p in parts}, item()
        biases = {p: item() for p in parts if p.bias is not None}
    made: dict[Node, Node] = {}
    for op in ops:
        with graph.inserting_before(op):
            own = [p for p in parts if p.op is op]
            replaced = {p.map.weight: weights[p] for p in own}, {p.map.bias: biases[p] for p in own if p.bias is not None}
            new_weights, captures = ([new.get(n, old) for n, old in enumerate(before)] for new, before in zip(replaced, op.args[1:3]))
            spec = _spec(op)
            widths = [value(new_weights[spec.accumulators(o)[0]]).shape[0] for o in range(len(spec.epilogues))]
            made[op] = call(graph, widths, op.args[0], new_weights, captures, *op.args[3:])
    with graph.inserting_before(attention):
        few = [_heads(graph, insert(graph, operator.getitem, made[p.op], p.output), old, groups, p.d) for p, old in ((k, attention.args[1]), (v, attention.args[2]))]
        made[attention] = insert(graph, tileweld.attention.default, attention.args[0], *few, *attention.args[3:])
    with graph.inserting_before(output):
        made[output] = call(graph, [known.shape[1] for known in value(output)], output.args[0], [projection], *output.args[2:])
    return tuple(made[node] for node in (*ops, attention, output))


def _heads(graph: Graph, item: Node, old: Node, groups: int, d: int) -> Node:
    """[M, groups d] as [B, groups, T, d]."""
    batch, _, length, _ = shape(old)
    sources = sizes_of_nodes([item, _batched(item)])
    sizes = [size_node(graph, batch, sources), size_node(graph, length, sources), groups, d]
    return insert(graph, aten.permute.default, insert(graph, aten.reshape.default, item, sizes), [0, 2, 1, 3])


def _batched(item: Node) -> Node:
    """What the matmul's rows were before they were flattened, which knows batch and length."""
    x = item.args[0].args[0]
    return x.args[0] if is_call(x, aten.reshape.default) else x
