"""int8: tileweld::linear with weights of int8, in inference  ->  tileweld::int8_linear of the same texts

    linear(x, [W], ...), options {"int8": scheme}              ->  int8_linear(x, [q], [s], ...),  (q, s) = quantize_rows(W, group)
    linear(x, [dequantize_rows(q, s, ...)], ...), any options  ->  int8_linear(x, [q], [s], ...),  as the module that holds q says

Last of all, so that norms, gates, rotary and residuals are in the texts already and carry over. quantize_rows depends on a weight alone: it is
computed once and kept (compiler/folded.py), and again when the weight changes. An op of which some weights are left out becomes two, each
with its outputs.

Legality, each with a test that must be refused or left alone:
- inference: nothing that the op reads is trained;            - a weight is a parameter or buffer, or computed from such alone;
- float32, float16 or bfloat16, groups that divide the columns, at most 133,144 columns where sums are int32;
- weights that meet in one output (gate and up) are quantised alike;
- no router: results of up to ROUTER columns whose topk says which experts run are not rounded, where it would save next to nothing and choose others.
A weight with inf or NaN is refused when it is quantised, at the first call.

Cost: 2 M N K operations before and after; of a weight's bytes a quarter is read (float32), N scales in addition, N K / group with groups.
"""
from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from ..compiler.ir import int8_linear as _int8_linear_op  # noqa: F401 (registers the ops)
from ..compiler.ir import scalar as sc
from ..compiler.ir.graph import insert, is_call, value
from ..compiler.ir.int8_scheme import Int8
from ..compiler.ir.lift import POINTWISE
from ..compiler.ir.linear import spec_of
from ..compiler.ir.prologue import renamed
from ..compiler.ir.rewrite import Match, Refusal, Refused
from ..compiler.ir.views import VIEWS
from ..compiler.ir.weights import is_constant, why_trained

NAME = "int8"
OPTION = "int8"  # find is given options.int8
aten, tileweld = torch.ops.aten, torch.ops.tileweld
ROUTER = 1024  # columns; more are a vocabulary that is sampled from
TOLERANCE = 0.1  # of the largest output, for verification with random numbers: int8 weights differ by about 0.01, both operands by 0.02


@dataclasses.dataclass(frozen=True)
class Source:
    """How one weight becomes int8. Weights of one op must agree in `how`; `module` is the dequantize_rows it comes from, else it is quantised here."""

    weight: Node
    how: tuple  # (activation, threshold, columns node)
    group: int = 0
    module: Node | None = None
    slices: tuple[tuple, ...] = ()  # of its rows, on the way from the module's weight


def find(graph: Graph, settings: Int8 | None = None) -> Iterator[Match | Refusal]:
    """Every tileweld::linear whose weights are int8 already, or are to be, as a Match or as a Refusal."""
    heads = _embeddings(graph)
    made: dict = {}
    for node in list(graph.nodes):
        if not is_call(node, tileweld.linear.default):
            continue
        sources = []
        for weight in node.args[1]:
            try:
                sources.append(_source(weight, node, settings, heads))
            except Refused as refused:
                yield refused.refusal
                sources.append(None)
        if not any(sources):
            continue
        captures, _, norm, _, prologue, epilogues, pairs = node.args[2:]
        spec = spec_of([value(c) for c in captures], norm, prologue, epilogues, pairs)
        parts = _parts(spec, [s.how if s is not None else None for s in sources])
        if parts is None:
            yield Refusal("its weights meet in one output (gate and up), and are not all quantised alike", node, "quantise or leave out all of them")
        elif (match := _match(node, sources, spec, parts, made)) is not None:
            yield match


def left_float(graph: Graph, settings: Int8) -> Iterator[tuple[Node, str, str]]:
    """(weight, its module, why it stays float) of every product that is still a tileweld::linear behind this pass, for the report."""
    heads = _embeddings(graph)
    for node in graph.find_nodes(op="call_function", target=tileweld.linear.default):
        found = {}
        for weight in node.args[1]:
            try:
                is_taken = _source(weight, node, settings, heads) is not None
                found[weight] = "" if is_taken else settings.left_out(_name(weight), bool(_placeholders(weight) & heads)) or (f"it is a router: topk of its {value(weight).shape[0]} results says what is computed" if _is_router(weight, node) else "its int8 rows are a model's own")
            except Refused as refused:
                found[weight] = refused.refusal.reason.partition(" stays float: ")[2] or refused.refusal.reason
        is_mixed = any(found.values())
        for weight, why in found.items():
            yield weight, _name(weight), why or ("it meets another in one output (gate and up), which is not quantised alike" if is_mixed else "the rewrite was refused")


