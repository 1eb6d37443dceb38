"""The order in which a graph reads and writes memory that it updates in place.

Arguments do not say it: whoever reads a cache in front of an update and whoever reads it behind name the same tensor. Here each reader is tied to the update before it and to the one behind it, and so may move between the two:

    scales_old = index_select(cache, ...)      # before the update: tied to index_copy_ as its successor
    index_copy_(cache, ...)
    scales_new = index_select(cache, ...)      # behind it

A view touches no memory; what reads it does. An op that may copy (reshape, to) reads where it stands.
"""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

from ..compiler.ir.graph import is_tensor, value
from .liveness import Base, Liveness, arguments, is_inplace, is_view


class MemoryOrder:
    """reads, writes: node -> the memory written anywhere in the graph that it reads, or writes. Inputs over one storage are one memory."""

    def __init__(self, graph: Graph):
        live = Liveness(graph)
        of_storage: dict = {}
        self._same: dict[Base, Base] = {}
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr") and is_tensor(node) and value(node).layout is torch.strided:
                self._same[(node, 0)] = of_storage.setdefault(value(node).untyped_storage()._cdata, (node, 0))
        self.bases = {node: frozenset(self._same.get(b, b) for b in found) for node, found in live.bases.items()}
        self.reads: dict[Node, frozenset[Base]] = {}
        self.writes = {node: found for node in graph.nodes if node.op == "call_function" and is_inplace(node) and (found := self._written_by(node))}
        self.written = frozenset(self._same.get(b, b) for b in live.written).union(*self.writes.values())
        for node in graph.nodes:
            if node.op not in ("placeholder", "get_attr") and not is_view(node) and (read := frozenset().union(*(self.bases[a] for a in node.all_input_nodes)) & self.written):
                self.reads[node] = read

    def _written_by(self, node: Node) -> frozenset[Base]:
        """The memory of the arguments that an op writes, whatever it returns."""
        given = [x for argument, x in arguments(node) if argument.alias_info is not None and argument.alias_info.is_write]
        return frozenset().union(*(self.bases[a] for x in given for a in (x if isinstance(x, (list, tuple)) else [x]) if isinstance(a, Node)))

    def copies_quietly(self, node: Node) -> bool:
        """May the node be a copy of such memory, made where it stands, though it renames elements only?"""
        return node in self.reads and bool(self.bases[node] & self.written)

    def before(self, order: dict[Node, int]) -> dict[Node, list[Node]]:
        """node -> the nodes that it must not come before: the last write of what it reads, and the readers since then of what it writes."""
        found: dict[Node, list[Node]] = {}
        last: dict[Base, Node] = {}
        since: dict[Base, list[Node]] = {}
        for node in sorted(self.reads.keys() | self.writes.keys(), key=order.__getitem__):
            writes, tied = self.writes.get(node, frozenset()), found.setdefault(node, [])
            for base in self.reads.get(node, frozenset()) | writes:
                tied += [last[base]] if base in last else []
                if base in writes:
                    tied += since.pop(base, [])
                    last[base] = node
                else:
                    since.setdefault(base, []).append(node)
        return found

    def replaced(self, old: Iterable[Node], new: Node) -> None:
        """``new`` reads what all of ``old`` did."""
        if read := frozenset().union(*(self.reads.get(n, frozenset()) for n in old)):
            self.reads[new] = read

    def forget(self, node: Node) -> None:
        """A node that is gone."""
        self.reads.pop(node, None)
        self.writes.pop(node, None)


def memory_order(graph: Graph) -> MemoryOrder | None:
    """None where nothing is written in place: arguments say it all."""
    return MemoryOrder(graph) if any(n.op == "call_function" and is_inplace(n) for n in graph.nodes) else None
