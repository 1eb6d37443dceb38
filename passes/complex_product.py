"""complex_product: a product of complex numbers that are pairs of real ones  ->  the same in real numbers

    view_as_real(view_as_complex(x) z)     ->     stack([x0 c - x1 s, x1 c + x0 s], -1),   c, s = z.real, z.imag

Rotary embedding as Llama's and DeepSeek's own code has it. Written out it is what qkv_rotary takes into a projection, rotary into one op, and what mha_to_gqa and reassociate read; complex numbers have no kernel here.

Rounding: torch's complex product rounds the same two products and their sum.

Legality, each with a test that must be left alone:
- the product is real again at once, and nobody else reads it; both factors are complex of one precision, and what is turned has no other complex use.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from ..compiler.ir.graph import insert, is_call, is_tensor, shape, value
from ..compiler.ir.rewrite import Match

NAME = "complex_product"
aten = torch.ops.aten


def find(graph: Graph) -> Iterator[Match]:
    """Every product of a tensor seen as complex with another complex one."""
    for node in list(graph.nodes):
        if not is_call(node, aten.view_as_real.default) or not is_call(node.args[0], aten.mul.Tensor) or len(node.args[0].users) != 1:
            continue
        product = node.args[0]
        for turned, z in (product.args, product.args[::-1]):
            if is_call(turned, aten.view_as_complex.default) and is_tensor(z) and value(z).dtype == value(product).dtype == value(turned).dtype and shape(turned) == shape(product):
                yield Match(node, (turned.args[0], z if not is_call(z, aten.view_as_complex.default) else z.args[0]), lambda graph, turned=turned, z=z: _build(graph, turned.args[0], z), "pairs of numbers")
                break


def _build(graph: Graph, x: Node, z: Node) -> Node:
    real = z.args[0] if is_call(z, aten.view_as_complex.default) else insert(graph, aten.view_as_real.default, z)
    x0, x1, c, s = (insert(graph, aten.select.int, t, -1, n) for t in (x, real) for n in (0, 1))
    product = lambda a, b: insert(graph, aten.mul.Tensor, a, b)
    return insert(graph, aten.stack.default, [insert(graph, aten.sub.Tensor, product(x0, c), product(x1, s)), insert(graph, aten.add.Tensor, product(x1, c), product(x0, s))], -1)
