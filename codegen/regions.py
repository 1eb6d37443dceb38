"""Regions: pointwise ops, casts, cats and views of a graph behind AOT that become one kernel each.

A node joins the region of its users when all of them are in one region; a node that something else reads (a matmul, a
reduction, two regions, the output) is the root of its own. The region's value at an index is lifted (compiler/ir/lift.py) up to
its border, so that rotary's slice, negate, cat, multiply and add are one expression of the loads of q, cos and sin, and views
inside cost nothing.

Regions are formed of float32 nodes with static sizes whose root is dense; anything else stays an ATen call.
"""
from __future__ import annotations

import dataclasses

import sympy
import torch
from sympy import Integer, Symbol
from torch.fx import GraphModule, Node

from ..compiler.ir import scalar as sc
from ..compiler.ir.graph import is_tensor, shape, value
from ..compiler.ir.lift import POINTWISE, ROWS, Lift
from ..compiler.ir.unliftable import Unliftable
from ..compiler.ir.views import VIEWS

aten = torch.ops.aten
#: rows that compute or place values; contractions and gathers stay outside
_PLACING = {aten.cat.default, aten.full.default, aten.arange.default, aten.arange.start, aten.arange.start_step, aten.ones.default, aten.zeros.default, aten.clamp.default,
            aten.silu.default, aten.gelu.default, aten._to_copy.default, aten.to.dtype}
MAX_OPS = 300  # an expression beyond this is two kernels' worth of code; it stays with ATen
READABLE = (torch.float32, torch.bool, torch.int64, torch.int32)


@dataclasses.dataclass
class Region:
    """root = expr(inputs): ``index`` are the symbols of root's dims, inputs are c0, c1, ... of the expression; ``nodes`` is the inside."""

    root: Node
    index: list[Symbol]
    expr: sympy.Expr
    inputs: list[Node]
    nodes: set[Node]


def find_regions(gm: GraphModule) -> list[Region]:
    """The regions of a graph that save at least one pass over memory, in graph order."""
    outside: set[Node] = set()
    while True:  # a node that turns out to have no expression leaves its region, which is then formed again without it
        regions, refused = _partition(gm, outside)
        if not refused:
            order = {node: k for k, node in enumerate(gm.graph.nodes)}
            return sorted(regions, key=lambda r: order[r.root])
        outside |= refused


def _partition(gm: GraphModule, outside: set[Node]) -> tuple[list[Region], set[Node]]:
    root_of: dict[Node, Node] = {}
    for node in reversed(gm.graph.nodes):
        if node in outside or not _joins(node):
            continue
        roots = {root_of.get(user) for user in node.users}
        if len(roots) == 1 and None not in roots:
            root_of[node] = roots.pop()
        elif _computes(node) and _can_be_root(node):
            root_of[node] = node
    members: dict[Node, set[Node]] = {}
    for node, root in root_of.items():
        members.setdefault(root, set()).add(node)
    regions, refused = [], set()
    for root, nodes in members.items():
        if sum(map(_computes, nodes)) >= 2:
            region = _region(root, nodes)
            if isinstance(region, set):
                refused |= region
            else:
                regions.append(region)
    return regions, refused


def _joins(node: Node) -> bool:
    """Can the node be part of a region?"""
    if node.op != "call_function" or not is_tensor(node) or value(node).device.type != "cpu" or not all(isinstance(n, int) for n in value(node).shape):
        return False
    if value(node).dtype not in READABLE or value(node).numel() == 0:
        return False
    return node.target in POINTWISE or node.target in _PLACING or node.target in VIEWS


def _computes(node: Node) -> bool:
    return node.target not in VIEWS


def _can_be_root(node: Node) -> bool:
    """Float32, and dense in some order of its dims: the kernel writes it from front to back."""
    known = value(node)
    if known.dtype != torch.float32 or known.dim() == 0:
        return False
    expected = 1
    for stride, n in sorted(zip(known.stride(), known.shape)):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


class _Inside(Lift):
    """Lifts within a region; what lies beyond its border is a capture."""

    def __init__(self, ranges, nodes):
        super().__init__(ranges)
        self.nodes = nodes

    def _lift(self, node, index):
        if node not in self.nodes:
            raise Unliftable("beyond the region's border")
        return super()._lift(node, index)


def _region(root: Node, nodes: set[Node]) -> Region | set[Node]:
    """The region of these nodes, or those of them that cannot be part of one."""
    index = [Symbol(f"x{k}", integer=True, nonnegative=True) for k in range(len(shape(root)))]
    lift = _Inside({x: (Integer(0), n - 1) for x, n in zip(index, shape(root))}, nodes)
    try:
        expr = lift.at(root, [Integer(0) if n == 1 else x for x, n in zip(index, shape(root))])
    except Unliftable:
        return {root}
    if inner := nodes & lift.captures.keys():
        return inner
    inputs = [node for node, symbol in lift.captures.items() if any(e.args[0] == symbol for e in sc.loads(expr))]
    if any(value(n).dtype not in READABLE or not all(isinstance(s, int) for s in (*value(n).shape, *value(n).stride())) for n in inputs):
        return {root}
    if sc.is_bool(expr) or _size(expr) > MAX_OPS or lift.dots or expr.free_symbols - set(index) - set(lift.captures.values()):
        return {root}
    names = {lift.captures[n]: sc.capture_symbol(k, not value(n).dtype.is_floating_point) for k, n in enumerate(inputs)}
    return Region(root, index, expr.xreplace(names), inputs, nodes)


def _size(e) -> int:
    return 1 + sum(_size(a) for a in e.args)


def kept_dims(node: Node) -> list[int]:
    """Dims of a capture that its loads index: those longer than one."""
    return [d for d, n in enumerate(value(node).shape) if n != 1]


assert all(target in ROWS or target in POINTWISE for target in _PLACING), "every placing op has a lifting row"
