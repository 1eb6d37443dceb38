"""add_rms_norm: s = x + residual; y = rms_norm(s), with s used elsewhere too  ->  (s, y) = tileweld::add_rms_norm(x, residual, weight, ...)

The residual stream goes on with s while the norm feeds the next block. It runs after the passes that take norms into the matmuls that read
them and residual additions into the matmuls that make them, and fuses what these leave: norms that feed something else than matmuls
(routers, convolutions, post-norms that are themselves residuals), and graphs where those passes are off.

Cost for N elements: the norm reads s again, 5 N elements moved before (2 reads and 1 write, then 1 and 1), 4 N after (2 reads, 2 writes).
s is rounded to its dtype before the norm reads it, as eager does: the result is eager's bit for bit where the norm's is.

Legality, each with a test that must be refused or left:
- x and residual have the shape of the sum (a broadcast bias is no residual), and the addition has no factor: left in silence;
- s is used elsewhere too; a sum that the norm alone reads needs no second result: left in silence;
- everything else that reads s, or its inputs, allows one place for both, and nothing in between writes in place or changes the grad mode: refused.
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch.fx import Graph, Node

from ..compiler.ir import add_norm as _op  # noqa: F401 (registers the op)
from ..compiler.ir.graph import insert, is_call, shape
from ..compiler.ir.products import Writes
from ..compiler.ir.rewrite import Match, Refusal, Refused

NAME = "add_rms_norm"
aten = torch.ops.aten


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every residual addition with an RMS norm behind it."""
    def call(norm: Node):
        return torch.ops.tileweld.add_rms_norm.default, norm.args[1:]

    yield from sums_with_norms(graph, lambda n: is_call(n, torch.ops.tileweld.rms_norm.default), call)


def sums_with_norms(graph: Graph, is_norm: Callable[[Node], bool], call: Callable[[Node], tuple]) -> Iterator[Match | Refusal]:
    """call(norm) -> (the op, its arguments behind x and residual), for every norm of a residual sum that is used elsewhere too."""
    taken: set[Node] = set()
    writes = Writes(graph)
    for norm in list(graph.nodes):
        if not is_norm(norm) or norm.args[0] in taken or not is_residual_sum(norm.args[0]) or len(norm.args[0].users) < 2:
            continue
        total = norm.args[0]
        op, rest = call(norm)
        inputs = tuple(a for a in (*total.args, *rest) if isinstance(a, Node))
        taken.add(total)
        try:
            yield _match(place(total, norm, inputs, writes, total), total, norm, op, rest, inputs)
        except Refused as refused:
            yield refused.refusal


def place(total: Node, norm: Node, inputs: tuple[Node, ...], writes: Writes, start: Node) -> Node:
    """Where one op can stand for both: at the sum where its inputs are known by then, else at the norm. start: the first node replaced. Raises Refused."""
    if (writer := writes.between(start, norm, inputs)) is not None:
        raise Refused(f"{str(writer.target).removesuffix('.default')} stands between the sum and its norm, and writes what they read or changes the mode of autograd or autocast", norm, "move it before or behind both")
    if all(a < total for a in inputs):
        return total
    if all(norm < user for user in total.users if user is not norm):
        return norm
    raise Refused("the norm's weight is computed after the sum is used elsewhere", norm, "compute the weight before the block")


def is_residual_sum(node) -> bool:
    """x + residual of one shape, without a factor."""
    return is_call(node, aten.add.Tensor) and len(node.args) == 2 and not node.kwargs and all(isinstance(a, Node) and shape(a) == shape(node) for a in node.args)


def _match(first: Node, total: Node, norm: Node, op, rest: tuple, inputs: tuple) -> Match:
    def build(graph: Graph) -> tuple[Node, Node]:
        both = insert(graph, op, *total.args, *rest)
        results = [insert(graph, operator.getitem, both, k) for k in range(2)]
        return tuple(results if first is total else results[::-1])

    also = norm if first is total else total
    return Match(first, tuple(dict.fromkeys(inputs)), build, f"the sum is used {len(total.users)} times", also=(also,))
