"""A lifted attention core and its replacement by ``tileweld::attention``."""
from __future__ import annotations

import dataclasses
import math
import operator

import sympy
import torch
from torch.fx import Graph, Node

from . import attention as _attention_op  # noqa: F401 (registers the op that is built here)
from . import attention_keys as _attention_keys_op  # noqa: F401 (the same)
from . import attention_lse as _attention_lse_op  # noqa: F401 (the same)
from . import scalar as sc
from .graph import insert, shape, value
from .interval import drop_proved, tighten
from .layout import Channel, Operand, arrange, layout, size_node, sizes_of_nodes, with_groups
from .masking import ABSORBING, has_witness, moderate, renormalised
from .printer import text
from .products import late
from .rewrite import Match, Refused
from .table import tabulate

aten = torch.ops.aten


@dataclasses.dataclass
class Part:
    """One operand over one stretch of the head dim: q, k and v have one part, split nope + rope logits two."""

    operand: Operand
    d: sympy.Symbol
    length: sympy.Expr
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class RowSum:
    """sum over d of q[b, h, i, d] times channels times ``added`` (None: 1), a capture [B, H, Tq]: what zero points of the keys add to the scores of a row."""

    channels: tuple[Channel, ...]
    added: Channel | None

    @property
    def nodes(self) -> list[Node]:
        return [c.node for c in (*self.channels, *([self.added] if self.added else []))]


@dataclasses.dataclass
class Core:
    """What a pass found out about one attention core; see `finish`.

    root: the node that the op replaces; roles: B, H, Tq, Tk and their index symbols; out_index: where root holds (b, h, i, dv);
    score, mask, fill, sink: expressions over raw symbols (tensors by name, sizes by shape symbol); fill None: nothing is masked.
    added: the fill was added to the score, see masking.py.
    spelling: of the softmax, see softmax.py: they differ where all scores of a row are hugely negative.
    sums: (node, its index) of the log-sum-exps of the scores, further results.
    """

    root: Node
    roles: object
    lift: object
    score: sympy.Expr
    mask: sympy.Basic
    fill: float | None
    sink: sympy.Expr | None
    empty: str
    q: list[Part]
    k: list[Part]
    v: list[Part]
    out_index: list
    value_symbol: sympy.Symbol
    spelling: str = "softmax"
    added: bool = False
    sums: list = dataclasses.field(default_factory=list)


def finish(core: Core, source: Node) -> Match:
    """Bring the expressions to their final text and return the Match that builds the op."""
    ranges = core.roles.ranges
    mask, fill, empty = renormalised(drop_proved(core.mask, ranges)), core.fill, core.empty
    if mask is sympy.true:
        fill = None
    sees_a_key = fill is None or has_witness(mask, ranges, core.roles.rows, core.roles.keys)
    if sees_a_key and moderate(core.score):  # then no row is empty
        if core.sink is None:
            empty = "nan"
        if fill is not None and fill <= -ABSORBING:  # and no weight can reach a masked position
            fill = -math.inf
    fill = -math.inf if fill is None else fill
    if core.spelling == "unshifted":  # exp(fill) is 0, and a row without a key is 0/0
        fill = -math.inf
    if core.added and math.isfinite(fill):
        empty = "added"
    if core.spelling != "softmax" and not moderate(core.score) or core.spelling == "logsumexp" and math.isfinite(fill) and not sees_a_key:
        raise Refused("a softmax without its maximum subtracted, where a row may hold only huge negative scores", source, "write softmax(x, dim), or mask with -inf")
    if layout(core.root, core.out_index, with_groups(core.out_index, {**core.roles.sizes, core.value_symbol: core.v[0].length})) is None:
        raise Refused("the result mixes batch, heads and positions in one dim", source)
    factor, offset = core.v[0].operand.factor, None
    for term in core.v[0].operand.terms:
        offset = term.factor if offset is None else sc.add(offset, term.factor)
    texts, tables = [], []
    for e in (core.score, mask, core.sink, factor if factor != 1 else None, offset):
        if e is not None:
            e, found = tabulate(tighten(e, ranges), ranges, taken=len(tables))
            tables += found
        texts.append(e)
    texts.append(core.k[0].operand.key)
    names, captures, sizes = _names(texts, core, tables)
    score, mask, sink, factor, offset, key = (e if e is None else e.xreplace(names) for e in texts)
    if offset is not None:
        factor = sc.add(sc.V if factor is None else sc.mul(factor, sc.V), offset)
    arguments = (text(score), text(mask), float(fill), text(sink) if sink is not None else "", empty, *((text(factor),) if factor is not None else ("",) if key is not None else ()), *((text(key),) if key is not None else ()))

    roots = sorted([core.root, *(n for n, _ in core.sums)])

    inputs = tuple(dict.fromkeys([p.operand.node for p in (*core.q, *core.k, *core.v)] + [c.node for p in core.k for c in p.operand.channels]
                                 + [n for c in captures for n in ([c] if isinstance(c, Node) else c.nodes if isinstance(c, RowSum) else [])]))
    detail = f"score={arguments[0]}" + (f" mask={arguments[1]}" if arguments[1] != "True" else "") + (f" sink={arguments[3]}" if sink is not None else "") + (f" value={arguments[5]}" if factor is not None else "") + (f" key={arguments[6]}" if key is not None else "") + _groups_text(core)
    detail += "".join(f" ({p.operand.note})" for p in core.k if p.operand.note)
    moved = late(roots[0], inputs, set(roots)) if len(roots) > 1 else []
    if moved is None:
        raise Refused("keys or values are computed from the log-sum-exp of their scores", source)

    def build(graph: Graph):
        for node in moved:
            roots[0].prepend(node)
        made = _build(graph, core, captures, sizes, arguments)
        return tuple(made[n] for n in roots) if len(roots) > 1 else made[core.root]

    return Match(roots[0], inputs, build, detail + (" with log-sum-exp" if core.sums else ""), tuple(roots[1:]))


