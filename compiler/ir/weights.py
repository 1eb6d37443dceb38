"""What of a graph depends on weights alone, so that it can be computed once and not at every call.

A captured placeholder has meta["is_static"] if it is a parameter, or a tensor that Dynamo knows to stay where it is (a module's buffer). What is
computed from such alone, by operations that give the same every time, is constant between two changes of the weights. In inference
compiler/folded.py keeps it; a pass may therefore write `W + B @ A` or `quantize_rows(W)` as ordinary operations.
"""
from __future__ import annotations

import torch
from torch.fx import Graph, Node

from .graph import computed_from, is_tensor

_CHANGING = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def is_pure(node: Node) -> bool:
    """A call of an ATen or tileweld operation that writes nothing, draws nothing, and gives strided tensors of static shapes, the same every time."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims", "tileweld") or target._schema.is_mutable:
        return False
    if _CHANGING & set(target.tags) or target._schema.name.split("::")[1].startswith(("empty", "new_empty")):
        return False
    known = node.meta.get("val")
    known = known if isinstance(known, (list, tuple)) else [known]
    return bool(known) and all(isinstance(x, torch.Tensor) and x.layout is torch.strided and all(isinstance(n, int) for n in (*x.shape, *x.stride())) for x in known)


def is_getitem(node: Node) -> bool:
    """One of the tensors that a call returns as a list."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem" and is_tensor(node)


def is_weight_input(node: Node) -> bool:
    """A placeholder that holds a parameter, or a buffer of a module, that this graph does not write to."""
    if node.op != "placeholder" or not is_tensor(node) or not (node.meta.get("is_static") or node.meta.get("is_weight")):
        return False
    return not any(getattr(getattr(user.target, "_schema", None), "is_mutable", False) and user.args and user.args[0] is node for user in node.users)


def is_constant(node) -> bool:
    """A weight, or computed from weights (at least one) alone."""
    if not isinstance(node, Node):
        return False
    weights, stack, seen = 0, [node], set()
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.op == "placeholder":
            if not is_weight_input(n):
                return False
            weights += 1
        elif not (is_pure(n) or is_getitem(n)):
            return False  # without walking the rest of the graph
        stack.extend(n.all_input_nodes)
    return weights > 0


def constants(graph: Graph) -> set[Node]:
    """The nodes of a graph for which `is_constant` holds, and those that depend on nothing at all, in one sweep; none in a graph that trains."""
    if why_trained(graph, ()) is not None:
        return set()
    found: set[Node] = set()
    for node in graph.nodes:
        if is_weight_input(node) or (is_pure(node) or is_getitem(node)) and all(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def is_int8(node: Node) -> bool:
    """A weight that a module holds in int8, through views and casts: written `dequantize_rows(q, scale)`, and never to be kept as floats."""
    while isinstance(node, Node) and node.op == "call_function" and str(node.target) != "tileweld.dequantize_rows.default":
        node = next(iter(node.all_input_nodes), None)
    return isinstance(node, Node) and node.op == "call_function"


def why_trained(graph: Graph, nodes) -> str | None:
    """Why these values may not be computed ahead: a gradient is wanted of this graph. None in inference."""
    if not torch.is_grad_enabled():
        return None
    for n in (n for node in nodes for n in sorted(computed_from(node))):
        if n.op == "placeholder" and n.meta.get("requires_grad", False):
            return f"{n.meta.get('label') or n.name} is trained: a gradient is wanted of it"
    trained = next((n for n in graph.nodes if n.op == "placeholder" and n.meta.get("requires_grad", False)), None)
    return f"the graph is trained (of {trained.meta.get('label') or trained.name} a gradient is wanted), and nothing is kept between the calls of a graph that is" if trained is not None else None
