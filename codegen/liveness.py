"""Which values of a lowered graph lie in which memory, and from which line to which that memory is read.

A *base* is a piece of memory: an input, a constant, the result of a call. A value may lie in several (a call that is not known may
return any of its arguments), and a base lives until the last reader of any value in it. What leaves the graph, or may, has no end.
"""
from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch.fx import Graph, Node

from ..compiler.ir.graph import is_tensor, value
from ..compiler.ir.lowered import Buffer, is_getitem, is_launch
from .spelling import COPY, ELEMENTWISE, OUT

aten = torch.ops.aten
_HIDDEN_VIEWS = frozenset({aten._unsafe_view.default, aten.lift_fresh.default, aten.view.default, aten.reshape.default, aten.contiguous.default})

Base = tuple[Node, int]


@dataclass(eq=False)
class Planned:
    """A buffer that the executable provides: for output ``number`` of a launch, or of a call that takes ``out=`` (0)."""

    node: Node  # the value's node: a launch's getitem (or the launch, if nobody reads that output), or the call
    base: Base
    buffer: Buffer
    first: int
    last: int | None = None  # None: it leaves the graph, and is allocated anew every call
    storage: Planned | None = None  # of which it takes the memory over; None: its own

    @property
    def home(self) -> Planned:
        """The buffer whose memory it lies in."""
        return self if self.storage is None else self.storage.home


class Liveness:
    """bases: value -> memory; planned: buffers by base; last_use: the line after which the Python variable of a value is not read."""

    def __init__(self, graph: Graph):
        self.lines = {node: k for k, node in enumerate(graph.nodes)}
        self.bases: dict[Node, frozenset[Base]] = {}
        self.last_use = {node: max((self.lines[u] for u in node.users), default=self.lines[node]) for node in graph.nodes}
        self.readers: dict[Base, int] = {}  # the last line on which a base is read
        self.leaves: set[Base] = set()
        self.written: set[Base] = set()
        for node in graph.nodes:
            self._visit(node)
        self.planned: dict[Base, Planned] = {}
        entry = symbols_of(graph)
        for node in graph.nodes:
            self._plan(node, entry)
        self._take_over()

    def _visit(self, node: Node) -> None:
        line, read = self.lines[node], self.read(node)
        for base in read:
            self.readers[base] = max(self.readers.get(base, 0), line)
        if node.op == "output":
            self.leaves |= read
            self.bases[node] = read
        elif is_launch(node):
            self.bases[node] = frozenset((node, k) for k in range(len(node.target.buffers)))
            for base in self.bases[node]:
                self.readers[base] = line
        elif is_getitem(node) and is_launch(node.args[0]):
            self.bases[node] = frozenset({(node.args[0], node.args[1])})
        else:
            self.bases[node] = aliased(node, self.bases) or frozenset({(node, 0)})
            for base in self.bases[node]:
                self.readers.setdefault(base, line)
            if is_inplace(node):
                self.written |= self.bases[node]

    def read(self, node: Node) -> frozenset[Base]:
        """The memory that a call reads."""
        if is_getitem(node) and is_launch(node.args[0]):
            return frozenset()
        return frozenset().union(*(self.bases[a] for a in node.all_input_nodes))

    def _plan(self, node: Node, entry: set[sympy.Symbol]) -> None:
        if is_launch(node):
            found = {u.args[1]: u for u in reversed(node.users) if is_getitem(u)}
            for k, buffer in enumerate(node.target.buffers):
                self._add(found.get(k, node), (node, k), buffer)
        elif has_out(node) and Buffer(value(node)).symbols <= entry:
            self._add(node, (node, 0), Buffer(value(node)))

    def _add(self, node: Node, base: Base, buffer: Buffer) -> None:
        self.planned[base] = Planned(node, base, buffer, self.lines[base[0]], None if base in self.leaves else self.readers[base])

    def _take_over(self) -> None:
        """A result takes the memory of an argument that dies with the call, where the kernel reads an element once and then writes it."""
        for (node, k), planned in self.planned.items():
            for x in inplace_arguments(node, k):
                homes = {b: self.planned[b].home if b in self.planned else None for a in node.all_input_nodes for b in self.bases[a]}
                source = self.planned.get(next(iter(self.bases[x])))
                if len(self.bases[x]) > 1 or source is None or source.home.last != planned.first or not _same_place(source, x, planned):
                    continue
                if any(homes[b] is source.home for a in node.all_input_nodes if a is not x for b in self.bases[a]):
                    continue  # another argument looks at the same memory
                if any(p.storage is not None and p.home is source.home for p in self.planned.values() if p.base[0] is node):
                    continue  # another output has it already
                planned.storage = source.home
                source.home.last = planned.last
                break


