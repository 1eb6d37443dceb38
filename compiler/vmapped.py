"""torch.vmap in a graph of Dynamo's: its calls between entering the first level and leaving the last, as the plain operations on whole tensors that they come to.

Tensors inside are wrapped, and capture, which traces before dispatch, would take them for constants. Traced behind dispatch they
are resolved. What is traced so is past autograd's composite ops, hence only where no gradient is wanted of it; grad and jvp stay.
"""
from __future__ import annotations

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

_VMAP = frozenset({"lazy_load_decompositions", "_vmap_increment_nesting", "_vmap_decrement_nesting", "_add_batch_dim", "_remove_batch_dim"})


def is_transform(node: Node) -> bool:
    """A call of torch.func's machinery."""
    return "functorch" in getattr(node.target, "__module__", "") or "_functorch" in str(node.target)


def resolve(gm: GraphModule) -> GraphModule:
    """gm with its vmaps resolved, or what is left of it where one cannot be (grad, jvp, a gradient wanted); the nodes carry example values."""
    while (inside := _first_vmap(gm)) is not None:
        resolved = _resolved(gm, inside)
        if resolved is None:
            return gm
        gm = resolved
    return gm


def _first_vmap(gm: GraphModule) -> list[Node] | None:
    """From the first call of the machinery to that which leaves its last level; None where there is none, or another transform."""
    inside, depth = [], 0
    for n in gm.graph.nodes:
        if inside or is_transform(n):
            name = getattr(n.target, "__name__", "") if is_transform(n) else ""
            if is_transform(n) and name not in _VMAP or n.op not in ("call_function", "call_method"):
                return None
            inside.append(n)
            depth += (name == "_vmap_increment_nesting") - (name == "_vmap_decrement_nesting")
            if depth == 0 and name == "_vmap_decrement_nesting":
                return inside
    return None


def _resolved(gm: GraphModule, inside: list[Node]) -> GraphModule | None:
    found = set(inside)
    outer = list(dict.fromkeys(a for n in inside for a in n.all_input_nodes if a not in found))
    results = [n for n in inside if any(u not in found for u in n.users)]
    if not results or not all(map(_is_plain, (*outer, *results))):
        return None
    body = Graph()
    known = {a: body.placeholder(a.name) for a in outer}
    for n in inside:
        known[n] = body.node_copy(n, known.__getitem__)
    body.output(tuple(known[n] for n in results))
    mode = next((n.meta["example_value"].fake_mode for n in (*results, *outer) if isinstance(n.meta["example_value"], FakeTensor)), None)  # Dynamo's own, the backend is given another
    if mode is None:
        return None
    with mode, enable_python_dispatcher():
        traced = make_fx(GraphModule(gm, body))(*(a.meta["example_value"] for a in outer))
    if traced.graph.find_nodes(op="get_attr"):
        return None
    made, copied = GraphModule(gm, Graph()), {}
    made.meta = gm.meta
    for n in gm.graph.nodes:
        if n not in found:
            copied[n] = made.graph.node_copy(n, copied.__getitem__)
        elif n is inside[-1]:
            values = dict(zip(traced.graph.find_nodes(op="placeholder"), (copied[a] for a in outer)))
            for t in traced.graph.nodes:
                if t.op == "output":
                    copied.update(zip(results, (values[r] for r in t.args[0])))
                elif t.op != "placeholder":
                    values[t] = made.graph.node_copy(t, values.__getitem__)
                    values[t].meta = {k: v for k, v in results[-1].meta.items() if k == "stack_trace"} | {"example_value": t.meta.get("val")}
    made.recompile()
    return made


def _is_plain(node: Node) -> bool:
    """A tensor without a gradient that is not wrapped, or a number."""
    known = node.meta.get("example_value")
    return isinstance(known, FakeTensor) and not known.requires_grad and not torch._C._functorch.is_batchedtensor(known) or isinstance(known, (int, float, torch.SymInt))