def names(graph: Graph) -> set[str]:
    """The modules of all weights that products read, of floats or int8."""
    return {_name(w) for n in graph.nodes if is_call(n, tileweld.linear.default, tileweld.int8_linear.default) for w in n.args[1]}


def _source(weight: Node, node: Node, settings: Int8 | None, heads: set[Node]) -> Source | None:
    """None: it stays float by what was asked for. Raises Refused where it cannot be what was asked for."""
    slices, below = [], weight
    while is_call(below, aten.slice.Tensor) and (len(below.args) < 2 or below.args[1] == 0):
        slices.append(below.args[1:])
        below = below.args[0]
    if is_call(below, tileweld.dequantize_rows.default):
        _, _, _, activation, threshold, columns = below.args
        if (reason := why_trained(node.graph, [node])) is not None:
            raise Refused(f"the product with int8 weights is computed in floats: {reason}", node, "compile and run it under torch.no_grad() or torch.inference_mode()")
        if value(node.args[0]).dtype == torch.float64:
            raise Refused("the product with int8 weights is computed in floats: x is float64", node, "give it float32, float16 or bfloat16")
        return Source(weight, (activation, threshold, columns), module=below, slices=tuple(slices[::-1]))
    if settings is None:
        return None
    name = _name(weight)
    if settings.left_out(name, bool(_placeholders(weight) & heads)) is not None or _is_router(weight, node):
        return None
    known = value(weight)
    where = f"the weight of {name}" if name else "a weight"
    if (reason := why_trained(node.graph, [weight])) is not None:
        raise Refused(f"{where} stays float: {reason}", node, "compile and run it under torch.no_grad() or torch.inference_mode()")
    if not is_constant(weight):
        raise Refused(f"{where} stays float: it is an input of the call, or computed from one, and would be quantised at every call", node, "make it a parameter or a buffer of a module")
    if (problem := settings.problem(known.shape[1], known.dtype)) is not None:
        raise Refused(f"{where} stays float: {problem[0]}", node, problem[1])
    return Source(weight, (settings.activation, settings.threshold if settings.activation == "mixed" else math.inf, None), settings.group)


def _is_router(weight: Node, node: Node) -> bool:
    """Do results of this weight reach a topk, element by element, by a softmax or by views, and are they few?"""
    if not isinstance(n := value(weight).shape[0], int) or n > ROUTER:
        return False
    spec = spec_of([value(c) for c in node.args[2]], node.args[4], *node.args[6:9])
    own = {k for k, w in enumerate(node.args[1]) if w is weight}
    stack, seen = [u for u in node.users if is_call(u, operator.getitem) and own & set(spec.accumulators(u.args[1]))], set()
    while stack:
        n = stack.pop()
        if is_call(n, aten.topk.default):
            return True
        if n not in seen:
            seen.add(n)
            stack += [u for u in n.users if is_call(u, aten.topk.default, aten.softmax.int, aten._softmax.default) or u.target in POINTWISE or u.target in VIEWS]
    return False


def _placeholders(node: Node) -> set[Node]:
    found, stack = set(), [node]
    while stack:
        n = stack.pop()
        if n.op in ("placeholder", "get_attr"):
            found.add(n)
        stack += n.all_input_nodes
    return found


def _embeddings(graph: Graph) -> set[Node]:
    """Weights that an embedding reads too: a projection with one of them is tied, the one to the vocabulary."""
    reading = [n for n in graph.nodes if is_call(n, aten.embedding.default)]
    return {weight for n in reading for weight in _placeholders(n.args[0])} | {
        weight for n in graph.nodes if is_call(n, tileweld.embedding_norm) for table in n.args[0] for weight in _placeholders(table)}


def _name(weight: Node) -> str:
    """The module that a weight belongs to; of a weight that is computed from several (a merged LoRA), the one of its shape."""
    found = sorted(_placeholders(weight))
    base = next((n for n in found if value(n).shape == value(weight).shape), found[0] if found else weight)
    return base.meta.get("label", "").rpartition(".")[0].removesuffix(".base_layer")


