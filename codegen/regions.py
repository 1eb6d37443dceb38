"""Regions: what lies between the matmuls of a graph behind AOT becomes few kernels.

`find_regions` partitions the graph (partition.py), lifts every group to loop nests of scalar expressions (compiler/ir/lift.py), so
that rotary's slice, negate, cat, multiply and add are one expression of the loads of q, cos and sin, and reductions become
symbols; bundles independent nests that read the same tensor; and keeps a region if it saves memory traffic or launches.
Equal layers are lifted once.
"""
from __future__ import annotations

import dataclasses

import sympy
import torch
from sympy import Integer, Symbol
from torch.fx import GraphModule, Node

from ..compiler.ir import region as ir
from ..compiler.ir import scalar as sc
from ..compiler.ir.graph import argument, is_tensor, shape, size, value
from ..compiler.ir.index import reindex, wrap_index
from ..compiler.ir.lift import Lift
from ..compiler.ir.unliftable import Unliftable
from ..compiler.ir.views import VIEWS
from .partition import REDUCTIONS, Group, Partition, is_view, reduced_dims

aten = torch.ops.aten
MAX_NODES = 4000  # of one expression: beyond, printing and compiling it take seconds
MAX_NESTS = 8  # of one kernel
SMALL = 4096  # elements that torch goes through in a microsecond, a third of what its call takes
_NARROW = (torch.int32, torch.int16, torch.int8, torch.uint8)
_MAY_WRAP = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar, aten.mul.Tensor, aten.mul.Scalar, aten.neg.default, aten.abs.default, aten.pow.Tensor_Scalar, aten.square.default}


class NoNest(Exception):
    """A group that is no nest; ``nodes``: those that must leave it."""

    def __init__(self, nodes, reason: str):
        super().__init__(reason)
        self.nodes = set(nodes)


def find_regions(gm: GraphModule, device: str = "cpu") -> list[ir.Region]:
    """The regions of a graph that are worth a kernel, in graph order."""
    outside: set[Node] = set()
    memo: dict = {}
    while True:  # a node that turns out to have no expression stays a call, and the partition is made again without it
        partition = Partition(gm, outside, device)
        regions, refused = _regions(partition, gm, memo)
        if not refused:
            return regions
        outside |= refused


def _regions(partition: Partition, gm: GraphModule, memo: dict):
    built, refused, small = [], set(), []
    for group in partition.groups():
        outputs = _outputs(partition, group)
        if not outputs or not _worth(group, outputs):
            small += [(group, outputs)] if outputs and partition.device == "cpu" and _is_small(outputs) else []
            continue
        try:
            built.append((group, _lifted(partition, gm, group, outputs, memo)))
        except NoNest as problem:
            refused |= problem.nodes or set(group.nodes)
    if refused:
        return [], refused
    parts = dict(built)
    bundles = partition.siblings(list(parts), lambda g: {n for n in parts[g].inputs if is_tensor(n) and value(n).dim() > 1}, MAX_NESTS)
    for group, outputs in small:
        host = next((b for b in bundles if len(b) < MAX_NESTS and partition.may_bundle(b[0], group)), None)
        try:
            if host is not None:
                parts[group] = _lifted(partition, gm, group, outputs, memo)
                partition.bundle(host[0], group)
                host.append(group)
        except NoNest:  # it stays a call
            pass
    return [_bundle([parts[g] for g in bundle]) for bundle in bundles], set()


def _is_small(outputs) -> bool:
    """A single operation on few elements, of which torch's call would take most of the time: it goes along in another's kernel, and its launch costs nothing."""
    return all(n.target is not aten.lift_fresh_copy.default and (count := sympy.Mul(*shape(n))).is_Integer and count <= SMALL and all((size_ := sympy.Mul(*shape(a))).is_Integer and size_ <= SMALL for a in n.all_input_nodes if n.target in REDUCTIONS) for n in outputs)


def _outputs(partition, group) -> list[Node]:
    """The nodes of a group that something outside reads, views looked through."""
    inside = set(group.nodes)

    def leaves(node):
        return any(leaves(user) if is_view(user) else user not in inside and not (user in partition.free and user in partition.computed) for user in node.users)

    return [node for node in group.nodes if leaves(node) and (node not in partition.free or node is group.nodes[-1])]


def _worth(group: Group, outputs) -> bool:
    """More than one pass over memory becomes one."""
    return len(group.nodes) - sum(n.target is aten.lift_fresh_copy.default for n in group.nodes) >= 2


# ---------------------------------------------------------------- lifting a group


