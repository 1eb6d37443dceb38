"""Writes to inputs that AOT made functional, in place again: `new = index_copy(cache, ...); ...; cache.copy_(new)` -> `cache.index_copy_(...)`.

For a KV cache of C positions a step then writes one position where it copied C of them twice. Legality, for a chain
cache -> new_1 -> ... -> new_n -> cache.copy_(new_n) of updates:

- no value of the chain is read after the next update was made (the input itself: until the copy_, from which on it has the last value);
- no update reads the input's memory other than as what it updates, and no other input lies in the same storage and is read in between;
- no value of the chain leaves the graph: a caller would get the input's memory where it got a tensor of its own;
- the input's elements have a place each (no expanded dims), and strides and dtype are those of the functional result.
"""
from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..codegen.liveness import Liveness, is_view
from .ir.graph import aten, is_call, is_tensor, size, value

#: functional update -> the op in place
INPLACE = {
    aten.index_copy.default: aten.index_copy_.default, aten.index_put.default: aten.index_put_.default, aten._unsafe_index_put.default: aten.index_put_.default,
    aten.index_add.default: aten.index_add_.default, aten.index_fill.int_Scalar: aten.index_fill_.int_Scalar, aten.index_fill.int_Tensor: aten.index_fill_.int_Tensor,
    aten.scatter.src: aten.scatter_.src, aten.scatter.value: aten.scatter_.value, aten.scatter_add.default: aten.scatter_add_.default,
    aten.masked_fill.Scalar: aten.masked_fill_.Scalar, aten.masked_fill.Tensor: aten.masked_fill_.Tensor, aten.add.Tensor: aten.add_.Tensor, aten.mul.Tensor: aten.mul_.Tensor,
}
#: update of a view -> the view, of which copy_ writes the elements
SCATTER = {aten.slice_scatter.default: aten.slice.Tensor, aten.select_scatter.default: aten.select.int, aten.diagonal_scatter.default: aten.diagonal.default}


def reinplace(gm: GraphModule) -> int:
    """Rewrite the graph's updates of inputs where that is legal; returns how many became in place."""
    graph, count = gm.graph, 0
    for copy in [n for n in graph.nodes if is_call(n, aten.copy_.default) and n.args[0].op == "placeholder"]:
        again = copy.args[1]
        if isinstance(again, Node) and is_call(again, aten.copy.default) and _same_kind(again, again.args[1]) and len(again.users) == 1:
            copy.args = (copy.args[0], again.args[1])  # a copy of what is copied
            graph.erase_node(again)
        chain, live = _chain(copy), Liveness(graph)
        if chain and _is_legal(copy, chain, live):
            for node in chain:
                _write_in_place(graph, node, live)
            copy.replace_all_uses_with(copy.args[0])
            graph.erase_node(copy)
            count += len(chain)
    if count:
        graph.eliminate_dead_code()
        gm.recompile()
    return count


def _chain(copy: Node) -> list[Node]:
    """The updates from the copied input to the value that is copied back, in order; empty if there is something else on the way."""
    found, node = [], copy.args[1]
    while node is not copy.args[0]:
        if not (isinstance(node, Node) and node.op == "call_function" and (node.target in INPLACE or node.target in SCATTER)):
            return []
        found.append(node)
        node = node.args[0]
    return found[::-1]


def _is_legal(copy: Node, chain: list[Node], live: Liveness) -> bool:
    cache, graph, end = copy.args[0], copy.graph, live.lines[copy]
    if not is_tensor(cache) or any(n != 1 and s == 0 for n, s in zip(value(cache).shape, value(cache).stride())):
        return False
    if any(_layout(n) != _layout(cache) or live.lines[n] > end for n in chain):
        return False
    inputs = {(n, 0) for n in graph.nodes if n.op in ("placeholder", "get_attr") and is_tensor(n) and _storage(n) == _storage(cache)}
    states = [inputs, *({(n, 0)} for n in chain)]
    if any(state & live.leaves for state in states[1:]):
        return False
    if any(live.bases[n] != state for n, state in zip(chain, states[1:])):
        return False
    for node in graph.nodes:
        line = live.lines[node]
        if node.op != "call_function" or node is copy:
            continue
        read = live.read(node)
        for k, update in enumerate(chain):
            if node is update:
                if any(live.bases[a] & set().union(*states) for a in _others(node)):
                    return False  # it reads what it writes
            elif line > live.lines[update] and read & states[k] and not is_view(node) and (k > 0 or line < end):
                return False
        if read & states[0] and node.target is aten.copy_.default and node.args[0] is not cache and live.bases[node.args[0]] & inputs:
            return False  # another input over the same memory is written, too
    return True


def _others(node: Node) -> list[Node]:
    """The arguments of an update aside from what it updates; the same node may be both."""
    found: list[Node] = []
    map_arg((node.args[1:], node.kwargs), found.append)
    return found


def _layout(node: Node):
    known = value(node)
    return known.dtype, known.device, [size(s) for s in (*known.shape, *known.stride())]


def _storage(node: Node) -> int | None:
    return value(node).untyped_storage()._cdata if value(node).layout is torch.strided else None


def _write_in_place(graph: Graph, node: Node, live: Liveness) -> None:
    """What read node reads the input from now on."""
    if node.target in INPLACE:
        node.target = INPLACE[node.target]
        return
    base, new, *where = node.args
    if is_call(new, aten.copy.default) and _same_kind(new, new.args[1]) and not live.bases[new.args[1]] & live.bases[new.args[0]]:
        new = new.args[1]  # copy(view, new) is new where nothing is to be converted, and new is not the input's own elements
    with graph.inserting_before(node):
        view = graph.call_function(SCATTER[node.target], (base, *where), dict(node.kwargs))
        view.meta["val"] = SCATTER[node.target](*map_arg((value(base), *where), value), **map_arg(dict(node.kwargs), value))
        written = graph.call_function(aten.copy_.default, (view, new))
        written.meta["val"] = view.meta["val"]
    node.replace_all_uses_with(base)  # all of them come later, and find the new elements there
    graph.erase_node(node)


def _same_kind(a: Node, b) -> bool:
    return is_tensor(b) and value(a).dtype == value(b).dtype and [size(s) for s in value(a).shape] == [size(s) for s in value(b).shape]