def _same_place(source: Planned, x: Node, planned: Planned) -> bool:
    """Is element n of x's memory where element n of the result's would be, for all of the buffer?"""
    own, new, whole = Buffer(value(x)), planned.buffer, source.home.buffer
    if (own.sizes, own.strides, own.dtype, own.device) != (new.sizes, new.strides, new.dtype, new.device) or whole.dtype != new.dtype:
        return False
    if (whole.sizes, whole.strides) == (new.sizes, new.strides):
        return True
    # a view of it in another shape: both from front to back, as many elements; a result that leaves should be no view
    return planned.last is not None and is_dense(whole) and is_dense(new) and sympy.expand(sympy.prod(whole.sizes) - sympy.prod(new.sizes)) == 0


def is_dense(buffer: Buffer) -> bool:
    """Contiguous, from front to back."""
    expected = sympy.Integer(1)
    for n, stride in zip(reversed(buffer.sizes), reversed(buffer.strides)):
        if n != 1 and sympy.expand(stride - expected) != 0:
            return False
        expected *= n
    return True


def inplace_arguments(node: Node, output: int) -> list[Node]:
    """The arguments whose memory output number ``output`` may take over when nobody reads them afterwards."""
    if is_launch(node):
        return [node.args[0][i] for o, i in node.target.inplace if o == output and node.args[0].count(node.args[0][i]) == 1]
    return [a for a in node.args if is_tensor(a)] if node.target in ELEMENTWISE else []


def has_out(node: Node) -> bool:
    """Can the call write into a buffer of ours?"""
    if not is_tensor(node) or value(node).layout is not torch.strided or value(node).is_complex() or value(node).dim() == 0:
        return False
    if any(stride == 0 and n != 1 for n, stride in zip(value(node).shape, value(node).stride())):
        return False
    if node.target in COPY:
        return value(node).device == value(node.args[0]).device
    return node.target in OUT and all(value(a).dim() > 0 or node.target is not aten.where.self for a in node.all_input_nodes if is_tensor(a))


def is_inplace(node: Node) -> bool:
    """Does the call write to an argument?"""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def aliased(node: Node, bases: dict[Node, frozenset[Base]]) -> frozenset[Base]:
    """The memory of arguments that the result of a call may lie in; empty if it certainly has its own."""
    target, tensors = node.target, node.all_input_nodes
    if node.op in ("placeholder", "get_attr") or not tensors:
        return frozenset()
    everything = frozenset().union(*(bases[a] for a in tensors))
    if is_getitem(node):
        return bases[node.args[0]]
    if isinstance(target, torch._ops.OpOverload):
        if target in _HIDDEN_VIEWS or not is_inplace(node) and _shares(node):  # what writes in place returns what it has written, as its schema says
            return everything
        sets = frozenset().union(*(r.alias_info.before_set | r.alias_info.after_set for r in target._schema.returns if r.alias_info is not None))
        named = [x for argument, x in arguments(node) if argument.alias_info is not None and ("*" in sets or argument.alias_info.before_set & sets)]
        return frozenset().union(*(bases[a] for x in named for a in tensors if a is x or (isinstance(x, (list, tuple)) and a in x))) if named else everything if sets else frozenset()
    return everything if _has_tensor(value(node)) else frozenset()


def arguments(node: Node) -> list[tuple]:
    """(schema argument, what was given for it) of a call of an overload."""
    schema = node.target._schema.arguments
    return [*zip(schema, node.args), *((a, node.kwargs[a.name]) for a in schema if a.name in node.kwargs)]


def _shares(node: Node) -> bool:
    """Do the fake values say that the result lies in an argument's memory?"""
    def storages(x):
        return {t.untyped_storage()._cdata for t in (x if isinstance(x, (list, tuple)) else [x]) if isinstance(t, torch.Tensor) and t.layout is torch.strided}

    return any(storages(value(node)) & storages(value(a)) for a in node.all_input_nodes)


def _has_tensor(x) -> bool:
    return x is None or isinstance(x, torch.Tensor) or (isinstance(x, (list, tuple)) and any(map(_has_tensor, x)))


def is_view(node: Node) -> bool:
    """An ATen call that makes a tensor over its first argument's memory and touches none: it can be made once for all calls."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten" or not is_tensor(node) or is_inplace(node):
        return False
    views = any(r.alias_info is not None for r in node.target._schema.returns) or node.target is aten._unsafe_view.default
    return views and [a for a in node.all_input_nodes if is_tensor(a)] == [node.args[0]] and _shares_surely(node)


def _shares_surely(node: Node) -> bool:
    """ops that alias or copy as it suits them (reshape, contiguous, to) must not be made ahead."""
    return node.target._schema.name.split("::")[1] not in ("reshape", "contiguous", "to", "flatten", "type_as", "lift_fresh")


def symbols_of(graph: Graph) -> set[sympy.Symbol]:
    """Shape symbols that are known when the graph is entered: they are an input, or a size or stride of one."""
    found = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            known = value(node)
            numbers = [known] if isinstance(known, torch.SymInt) else [*known.shape, *known.stride()] if is_tensor(node) and known.layout is torch.strided else []
            found |= {n.node.expr for n in numbers if isinstance(n, torch.SymInt) and n.node.expr.is_Symbol}
    return found