class _Inside(Lift):
    """Lifts within a group; what lies beyond its border is a capture, its reductions are symbols."""

    def __init__(self, ranges, nodes: set[Node], free: set[Node], space: _Space):
        super().__init__(ranges)
        self.nodes, self.free, self.space = nodes, free, space
        self.reductions: dict[Node, ir.Reduction] = {}
        self.checks: list[tuple] = []

    def _lift(self, node, index):
        if is_view(node) and node not in self.space.opaque:
            before = sum(e.count(sc.mod) + e.count(sc.floordiv) for e in map(sympy.sympify, index))
            source, inner = VIEWS[node.target](self, node, index)
            if node.op == "call_function" and (source in self.nodes or source in self.free or is_view(source) or sum(e.count(sc.mod) + e.count(sc.floordiv) for e in map(sympy.sympify, inner)) <= before):
                return self.at(source, inner)
            raise Unliftable("a view whose index is simpler than its source's")
        if node.op == "get_attr":
            return super()._lift(node, index)
        if node not in self.nodes and node not in self.free:
            raise Unliftable("beyond the group's border")
        if node.target in REDUCTIONS:
            return self._reduction(node, index)
        return self._in_its_dtype(super()._lift(node, index), value(node).dtype, node)

    def cast(self, e, dtype):
        return self._in_its_dtype(super().cast(e, torch.int64 if dtype in _NARROW else dtype), dtype)

    @staticmethod
    def _in_its_dtype(e, dtype, node=None):
        """Expressions of integers are of any size; those of data wrap where their dtype does, and become floats where torch makes them floats."""
        if not sc.is_int(e) or not e.has(sc.load) or isinstance(e, sc.load) and node is not None and not dtype.is_floating_point:
            return e
        if dtype.is_floating_point:
            return sc.fmul(Integer(1), e)
        if dtype not in _NARROW or node is not None and node.target not in _MAY_WRAP:
            return e
        bits = torch.iinfo(dtype).bits
        return sc.mod(e, Integer(2**bits)) if dtype == torch.uint8 else sc.mod(e + 2**(bits - 1), Integer(2**bits)) - 2**(bits - 1)

    def _reduction(self, node, index):
        inner, rows = self.space.of_reduction(node)
        if [sympy.expand(a - b) for a, b in zip(rows, index)] != [0] * len(rows):
            raise NoNest({node}, "a reduction is read at another row than it is computed in")
        if node not in self.reductions:
            x = self.at(node.args[0], inner)
            x = sc.select(x, Integer(1), Integer(0)) if sc.is_bool(x) else x
            used = {r.symbol: r.level for r in self.reductions.values()}
            level = 1 + max((used[s] for s in x.free_symbols if s in used), default=0)
            self.reductions[node] = ir.Reduction(Symbol(f"r{len(self.reductions)}", real=True), REDUCTIONS[node.target], x, level)
        result = self.reductions[node].symbol
        if node.target in (aten.mean.dim, aten.mean.default):
            count = sympy.Mul(*(shape(node.args[0])[d] for d in reduced_dims(node)))
            result = sc.div(result, count)
        return result

    def data_index(self, position, n, wraps: bool):
        """A position read from data: checked by the kernel, and kept inside the tensor until then."""
        self.checks.append((position, -n if wraps else Integer(0), n))
        position = wrap_index(position, n, self.ranges) if wraps else position
        return sc.minimum(sc.maximum(position, Integer(0)), n - 1)


class _Space:
    """The index space of a group: symbols of its rows and columns, and where its nodes are read in it."""

    def __init__(self, group: Group, outputs: list[Node]):
        self.opaque: set[Node] = set()
        reductions = [n for n in group.nodes if n.target in REDUCTIONS]
        bases = [n.args[0] for n in reductions] or [n for n in outputs if sympy.Mul(*shape(n)) == group.full] or outputs
        base = max(bases, key=lambda n: sum(s != 1 for s in shape(n)))
        self.base = shape(base)
        columns = set(reduced_dims(reductions[bases.index(base)])) if reductions else set()
        symbols = [Symbol(f"x{k}", integer=True, nonnegative=True) for k in range(len(self.base))]
        self.index = [Integer(0) if n == 1 else x for x, n in zip(symbols, self.base)]
        self.rows = [(x, n) for k, (x, n) in enumerate(zip(symbols, self.base)) if n != 1 and k not in columns]
        self.columns = [(x, n) for k, (x, n) in enumerate(zip(symbols, self.base)) if n != 1 and k in columns]
        self.ranges = {x: (Integer(0), n - 1) for x, n in zip(symbols, self.base)}
        self.row_base = [Integer(1) if k in columns else n for k, n in enumerate(self.base)]
        self.row_index = [Integer(0) if k in columns else e for k, e in enumerate(self.index)]
        self.has_rows = bool(reductions)
        self.row_symbols, self.column_symbols = ({x for x, _ in part} for part in (self.rows, self.columns))

    def full(self, node) -> list:
        """The index of a node that runs over the whole space."""
        return reindex(self.index, shape(node), self.base, self.ranges)

    def row(self, node) -> list:
        """The index of a node with one element a row."""
        return reindex(self.row_index, shape(node), self.row_base, self.ranges)

    def of_reduction(self, node) -> tuple[list, list]:
        """(index of its input, index of its result) in this space."""
        source = node.args[0]
        inner = reindex(self.index, shape(source), self.base, self.ranges)
        dims = reduced_dims(node)
        for d, e in enumerate(inner):
            symbols = sympy.sympify(e).free_symbols
            if symbols & (self.row_symbols if d in dims else self.column_symbols):
                raise NoNest({node}, "reductions over different dims")
        keep = bool(argument(node, 2, "keepdim", False)) and node.target not in (aten.sum.default, aten.mean.default)
        return inner, [Integer(0) if d in dims else e for d, e in enumerate(inner) if keep or d not in dims]


