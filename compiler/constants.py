"""Parts of a graph that depend on no input: computed at the first call, and kept.

Rotary's inverse frequencies are four calls a step of which nothing ever changes: arange, multiply, power, reciprocal.
"""
from __future__ import annotations

import threading

import torch
from torch.fx import Graph, GraphModule, Node

from ..codegen.liveness import Liveness
from .ir.graph import computed_from, is_tensor, value
from .ir.weights import is_pure

LIMIT = 1 << 16  # elements of a kept tensor: a mask of 256 x 256; what is larger is cheaper to make again than to hold


class Constant:
    """Called without arguments: the value of a small graph without inputs, computed once by torch's own operations."""

    def __init__(self, graph: Graph, name: str):
        self._gm, self._value, self._lock = GraphModule({}, graph), None, threading.Lock()
        self.__name__ = self.__qualname__ = f"constant_{name}"

    def __call__(self) -> torch.Tensor:
        if self._value is None:
            with self._lock, torch.inference_mode(False), torch.no_grad():
                if self._value is None:
                    self._value, self._gm = self._gm(), None  # a graph and the fake tensors at its nodes: 40 KB, a dozen a decoder
        return self._value

    def __deepcopy__(self, memo) -> Constant:  # a copied graph is shown or run with the same value
        return self


def fold_constants(gm: GraphModule) -> int:
    """Replace values that depend on no input; returns how many. A value that leaves the graph or is written to is made anew every call."""
    graph, fixed = gm.graph, set()
    for node in graph.nodes:
        if _is_pure(node) and all(a in fixed for a in node.all_input_nodes):
            fixed.add(node)
    if not fixed:
        return 0
    live, count = Liveness(graph), 0
    for node in [n for n in graph.nodes if n in fixed]:
        outside = [u for u in node.users if u not in fixed]
        if not outside or not _costs(node, fixed) or live.bases[node] & (live.leaves | live.written):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(Constant(_part(node), node.name), ())
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in fixed)
        count += 1
    if count:
        graph.eliminate_dead_code()
        gm.recompile()
    return count


def _is_pure(node: Node) -> bool:
    """A small static tensor of an ATen call, or of a table, that gives the same every time."""
    return is_pure(node) and (node.target.namespace == "aten" or _is_table(node)) and is_tensor(node) and value(node).numel() <= LIMIT


def _is_table(node: Node) -> bool:
    return str(node.target) == "tileweld.table.default"


def _costs(node: Node, fixed: set[Node]) -> bool:
    """More than one call: a lone fill or arange may as well become part of a kernel's index arithmetic. A table is a dozen calls (T5's buckets of 24 tokens: half of its attention's time)."""
    return _is_table(node) or any(a in fixed for a in node.all_input_nodes)


def _part(node: Node) -> Graph:
    """The graph that computes this node alone."""
    needed = computed_from(node)
    made, copies = Graph(), {}
    for n in node.graph.nodes:
        if n in needed:
            copies[n] = made.node_copy(n, copies.__getitem__)
    made.output(copies[node])
    return made
