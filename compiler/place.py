"""Puts what was chosen into the graph: one launch in place of a fused op or a region, and its results in place of theirs.

A region with several roots is launched before the first of them; what it reads is moved up to there, which a convex region allows. In a graph that updates memory in place every reader stays behind the update
that it follows, and before the next (codegen/memory_order.py): a launch takes the place of all that it computes, and what moves up takes along what it must not come before.
"""
from __future__ import annotations

import operator

import sympy
import torch
from torch.fx import GraphModule, Node

from ..codegen.memory_order import memory_order
from .ir.graph import aten, is_tensor, size, value
from .ir.lowered import Launch, is_getitem
from .select import Choice


class CannotPlace(Exception):
    """A kernel has no place in the graph's order; what it was to replace stays."""


class Placer:
    """Replaces nodes of one graph. It follows what was replaced, so that a choice made earlier may name nodes that are gone."""

    def __init__(self, gm: GraphModule):
        self.graph = gm.graph
        self._replaced: dict[Node, Node] = {}
        self._memory = memory_order(gm.graph)

    def current(self, x):
        """The node that now stands for this one; numbers are what they are."""
        while isinstance(x, Node) and x in self._replaced:
            x = self._replaced[x]
        return x

    def put(self, choice: Choice, launch: Launch) -> None:
        """The launch in place of ``choice.outputs``. Raises CannotPlace, and nothing is replaced."""
        inputs, ints, floats = ([self.current(x) for x in row] for row in (choice.inputs, choice.ints, choice.floats))
        order = {node: k for k, node in enumerate(self.graph.nodes)}
        roots = [o.args[0] if is_getitem(o) else o for o in choice.outputs if isinstance(o, Node)]
        first = anchor = min(roots, key=order.__getitem__)
        own, before = {n for n in (*roots, *choice.nodes) if n in order}, self._memory.before(order) if self._memory else {}
        for node, earlier in before.items():  # what one of its own reads is written in front of the first root
            if node not in own and order[node] < order[anchor] and any(x in own for x in earlier):
                anchor = node
        values = [self._source(s, anchor, order) for s in launch.symbols]
        self._move_up([x for x in (*inputs, *ints, *floats, *values) if isinstance(x, Node)], anchor, order, own, roots, before)
        with self.graph.inserting_before(anchor):
            call = self.graph.call_function(launch, (inputs, ints, floats, values))
            call.meta = first.meta | {"val": [value(o) for o in choice.outputs]}
            for k, output in enumerate(choice.outputs):
                if isinstance(output, Node):
                    self._replace(output, self.graph.call_function(operator.getitem, (call, k)))
        if self._memory:
            self._memory.replaced(own, call)
            for node in sorted(own, key=order.__getitem__, reverse=True):  # what is dead reads nothing any more
                for unread in [u for u in node.users if is_getitem(u) and not u.users]:
                    self.graph.erase_node(unread)
                if not node.users:
                    self._memory.forget(node)
                    self.graph.erase_node(node)

    def _replace(self, old: Node, new: Node) -> None:
        new.meta = old.meta | {"name": old.meta.get("name", old.name)}  # what the executable calls it
        for twin in [u for u in old.args[0].users if is_getitem(u) and u.args[1] == old.args[1]] if is_getitem(old) else [old]:
            twin.replace_all_uses_with(new)
            self._replaced[twin] = new

    def _source(self, symbol: sympy.Symbol, anchor: Node, order: dict[Node, int]) -> Node:
        """A node that is the value of a shape symbol: a number of the graph, or a size of an input."""
        earlier = [n for n in self.graph.nodes if order.get(n, -1) < order[anchor]]
        for node in earlier:
            if isinstance(value(node), torch.SymInt) and size(value(node)) == symbol:
                return node
        for node in earlier:
            if node.op == "placeholder" and is_tensor(node):
                for op, row in ((aten.sym_size.int, value(node).shape), (aten.sym_stride.int, value(node).stride())):
                    for d, n in enumerate(row):
                        if isinstance(n, torch.SymInt) and size(n) == symbol:
                            with self.graph.inserting_after([n for n in earlier if n.op == "placeholder"][-1]):
                                made = self.graph.call_function(op, (node, d))
                            made.meta["val"] = n
                            return made
        raise CannotPlace(f"the size {symbol} of an output is not known where it is needed")

    def _move_up(self, needed: list[Node], anchor: Node, order: dict[Node, int], own: set[Node], roots: list[Node], before: dict[Node, list[Node]]) -> None:
        """Every node that the launch needs comes before it, and so does what must be done in memory before them."""
        late, stack = set(), [*needed, *(x for node in own for x in before.get(node, ()))]
        while stack:
            node = stack.pop()
            if order.get(node, -1) >= order[anchor] and node not in late:
                late.add(node)
                stack += [*node.all_input_nodes, *before.get(node, ())]
        if anchor in late or any(n in before or n in roots for n in late & own):  # positions and constants that it computes, too, others may need as they are
            raise CannotPlace("what the kernel reads depends on what it writes, or is written in between")
        for node in sorted(late, key=order.__getitem__):
            anchor.prepend(node)