def _groups_text(core):
    heads, kv = core.roles.heads, _kv_heads(core)
    return f" heads={heads}/{kv}" if heads != kv else ""


def _kv_heads(core):
    part = core.k[0].operand
    sizes = with_groups(part.index, {**core.roles.sizes, core.k[0].d: core.k[0].length}) | (part.atoms or {})
    return sympy.Mul(*(sizes[a] for dim in layout(part.node, part.index, sizes) for a in dim if a.has(sc.H)))


def _names(exprs, core, tables):
    """Rename tensors and tables to c0, c1, ... and shape symbols to Tq, Tk, n0, ...: (renaming, captures, sizes)."""
    renaming, captures, sizes = {}, [], []
    node_of = {symbol: node for node, symbol in core.lift.captures.items()}
    made_of = {t.symbol: t for t in tables} | {symbol: found for found, symbol in core.lift.row_sums.items()}
    for e in exprs:
        if e is None:
            continue
        for element in sc.loads(e):
            symbol = element.args[0]
            if symbol not in renaming:
                renaming[symbol] = sc.capture_symbol(len(captures), bool(symbol.is_integer))
                captures.append(node_of.get(symbol) or made_of[symbol])
    known = {core.roles.rows: sc.TQ, core.roles.keys: sc.TK}
    for e in [*exprs]:
        for symbol in sorted(e.free_symbols if e is not None else (), key=str):
            if symbol in renaming or symbol in sc.NAMES.values():
                continue
            if symbol in known:
                renaming[symbol] = known[symbol]
            else:
                renaming[symbol] = sc.size_symbol(len(sizes))
                sizes.append(symbol)
    return renaming, captures, sizes


def _build(graph, core, captures, sizes, arguments) -> dict[Node, Node]:
    """Every result's node -> what takes its place."""
    roles = core.roles
    nodes = [p.operand.node for p in (*core.q, *core.k, *core.v)]
    sources = [*sizes_of_nodes(nodes), (sympy.nan, core.root, 0)]  # root's own sizes are none: it is computed later, and only marks the place
    dtype = None
    for node in [*(n for n in nodes if value(n).dtype != torch.int8), core.root]:  # the result is rounded once, to what the model returns
        dtype = value(node).dtype if dtype is None else torch.promote_types(dtype, value(node).dtype)
    q = _assemble(graph, core.q, [sc.B, sc.H, sc.I], roles, sources, dtype, every_head=True)
    k = _assemble(graph, core.k, [sc.B, sc.H, sc.J], roles, sources, dtype, every_head=len(core.k) > 1)
    v = _assemble(graph, core.v, [sc.B, sc.H, sc.J], roles, sources, dtype, every_head=False)
    tensors = [_capture(graph, c, core, sources, q) for c in captures]
    if channels := core.k[0].operand.channels:
        q = _times_channels(graph, q, channels, core, sources, dtype)
    numbers = [size_node(graph, n, sources) for n in sizes]
    ops = torch.ops.tileweld
    out, lse = insert(graph, ops.attention_lse.default if core.sums else ops.attention_keys.default if core.k[0].operand.key is not None else ops.attention.default, q, k, v, tensors, numbers, *arguments), None
    if core.sums:
        out, lse = (insert(graph, operator.getitem, out, n) for n in (0, 1))
    width = core.v[0].length
    atoms = with_groups(core.out_index, {**roles.sizes, core.value_symbol: width})
    wanted = layout(core.root, core.out_index, atoms)
    heads = [a for dim in wanted for a in dim if a != sc.H and a.has(sc.H)] or [sc.H]
    out = arrange(graph, out, [[sc.B], heads, [sc.I], [core.value_symbol]], wanted, atoms, sources)
    made = {core.root: out}
    for node, index in core.sums:
        wanted = layout(node, index, atoms)
        heads = [a for dim in wanted for a in dim if a != sc.H and a.has(sc.H)] or [sc.H]
        made[node] = arrange(graph, lse, [[sc.B], heads, [sc.I]], wanted, atoms, sources)
    return {node: x if value(x).dtype == value(node).dtype else insert(graph, aten.to.dtype, x, value(node).dtype) for node, x in made.items()}