def _lifted(partition, gm, group: Group, outputs: list[Node], memo: dict) -> ir.Region:
    if partition.copied & _through_views(group.nodes):
        raise NoNest(set(outputs), "reads a copy of a tensor that is written in place")
    key, leaves = _signature(partition, group, outputs)
    if key not in memo:
        memo[key] = _body(partition, group, outputs, leaves)
    body, used = memo[key]
    numbers = _symbol_nodes(gm, body.sizes)
    return ir.Region(body, [leaves[k] for k in used] + numbers, outputs, set(group.nodes))


def _body(partition, group, outputs, leaves) -> tuple[ir.Body, list[int]]:
    """The body of one group, and which leaves its captures are."""
    space = _Space(group, outputs)
    inside = set(group.nodes)
    lift = _Inside(space.ranges, inside, partition.free & (partition.computed | {n for n in partition.free if is_view(n)}), space)
    written = []
    try:
        for k, node in enumerate(outputs):
            is_row = space.has_rows and sympy.Mul(*shape(node)) != group.full
            index = space.row(node) if is_row else space.full(node)
            expr = lift.at(node, index)
            if any(isinstance(e, (sc.mod, sc.floordiv)) or e.has(sc.mod, sc.floordiv) for e in index):
                raise NoNest({node}, "a result that is no reshape of the others")
            written.append(ir.Output(k, tuple(index), expr, is_row))
    except Unliftable as problem:
        raise NoNest({node}, str(problem)) from None
    if inner := inside & lift.captures.keys():
        raise NoNest(inner, "has no expression")
    if lift.dots:
        raise NoNest(set(outputs), "a contraction")
    everything = [*(o.expr for o in written), *(r.expr for r in lift.reductions.values())]
    read = set().union(*map(sc.loads, everything))  # a row may lift an operand on trial, at an index that leaves it (cat's parts), and again where it may be read: memory outside is nobody's to check
    checks = [c for c in lift.checks if read.issuperset(sc.loads(c[0]))]
    everything += [c[0] for c in checks]
    if sum(map(_size, everything)) > MAX_NODES:
        raise NoNest(_latest(group), "too long an expression")
    used = {e.args[0] for x in everything for e in sc.loads(x)}
    inputs = [node for node, symbol in lift.captures.items() if symbol in used]
    place = {n: k for k, n in enumerate(leaves)}
    if beyond := {n for n in inputs if n not in place}:
        raise NoNest(beyond & partition.computed or set(outputs), "reads a tensor beyond its leaves")
    names = {lift.captures[n]: sc.capture_symbol(k, not value(n).dtype.is_floating_point) for k, n in enumerate(inputs)}
    for o in written:
        dtype = value(outputs[o.number]).dtype
        if sc.is_bool(o.expr) and dtype != torch.bool:
            raise NoNest({outputs[o.number]}, "a condition stored as a number")
    tensors = tuple(_tensor(n) for n in inputs), tuple(_tensor(n) for n in outputs)
    known = set(space.ranges) | {r.symbol for r in lift.reductions.values()}
    free = set().union(*(x.free_symbols for x in everything)) - known - set(lift.captures.values())
    extents = [n for _, n in (*space.rows, *space.columns)] + [e for t in (*tensors[0], *tensors[1]) for e in (*t.sizes, *t.strides)] + [e for o in written for e in o.index]
    sizes = (free | set().union(*(sympy.sympify(e).free_symbols for e in extents))) - known
    rename = lambda x: x.xreplace(names)  # noqa: E731
    nest = ir.Nest(tuple(space.rows), tuple(space.columns), tuple(dataclasses.replace(r, expr=rename(r.expr)) for r in lift.reductions.values()),
                   tuple(dataclasses.replace(o, expr=rename(o.expr)) for o in written))
    checks = tuple(ir.Check(0, rename(e), low, high) for e, low, high in checks)
    return ir.Body((nest,), *tensors, tuple(sorted(sizes, key=str)), checks, len(group.nodes)), [place[n] for n in inputs]


