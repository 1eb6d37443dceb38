"""joint_values: several products of one softmax's weights, each with values of its own  ->  one product with the values side by side

    w v1, w v2     ->     (w [v1 v2])[..., :D1], (w [v1 v2])[..., D1:]

Attention calls that share q and k and differ in v, as differential attention's two halves do: their softmaxes are equal and become one (canonicalise), whose weights are then read twice, and attention would have to refuse.
Scores, softmax and the weights are now computed once, in one kernel whose head dim is the values' together; what it costs is a copy of the values.

Legality, each with a test that must be left alone:
- every reader of the weights is such a product, and the values agree in all dims but the last, and in dtype;
- the values of none depend on the product of another, and nothing between the first product and the last writes, draws random numbers or changes a mode: what makes the later values is moved up;
- no product, nor a view of one, leaves the graph: it would have other strides.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from ..compiler.ir.graph import insert, is_call, is_tensor, shape, value
from ..compiler.ir.rewrite import Match
from ..compiler.ir.softmax import CASTS, softmax_at
from ..compiler.ir.views import VIEWS
from .merge import is_pure, reaching_output

NAME = "joint_values"
aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
WIDEST = 512  # of the values together: as wide as a head may be for the kernels


def find(graph: Graph) -> Iterator[Match]:
    """Every softmax whose weights several products read, and nothing else."""
    order = {node: n for n, node in enumerate(graph.nodes)}
    outputs = reaching_output(graph)
    for softmax in list(graph.nodes):
        if softmax.op != "call_function" or softmax_at(softmax) is None:
            continue
        weights = _weights(softmax)
        products = [u for u in weights.users if not is_call(u, aten.sym_size.int)]
        if len(products) < 2 or not all(_joins(p, products[0], weights) and p not in outputs for p in products):
            continue
        products.sort(key=order.get)
        moved = _to_be_moved(products, order)
        if moved is not None and sum(value(p.args[1]).shape[-1] for p in products) <= WIDEST:
            yield Match(products[0], (weights, *(p.args[1] for p in products)), lambda graph, products=products, moved=moved: _build(graph, products, moved), f"{len(products)} values of one softmax", also=tuple(products[1:]))


def _weights(softmax: Node) -> Node:
    """The node that the products read: behind casts and views that are each the only reader."""
    node = softmax
    while len(node.users) == 1 and is_tensor(reader := next(iter(node.users))) and (reader.target in VIEWS or is_call(reader, *CASTS)) and value(reader).dtype.is_floating_point:
        node = reader
    return node


def _joins(product: Node, first: Node, weights: Node) -> bool:
    if not is_call(product, *PRODUCTS) or product.target is not first.target or product.args[0] is not weights or product.args[1] is weights:
        return False
    v, w = product.args[1], first.args[1]
    return is_tensor(v) and len(shape(v)) >= 2 and isinstance(value(v).shape[-1], int) and shape(v)[:-1] == shape(w)[:-1] and value(v).dtype == value(w).dtype


def _to_be_moved(products: list[Node], order: dict[Node, int]) -> list[Node] | None:
    """What makes the later products' values and stands behind the first product, in order; None where it cannot be moved in front of it."""
    first, last = order[products[0]], order[products[-1]]
    wanted, todo = set(), [p.args[1] for p in products[1:]]
    while todo:
        node = todo.pop()
        if order[node] < first or node in wanted:
            continue
        if node in products:
            return None
        wanted.add(node)
        todo += node.all_input_nodes
    between = [n for n, at in order.items() if first < at < last]
    return sorted(wanted, key=order.get) if all(is_pure(n) for n in between) else None


def _build(graph: Graph, products: list[Node], moved: list[Node]):
    for node in moved:
        products[0].prepend(node)
    values = insert(graph, aten.cat.default, [p.args[1] for p in products], -1)
    together = insert(graph, products[0].target, products[0].args[0], values)
    parts, start = [], 0
    for product in products:
        end = start + value(product).shape[-1]
        parts.append(insert(graph, aten.slice.Tensor, together, -1, start, end))
        start = end
    return tuple(parts)
