"""Gradients that eager does not record become ops: a rewrite sees them, and does not fuse across them.

    with torch.no_grad(): y = f(x)      ->      y = f(stop_gradient(x))
    x.detach()                          ->      stop_gradient(x)

Both only where x carries a gradient. Changes of grad mode then have no meaning left and go: what a rewrite makes of the nodes on
both sides of one would otherwise be differentiated as a whole, a norm's detached variance for example.
"""
from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from .ir import stop_gradient as _op  # noqa: F401 (registers the op)
from .ir.graph import is_call, is_tensor, value

aten = torch.ops.aten
stop_gradient = torch.ops.tileweld.stop_gradient.default


def make_explicit(graph: Graph) -> None:
    """Rewrite a captured graph in place. Placeholders have meta["requires_grad"]; the ambient grad mode is the one it will run in."""
    modes = [n for n in graph.nodes if n.target is torch._C._set_grad_enabled]
    if not torch.is_grad_enabled():
        if not any(n.args[0] for n in modes):  # else gradients are recorded inside only: rare, and left as it is
            _erase(graph, modes)
        return
    carrying: set[Node] = set()
    stopped: dict[Node, Node] = {}
    enabled = True
    for node in list(graph.nodes):
        if is_call(node, *_MAYBE_SELF) and _is_self(node):  # x.float() of a float32 x is x, whatever the grad mode: what reads one reads the other
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "placeholder":
            if node.meta.get("requires_grad", False):
                carrying.add(node)
        elif node in modes:
            enabled = node.args[0]
        elif node.op == "output" or not any(a in carrying for a in node.all_input_nodes):
            continue
        elif node.target is operator.getitem:  # its list was made under the mode that counts
            carrying.add(node)
        elif is_call(node, aten.detach.default):
            node.target = stop_gradient
        elif enabled:
            carrying.add(node)
            if _writes_in_place(node):  # what shares memory with its argument carries a gradient from here on
                carrying.update(n for n in graph.nodes if n < node and is_tensor(n) and _storage(n) == _storage(node.args[0]))
        else:
            _cut(graph, node, carrying, stopped)
    _erase(graph, modes)
    if not enabled:  # the graph leaves another mode behind
        with graph.inserting_before(graph.output_node()):
            graph.call_function(torch._C._set_grad_enabled, (False,))


_MAYBE_SELF = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten.contiguous.default)


def _is_self(node: Node) -> bool:
    """Did the call return its argument itself?"""
    new, old = value(node), value(node.args[0])
    return new.dtype == old.dtype and new.device == old.device and _storage(node) is not None and _storage(node) == _storage(node.args[0])


def _cut(graph: Graph, node: Node, carrying: set[Node], stopped: dict[Node, Node]) -> None:
    """Let a node that runs under no_grad read its arguments without their gradients."""
    target = node.args[0] if _writes_in_place(node) else None
    for a in node.all_input_nodes:
        if a not in carrying or not is_tensor(a) or not (value(a).dtype.is_floating_point or value(a).dtype.is_complex):
            continue
        if a not in stopped:
            with graph.inserting_before(node):
                stopped[a] = new = graph.call_function(stop_gradient, (a,))
            new.meta = {**{k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")}, "val": value(a)}
        node.replace_input_with(a, stopped[a])
    if target in carrying:  # an in-place op returns its argument, which goes on carrying what it carried
        node.replace_all_uses_with(target)


def _writes_in_place(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and len(node.args) > 0 and schema.arguments[0].alias_info is not None and schema.arguments[0].alias_info.is_write


def _storage(node: Node) -> int | None:
    return value(node).untyped_storage()._cdata if value(node).layout is torch.strided else None


def _erase(graph: Graph, nodes: list[Node]) -> None:
    for node in nodes:
        graph.erase_node(node)
