"""What a node costs: floating-point operations and bytes moved, as sympy polynomials in the graph's shape symbols.

    matmul    2 M N K of every product: what matrix units do
    vector    the rest: one an element for every pointwise operation, exp and tanh like add; the rows of cost_rows.py say how many
    read      bytes of the inputs, every element once; a broadcast dim (stride 0) is one element, a gathered table the rows that are taken
    written   bytes of the outputs

A view costs nothing. So the bytes are the least that a kernel of its own has to move if nothing is in a cache before it and everything
fits in one after: a lower bound, the same for what runs before and after a fusion. An op without a row has no operations and the bytes
of its inputs and outputs; `is_known` tells.
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

import sympy
import torch
from sympy import Integer
from torch.fx import GraphModule, Node

from .graph import size, value

ZERO = Integer(0)


@dataclasses.dataclass(frozen=True)
class Cost:
    """One kernel: FLOPs (matmul, vector), bytes (read, written), and the dtype of the matmul's operands, which says what peak applies."""

    matmul: sympy.Expr = ZERO
    vector: sympy.Expr = ZERO
    read: sympy.Expr = ZERO
    written: sympy.Expr = ZERO
    dtype: torch.dtype = torch.float32

    @property
    def flops(self) -> sympy.Expr:
        return self.matmul + self.vector

    @property
    def bytes(self) -> sympy.Expr:
        return self.read + self.written

    def at(self, hints: Mapping) -> Cost:
        """The cost with numbers for the shape symbols; a symbol without one (a size that the data decide) stays."""
        return dataclasses.replace(self, **{name: getattr(self, name).subs(hints) for name in ("matmul", "vector", "read", "written") if getattr(self, name).free_symbols})


class Call:
    """A call of an op with fake values for its tensors: ``call["mat1"]`` is an argument by the schema's name.

    Made from a node, or from a node and the arguments that it once had: a node that a pass erased keeps its value and loses its arguments.
    """

    def __init__(self, node: Node, args: tuple | None = None, kwargs: dict | None = None):
        self.node, self.target = node, node.target
        self.nodes = (node.args if args is None else args), (node.kwargs if kwargs is None else kwargs)

    @functools.cached_property
    def arguments(self) -> dict:
        """Name -> fake value; defaults included."""
        args, kwargs = torch.fx.node.map_arg(self.nodes, value)
        schema = self.target._schema.arguments if isinstance(self.target, torch._ops.OpOverload) else ()
        return {a.name: a.default_value for a in schema if a.has_default_value()} | dict(zip(self.names, args)) | dict(kwargs)

    def __getitem__(self, name: str):
        return self.arguments[name]

    @property
    def name(self) -> str:
        """aten::add for aten.add.Tensor and for aten.add_.Tensor."""
        if not isinstance(self.target, torch._ops.OpOverload):
            return getattr(self.target, "__name__", str(self.target))
        schema = self.target._schema
        return schema.name.removesuffix("_") if schema.is_mutable else schema.name

    @functools.cached_property
    def outs(self) -> list[torch.Tensor]:
        return _tensors(value(self.node))

    @property
    def out(self) -> torch.Tensor:
        return self.outs[0]

    @functools.cached_property
    def names(self) -> list[str]:
        """Of the positional arguments."""
        schema = self.target._schema.arguments if isinstance(self.target, torch._ops.OpOverload) else ()
        return [a.name for a in schema] + [str(k) for k in range(len(schema), len(self.nodes[0]))]

    def inputs(self) -> list[tuple[str, torch.Tensor]]:
        """(name of the argument, tensor), the same memory once: x @ x.T reads x once."""
        seen: dict[tuple, tuple[str, torch.Tensor]] = {}
        for name, x in (*zip(self.names, self.nodes[0]), *self.nodes[1].items()):
            for node in _nodes(x):
                origin = behind_views(node)
                for tensor in _tensors(value(node)):
                    seen.setdefault((origin, size(tensor.storage_offset()), stored(tensor)), (name, tensor))
        return list(seen.values())

    @functools.cached_property
    def is_view(self) -> bool:
        """Does it only name memory that is there: is the output's storage that of an input, and nothing written to it?"""
        if not isinstance(self.target, torch._ops.OpOverload) or self.target._schema.is_mutable:
            return False
        if self.name not in _MAY_COPY and any(r.alias_info is not None for r in self.target._schema.returns):
            return True  # behind AOT, a view of a view may have a fake value with memory of its own
        storages = {x.untyped_storage()._cdata for node in _nodes((*self.nodes[0], *self.nodes[1].values())) for x in _tensors(value(node))}
        return bool(self.outs) and all(x.untyped_storage()._cdata in storages for x in self.outs)


def _nodes(x) -> list[Node]:
    if isinstance(x, Node):
        return [x]
    return [n for item in x for n in _nodes(item)] if isinstance(x, (list, tuple)) else []


def behind_views(node: Node, inside: set[Node] | None = None) -> Node:
    """The node whose memory a view names; only as far as the views lie inside, if a set is given."""
    while node.op == "call_function" and (inside is None or node in inside) and node.all_input_nodes and (Call(node).is_view or Call(node).name == "getitem"):
        node = node.all_input_nodes[0]
    return node


#: views where they can, copies where they must
_MAY_COPY = {f"aten::{name}" for name in ("reshape", "reshape_as", "flatten", "to", "contiguous", "type_as", "float", "half", "matrix_H", "dropout")}