def _parts(spec, how: list) -> list[tuple[object, list[int]]] | None:
    """[(how, numbers of outputs)], None as how for those that stay float; None where an output's weights differ."""
    parts: dict = {}
    for o in range(len(spec.epilogues)):
        kinds = {how[w] for w in spec.accumulators(o)}
        if len(kinds) > 1:
            return None
        parts.setdefault(kinds.pop(), []).append(o)
    return list(parts.items())


def _match(node: Node, sources: list, spec, parts, made: dict) -> Match | None:
    items = sorted(u for u in node.users if is_call(u, operator.getitem))
    if not items or len(items) != len(node.users):
        return None
    detail = ", ".join(dict.fromkeys(_detail(source) for source in sources if source is not None))
    shapes = [str([*value(w).shape]) for w in node.args[1]]
    detail += f": {' + '.join(f'{shapes.count(s)}x{s}' if shapes.count(s) > 1 else s for s in dict.fromkeys(shapes))}"

    def build(graph: Graph):
        found = {}
        for how, outputs in parts:
            op = _op(graph, node, sources, spec, how, outputs, made)
            found |= {o: (op, k) for k, o in enumerate(outputs)}
        new = tuple(insert(graph, operator.getitem, *found[item.args[1]]) for item in items)
        return new if len(new) > 1 else new[0]

    inputs = tuple(n for n in node.all_input_nodes if isinstance(value(n), torch.Tensor) and n not in [s.weight for s in sources if s is not None and s.module is not None])
    modules = tuple(n for s in sources if s is not None and s.module is not None for n in s.module.all_input_nodes)
    return Match(items[0], tuple(dict.fromkeys((*inputs, *modules))), build, detail, tuple(items[1:]), TOLERANCE)


def _detail(source: Source) -> str:
    activation, threshold, columns = source.how
    words = {"float": "float activations", "int8": "int8 activations", "mixed": f"int8 activations, {'calibrated columns' if columns is not None else f'columns from {threshold:g} on'} in float"}[activation]
    groups = value(source.module.args[1]).shape[1] if source.module is not None else 0
    group = source.group or (value(source.weight).shape[1] // groups if groups > 1 else 0)
    return words + (f", groups of {group}" if group else "")


def _op(graph: Graph, node: Node, sources: list, spec, how, outputs: list[int], made: dict) -> Node:
    """The op of some of the outputs: int8_linear, or, where how is None, linear."""
    x, weights, captures, sizes, norm, eps, prologue, epilogues, pairs = node.args
    used = sorted({w for o in outputs for w in spec.accumulators(o)})
    texts, own_pairs = [epilogues[o] for o in outputs], [n for o in outputs for n in spec.pairs[o]]
    if used != list(range(len(weights))):
        names = {sc.accumulator_symbol(f"{letter}{w}"): sc.accumulator_symbol(f"{letter}{k}") for k, w in enumerate(used) for letter in "ap"}
        texts = [renamed(t, names, spec.integer_captures) for t in texts]
    rows, widths = value(x), [value(weights[spec.accumulators(o)[0]]).shape[0] for o in outputs]
    if how is None:
        op = graph.call_function(tileweld.linear.default, (x, [weights[w] for w in used], captures, sizes, norm, eps, prologue, texts, own_pairs))
    else:
        both = [_quantised(graph, sources[w], made) for w in used]
        op = graph.call_function(tileweld.int8_linear.default, (x, [q for q, _ in both], [s for _, s in both], captures, sizes, norm, eps, prologue, texts, own_pairs, *how))
    op.meta["val"] = [rows.new_empty((rows.shape[0], n)) for n in widths]
    return op


def _quantised(graph: Graph, source: Source, made: dict) -> tuple[Node, Node]:
    """Nodes of q and scale. A weight is quantised where it is known and once, however many products read it."""
    if source.module is not None:
        q, scale = source.module.args[:2]
        for given in source.slices:
            q, scale = (insert(graph, aten.slice.Tensor, t, *given) for t in (q, scale))
        return q, scale
    key = source.weight, source.group
    if key not in made:
        first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
        place = first if source.weight < first else source.weight.next
        with graph.inserting_before(place):
            both = insert(graph, tileweld.quantize_rows.default, source.weight, source.group)
            made[key] = tuple(insert(graph, operator.getitem, both, k) for k in range(2))
    return made[key]


