"""Keys that are joined from two tensors only to be read by attention are not joined: the kernel reads both.

    attention(q, view(cat([latent, k_pe], -1)), v)   ->   attention_parts(q, [view(latent), view(k_pe)], v)

For a cache of C positions and an absorbed head dim of 512 + 64 in float32, the copy reads and writes 4.7 MB at C = 2048: as long as the attention itself takes.

It is made where the copy is all that is saved and nothing is lost: the larger part lies in memory anyway (an input, a call's result, or something
that others read too), attention alone reads the joined tensor, nobody writes to a part between the two, and the views between leave the head dim whole. Rotary's own cat of two computed halves is none of these, and stays.
"""
from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from ..codegen.liveness import Liveness, is_inplace
from ..codegen.partition import computes
from .ir import attention_parts as _op  # noqa: F401 (registers the op)
from .ir.graph import argument, aten, insert, is_call, is_tensor, value

PARTS = 2  # what the kernels are generated for


def separate_keys(gm: GraphModule) -> None:
    """Apply the rewrite everywhere in a graph behind AOT."""
    live = None
    for node in list(gm.graph.nodes):
        if not is_call(node, torch.ops.tileweld.attention.default) or not (join := _join(node)):
            continue
        live = live or Liveness(gm.graph)
        if _pays(join[-1]) and not _written_between(gm.graph, live, join[-1], node):
            live = None  # lines change
            _rewrite(gm.graph, node, join)
    gm.graph.eliminate_dead_code()


def _join(attention: Node) -> list[Node] | None:
    """The views from attention's k back to a cat along the head dim, and that cat, each read by the next alone; None for any other k."""
    node, path, dim = attention.args[1], [], 3
    while isinstance(node, Node) and is_tensor(node) and len(node.users) == 1 and not is_call(node, aten.cat.default):
        dim = _dim_before(node, dim)
        if dim is None:
            return None
        path.append(node)
        node = node.args[0]
    if not is_call(node, aten.cat.default) or len(node.users) != 1 or attention.args[2] is attention.args[1]:
        return None
    tensors, rank = node.args[0], value(node).dim()
    if argument(node, 1, "dim", 0) % rank != dim or len(tensors) != PARTS:
        return None
    if any(value(x).dim() != rank or value(x).dtype != value(node).dtype or not isinstance(value(x).shape[dim], int) for x in tensors):
        return None
    return [*path, node]


def _dim_before(view: Node, dim: int) -> int | None:
    """Which dim of a view's input its dim ``dim`` is, whole; None if it is none, or the view is not of those that do the same to a narrower tensor."""
    if view.op != "call_function" or not is_tensor(view.args[0]):  # one of a call's results
        return None
    rank, before = value(view).dim(), value(view.args[0]).dim()
    if is_call(view, aten.permute.default):
        return view.args[1][dim] % rank
    if is_call(view, aten.transpose.int):
        x, y = (d % rank for d in view.args[1:3])
        return y if dim == x else x if dim == y else dim
    if is_call(view, aten.unsqueeze.default):
        at = view.args[1] % rank
        return None if dim == at else dim - (dim > at)
    if is_call(view, aten.squeeze.dim, aten.select.int):
        return dim + (dim >= view.args[1] % before) if before > rank else dim
    if is_call(view, aten.slice.Tensor):
        return None if argument(view, 1, "dim", 0) % rank == dim else dim
    return None


def _pays(cat: Node) -> bool:
    """Is the larger part in memory whether or not it is joined?"""
    dim = argument(cat, 1, "dim", 0)
    large = max(cat.args[0], key=lambda x: value(x).shape[dim])
    while len(large.users) == 1 and large.op == "call_function" and large.args and isinstance(large.args[0], Node) and _is_any_view(large):
        large = large.args[0]
    return len(large.users) > 1 or not computes(large, value(large).device.type)


def _is_any_view(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _written_between(graph: Graph, live: Liveness, cat: Node, attention: Node) -> bool:
    memory = live.read(cat)
    return any(live.lines[cat] < live.lines[n] < live.lines[attention] and is_inplace(n) and live.bases[n] & memory for n in graph.nodes)


def _rewrite(graph: Graph, attention: Node, join: list[Node]) -> None:
    *views, cat = join
    q, _, v, *rest = attention.args
    with graph.inserting_before(attention):
        parts = []
        for part in cat.args[0]:
            for view in reversed(views):
                part = insert(graph, view.target, part, *view.args[1:], **view.kwargs)
            parts.append(part)
        new = graph.call_function(torch.ops.tileweld.attention_parts.default, (q, parts, v, *rest), dict(attention.kwargs))
    new.meta = dict(attention.meta)
    attention.replace_all_uses_with(new)
    graph.erase_node(attention)