def _tensors(x) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for item in x for t in _tensors(item)] if isinstance(x, (list, tuple)) else []


def elements(x: torch.Tensor) -> sympy.Expr:
    """The number of elements of a tensor."""
    return sympy.Mul(*(size(n) for n in x.shape))


def stored(x: torch.Tensor) -> sympy.Expr:
    """Bytes that hold the elements: a dim of stride 0 repeats one."""
    return sympy.Mul(x.element_size(), *(size(n) for n, stride in zip(x.shape, x.stride()) if not (isinstance(stride, int) and stride == 0)))


def hint(n) -> int | None:
    """The size that was seen when the graph was traced; None where only the data decide it."""
    if isinstance(n, int):
        return n
    try:
        return int(n.node.hint)
    except (TypeError, AttributeError, RuntimeError):  # a size that is not known before the graph runs has no hint
        return None


@dataclasses.dataclass(frozen=True)
class Row:
    """How one op is counted: functions of a `Call` to expressions.

    gathers: the argument of which only the output's elements are read; unread: arguments of which no element is (zeros_like).
    free: no kernel at all (empty, a size).
    """

    matmul: Callable[[Call], sympy.Expr] | None = None
    vector: Callable[[Call], sympy.Expr] | None = None
    gathers: str = ""
    unread: tuple[str, ...] = ()
    free: bool = False

    def reads(self, call: Call, name: str, x: torch.Tensor) -> sympy.Expr:
        """Bytes of the argument that the call reads."""
        if name in self.unread:
            return ZERO
        return elements(call.out) * x.element_size() if name == self.gathers else stored(x)


def row_of(call: Call) -> Row:
    """The op's row, that of all pointwise ops, or an empty one."""
    from .cost_rows import POINTWISE, ROWS

    if call.name in ROWS:
        return ROWS[call.name]
    return POINTWISE if isinstance(call.target, torch._ops.OpOverload) and torch.Tag.pointwise in call.target.tags else Row()


def is_known(call: Call) -> bool:
    """Has the op a row of its own, or is it pointwise?"""
    from .cost_rows import ROWS

    return call.name in ROWS or (isinstance(call.target, torch._ops.OpOverload) and torch.Tag.pointwise in call.target.tags)


def is_kernel(call: Call) -> bool:
    """Does the call run something on tensors: no view, no arithmetic of sizes, no choice of one result of several?"""
    if call.node.op != "call_function" or not call.outs or call.name == "getitem":
        return False
    return not row_of(call).free and not call.is_view


def cost(call: Call) -> Cost | None:
    """The cost of a call as a kernel of its own; None where there is no kernel."""
    if not is_kernel(call):
        return None
    row = row_of(call)
    read = sympy.Add(*(row.reads(call, name, x) for name, x in call.inputs()))
    return Cost(*_operations(row, call), read, sympy.Add(*map(stored, call.outs)), _matmul_dtype(call))


def _operations(row: Row, call: Call):
    return tuple(sympy.sympify(f(call)) if f is not None else ZERO for f in (row.matmul, row.vector))


def _matmul_dtype(call: Call) -> torch.dtype:
    return next((x.dtype for _, x in call.inputs() if x.dtype.is_floating_point), torch.float32)


def fused(members: Iterable[Node], outputs: Iterable[Node]) -> Cost:
    """The cost of nodes as one kernel: their operations, the bytes that cross the border.

    A tensor from outside is read once, or, where the inside takes smaller pieces of it, those pieces.
    """
    inside = set(members)
    calls = {node: Call(node) for node in inside}
    read: dict[Node, sympy.Expr] = {}
    operations, dtype = [(ZERO, ZERO)], torch.float32
    for node, call in calls.items():
        if not is_kernel(call):
            continue
        row = row_of(call)
        operations.append(_operations(row, call))
        if row.matmul is not None:
            dtype = _matmul_dtype(call)
        named = {n: name for name, x in reversed([*zip(call.names, node.args), *node.kwargs.items()]) for n in _nodes(x)}
        for source in node.all_input_nodes:
            origin = behind_views(source, inside)
            if origin not in inside:
                origin = behind_views(origin)
                read[origin] = read.get(origin, ZERO) + sympy.Add(*(row.reads(call, named[source], x) for x in _tensors(value(source))))
    whole = {node: sympy.Add(*map(stored, _tensors(value(node)))) for node in read}
    written = sympy.Add(*(stored(x) for node in outputs for x in _tensors(value(node))))
    return Cost(*(sympy.Add(*part) for part in zip(*operations)), sympy.Add(*(_smaller(n, whole[node]) for node, n in read.items())), written, dtype)


def _smaller(a, b):
    """The smaller of two polynomials where that is known, else the second."""
    return a if (b - a).is_nonnegative else b


def hints(graphs: Iterable[GraphModule]) -> dict[sympy.Symbol, int]:
    """Shape symbol -> the size it had when the graphs were traced."""
    found: dict[sympy.Symbol, int] = {}
    for gm in graphs:
        for node in gm.graph.nodes:
            known = value(node)
            for n in (known, *(n for x in _tensors(known) for n in x.shape)):
                if isinstance(n, torch.SymInt) and (symbol := size(n)).is_Symbol and symbol not in found and hint(n) is not None:
                    found[symbol] = hint(n)
    return found