def _assemble(graph, parts, symbols, roles, sources, dtype, every_head):
    """One operand as [B, heads, positions, width]; several parts are concatenated along the width."""
    pieces = []
    for part in parts:
        sizes = with_groups(part.operand.index, {**roles.sizes, part.d: part.length}) | (part.operand.atoms or {})
        dims = layout(part.operand.node, part.operand.index, sizes)
        heads, positions = (sorted((a for dim in dims for a in dim if a.has(x)), key=lambda a: isinstance(a, sc.mod)) for x in (sc.H, symbols[2]))
        wanted = [[symbols[0]], heads or [sc.H], positions or [symbols[2]], [part.d]]
        x = arrange(graph, part.operand.node, dims, wanted, sizes, sources)
        full = [roles.batch, roles.heads if every_head else shape(x)[1], sizes[symbols[2]], part.length]
        if every_head and heads and sympy.Mul(*(sizes[a] for a in heads)) != roles.heads:  # h // G among parts with all heads
            x = insert(graph, aten.repeat_interleave.self_int, x, int(roles.heads / shape(x)[1]), 1)
        if any(sympy.expand(a - b) != 0 for a, b in zip(full, shape(x))):
            x = insert(graph, aten.expand.default, x, [size_node(graph, n, sources) for n in full])
        if part.scale != 1.0:
            x = insert(graph, aten.mul.Tensor, x, part.scale)
        if value(x).dtype != dtype and not (len(parts) == 1 and symbols[2] == sc.J and _attention_op.is_widened(value(x).dtype, dtype)):
            x = insert(graph, aten.to.dtype, x, dtype)
        pieces.append(x)
    return pieces[0] if len(pieces) == 1 else insert(graph, aten.cat.default, pieces, -1)


def _times_channels(graph, q, channels, core, sources, dtype):
    """q [B, H, Tq, D] times (or over) tensors that are arranged as [B or 1, H or 1, 1, D], in ``dtype``."""
    roles, d, length = core.roles, core.k[0].d, core.k[0].length
    for c in channels:
        sizes = with_groups(c.index, {**roles.sizes, d: length})
        dims = layout(c.node, c.index, sizes)
        heads = [a for dim in dims for a in dim if a.has(sc.H)]
        x = arrange(graph, c.node, dims, [[sc.B], sorted(heads, key=lambda a: isinstance(a, sc.mod)) or [sc.H], [], [d]], sizes, sources)
        if heads and sympy.Mul(*(sizes[a] for a in heads)) != roles.heads:
            x = insert(graph, aten.repeat_interleave.self_int, x, int(roles.heads / shape(x)[1]), 1)
        q = insert(graph, aten.div.Tensor if c.divides else aten.mul.Tensor, q, x)
    return q if value(q).dtype == dtype else insert(graph, aten.to.dtype, q, dtype)


def _capture(graph, capture, core, sources, q):
    if isinstance(capture, RowSum):
        sums = torch.float64 if value(q).dtype == torch.float64 else torch.float32
        q = _times_channels(graph, q, capture.channels, core, sources, value(q).dtype)  # rounded as the query that the keys are multiplied with
        q = q if capture.added is None else _times_channels(graph, q, (capture.added,), core, sources, torch.promote_types(value(q).dtype, sums))
        return insert(graph, aten.sum.dim_IntList, q, [3], dtype=sums)
    if not isinstance(capture, Node):
        free = sorted(capture.expr.free_symbols - {sc.T}, key=str)
        body = capture.expr.xreplace({symbol: sc.size_symbol(n) for n, symbol in enumerate(free)})
        device = value(core.root).device
        return insert(graph, torch.ops.tileweld.table.default, text(body), size_node(graph, capture.start, sources), size_node(graph, capture.stop, sources), [size_node(graph, n, sources) for n in free], device)
    ones = [d for d, n in enumerate(shape(capture)) if n == 1]
    return insert(graph, aten.squeeze.dims, capture, ones) if ones else capture
