"""merge: equal pure nodes become one, and dead ones go; which nodes those are, and which may be told from a copy of themselves."""
from __future__ import annotations

import torch
from torch.fx import Graph, Node

from ..compiler.ir.graph import is_call
from .functionalise import HIDDEN_WRITES, storages, written

aten = torch.ops.aten
_NAMESPACES = ("aten", "prims", "tileweld")  # ops that do what their schema says
_DATA_DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)  # each call brings its own unbacked symbol


def reaching_output(graph: Graph) -> set[Node]:
    """Nodes whose value, or a view of it, is returned, or read by something that looks at layouts."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        opaque = node.op in ("output", "call_module") or node.op == "call_function" and not is_transparent(node)
        for a in node.all_input_nodes:
            if opaque or (node in found and storages(a) & storages(node)):
                found.add(a)
    return found


def is_transparent(node: Node) -> bool:
    """Does a call depend on its arguments' values alone, and not on their strides or on when it runs?"""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", "") in ("_operator", "math", "torch") and node.target is not torch._C._set_grad_enabled
    reads_layout = node.target in (aten.as_strided.default, aten.view.default, aten.view.dtype)
    return node.target.namespace in _NAMESPACES and not reads_layout and not node.target._schema.is_mutable


def is_pure(node: Node) -> bool:
    """Two calls with the same arguments give the same, and a call that nobody reads may go."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or written(node) or node.target in HIDDEN_WRITES:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        random = torch.Tag.nondeterministic_seeded in node.target.tags and not is_inactive_dropout(node)
        return node.target.namespace in _NAMESPACES and not random and len(node.target._schema.returns) > 0
    return getattr(node.target, "__module__", "") in ("_operator", "math") or getattr(node.target, "__name__", "").startswith("sym_")


def merge_equal(graph: Graph, frozen: set[int]) -> None:
    """Equal pure calls become the first of them: the same mask is computed in every layer. Not across a change of grad mode or
    autocast, and not where both leave the graph, since eager returns two tensors."""
    first: dict[object, Node] = {}
    outputs = reaching_output(graph)
    mode = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload) and not is_pure(node):
            mode += 1
        if node.op not in ("call_function", "get_attr") or not is_pure(node) or any(storages(n) & frozen for n in (node, *node.all_input_nodes)):
            continue
        if any(tag in getattr(node.target, "tags", ()) for tag in _DATA_DEPENDENT):
            continue
        key = (mode, node.op, node.target, _key(node.args), _key(node.kwargs))
        kept = first.setdefault(key, node)
        if kept is node or (node in outputs and kept in outputs and node.op != "get_attr"):
            continue
        node.replace_all_uses_with(kept)
        if node in outputs:
            outputs.add(kept)
        graph.erase_node(node)


def _key(x):
    """Hashable, and telling 1 from 1.0 from True and 0.0 from -0.0."""
    if isinstance(x, (list, tuple)):
        return tuple(_key(a) for a in x)
    if isinstance(x, dict):
        return tuple(sorted((k, _key(v)) for k, v in x.items()))
    return x if isinstance(x, Node) else (type(x).__name__, repr(x))


def drop_dead(graph: Graph) -> None:
    for node in reversed(graph.nodes):
        if not node.users and is_pure(node):
            graph.erase_node(node)


def is_inactive_dropout(node: Node) -> bool:
    return is_call(node, aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default) and (node.args[1] == 0 or node.args[2] is False)
