"""Keys that are joined from two tensors only to be read by attention are not joined: the kernel reads both.

    attention(q, view(cat([latent, k_pe], -1)), v)   ->   attention_parts(q, [view(latent), view(k_pe)], v)

For a cache of C positions and an absorbed head dim of 512 + 64 in float32, the copy reads and writes 4.7 MB at C = 2048: as long as the attention itself takes.

It is made where the copy is all that is saved and nothing is lost: the larger part lies in memory anyway (an input, a call's result, or something
that others read too), attention alone reads the joined tensor, nobody writes to a part between the two, and every part keeps the head dim
as its last dim through the views between. Rotary's own cat of two computed halves is none of these, and stays.
"""
from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from ..codegen.liveness import Liveness, is_inplace
from ..codegen.partition import computes
from .ir import attention_parts as _op  # noqa: F401 (registers the op)
from .ir.graph import aten, insert, is_call, is_tensor, value

PARTS = 2  # what the kernels are generated for


def separate_keys(gm: GraphModule) -> None:
    """Apply the rewrite everywhere in a graph behind AOT."""
    live = None
    for node in list(gm.graph.nodes):
        if not is_call(node, torch.ops.tileweld.attention.default) or not (join := _join(node)):
            continue
        live = live or Liveness(gm.graph)
        if _pays(join[-1], node) and not _written_between(gm.graph, live, join[-1], node):
            live = None  # lines change
            _rewrite(gm.graph, node, join)
    gm.graph.eliminate_dead_code()


def _join(attention: Node) -> list[Node] | None:
    """The views from attention's k back to a cat along the head dim, and that cat; None for any other k."""
    node, path = attention.args[1], []
    while _is_row_view(node):
        path.append(node)
        node = node.args[0]
    if not is_call(node, aten.cat.default):
        return None
    tensors, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    rank = value(node).dim()
    if dim % rank != rank - 1 or len(tensors) != PARTS:
        return None
    if any(value(x).dim() != rank or value(x).dtype != value(node).dtype or not isinstance(value(x).shape[-1], int) for x in tensors):
        return None
    return [*path, node]


def _is_row_view(node) -> bool:
    """A view that leaves rows along the last dim whole, and does the same to a narrower tensor."""
    if not isinstance(node, Node) or not is_tensor(node) or not node.args:
        return False
    rank = value(node).dim()
    if is_call(node, aten.unsqueeze.default):
        return node.args[1] % rank != rank - 1
    if is_call(node, aten.squeeze.dim):
        return node.args[1] % (rank + 1) != rank
    if is_call(node, aten.transpose.int):
        return all(d % rank != rank - 1 for d in node.args[1:3])
    if is_call(node, aten.permute.default):
        return node.args[1][-1] % rank == rank - 1
    if is_call(node, aten.slice.Tensor):
        return len(node.args) > 1 and node.args[1] % rank != rank - 1
    return False


def _pays(cat: Node, attention: Node) -> bool:
    """Is the larger part in memory whether or not it is joined?"""
    readers = [cat]
    while readers:  # attention alone may read the joined tensor, through views
        node = readers.pop()
        for user in node.users:
            if user is attention:
                continue
            if not _is_row_view(user):
                return False
            readers.append(user)
    if attention in cat.users and attention.args[2] is cat:
        return False
    large = max(cat.args[0], key=lambda x: value(x).shape[-1])
    if len(large.users) > 1:
        return True
    while large.op == "call_function" and large.args and isinstance(large.args[0], Node) and _is_any_view(large):
        large = large.args[0]
        if len(large.users) > 1:
            return True
    return not computes(large, value(large).device.type)


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