def _through_views(nodes):
    """The views that nodes read, and those that these are of."""
    found, stack = set(), [a for n in nodes for a in n.all_input_nodes]
    while stack:
        a = stack.pop()
        if is_view(a) and a not in found:
            found.add(a)
            stack += a.all_input_nodes
    return found


def _latest(group):
    """The later half of a group: what leaves it when it is too large."""
    return set(group.nodes[-1:])


def _tensor(node) -> ir.Tensor:
    known = value(node)
    return ir.Tensor(known.dtype, tuple(size(n) for n in known.shape), tuple(size(n) for n in known.stride()))


def _size(e) -> int:
    seen, stack = set(), [e]
    while stack:
        x = stack.pop()
        if x not in seen:
            seen.add(x)
            stack += x.args
    return len(seen)


def _symbol_nodes(gm, sizes) -> list[Node]:
    """The graph's integer inputs that hold these shape symbols."""
    if not sizes:
        return []
    known = {}
    for node in gm.graph.nodes:
        v = node.meta.get("val")
        if isinstance(v, torch.SymInt) and v.node.expr.is_Symbol:
            known.setdefault(v.node.expr, node)
    missing = [s for s in sizes if s not in known]
    if missing:
        raise NoNest(set(), f"no input holds the size {missing[0]}")
    return [known[s] for s in sizes]


def _signature(partition, group, outputs) -> tuple[tuple, list[Node]]:
    """(what tells this group's body from another's, its leaves in the order they are met)."""
    number: dict[Node, int] = {}
    leaves: list[Node] = []
    rows = []
    inside = set(group.nodes)

    def visit(node):
        if node in number:
            return
        v = node.meta.get("val")
        through = node in inside or node in partition.free or is_view(node) or not is_tensor(node) and node.op == "call_function"
        if through:
            for a in node.all_input_nodes:
                visit(a)
        number[node] = len(number)
        described = (v.dtype, *map(str, v.shape), "/", *map(str, v.stride())) if isinstance(v, torch.Tensor) else (str(v),)
        if through:
            args = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{number[n]}")
            rows.append((str(node.target), _frozen(args), described, node in outputs, node in inside))
        else:
            rows.append(("leaf", described, node.meta.get("is_weight", False)))
        if is_tensor(node) and (not through or is_view(node)):  # a view is a leaf too: where its own index is simpler
            leaves.append(node)

    for node in group.nodes:
        visit(node)
    return (tuple(rows), tuple(number[n] for n in outputs)), leaves


def _frozen(x):
    if isinstance(x, (list, tuple)):
        return tuple(map(_frozen, x))
    if isinstance(x, dict):
        return tuple((k, _frozen(v)) for k, v in x.items())
    return x if isinstance(x, (int, float, str, bool, type(None))) and x == x else str(x)


# ---------------------------------------------------------------- bundling


def _bundle(parts: list[ir.Region]) -> ir.Region:
    """Independent nests as one kernel: captures that are the same node are the same input."""
    if len(parts) == 1:
        return parts[0]
    tensors: list[Node] = []
    sizes = sorted({s for p in parts for s in p.body.sizes}, key=str)
    nests, checks, numbers, outputs = [], [], {}, []
    for part in parts:
        own = part.inputs[:len(part.body.inputs)]
        numbers |= dict(zip(part.body.sizes, part.inputs[len(own):]))
        for n in own:
            if n not in tensors:
                tensors.append(n)
        names = {sc.capture_symbol(k, integer): sc.capture_symbol(tensors.index(n), integer) for k, n in enumerate(own) for integer in [not value(n).dtype.is_floating_point]}
        rename = lambda x, names=names: x.xreplace(names)  # noqa: E731
        for nest in part.body.nests:
            nests.append(dataclasses.replace(nest, reductions=tuple(dataclasses.replace(r, expr=rename(r.expr)) for r in nest.reductions),
                                             outputs=tuple(dataclasses.replace(o, expr=rename(o.expr), number=o.number + len(outputs)) for o in nest.outputs)))
        checks += [dataclasses.replace(c, nest=len(nests) - 1, index=rename(c.index)) for c in part.body.checks]
        outputs += part.outputs
    body = ir.Body(tuple(nests), tuple(_tensor(n) for n in tensors), tuple(_tensor(n) for n in outputs), tuple(sizes), tuple(checks), sum(p.body.ops for p in parts))
    return ir.Region(body, [*tensors, *(numbers[s] for s in sizes)], outputs, set().union(*(p.nodes for p in parts)))
