"""What else reads a projection whose product with another constant is to be one matrix: other rows of it, as views, which get a projection of their own.

    q = W_Q x [H (P + R), m],  q_nope = q[..., :P],  q_pe = q[..., P:]        ->        x [W_Q,nope W_UK],  q_pe = W_Q,pe x        W_Q,pe the rows h (P + R) + P + e of W_Q

DeepSeek writes the part of the queries that meets the latent and the part with rotary as one projection. Materialising the product of its first part with W_UK saves nothing unless the rest is computed alone; the rows
are views of a constant, gathered once (compiler/folded.py).
"""
from __future__ import annotations

import dataclasses

import sympy
from sympy import Integer, Symbol
from torch.fx import Graph, Node

from . import scalar as sc
from .association_trace import E, Factor, weight_view
from .graph import aten, insert, op_name, shape
from .layout import arrange, layout, sizes_of_nodes
from .lift import Lift
from .products import Product, product_of
from .unliftable import Unliftable
from .views import VIEWS


@dataclasses.dataclass(frozen=True)
class Rest:
    """A view of some rows of a projection. index: of its element in the projection's result, over `symbols`, one a dim; heads, length: of the rows."""

    node: Node
    product: Product
    factor: Factor  # row over sc.H and E
    symbols: tuple
    index: tuple
    head: Symbol | None
    place: Symbol
    heads: int
    length: int


def rest(node: Node, factor: Factor) -> Rest | None:
    """A node as a view of rows of the projection factor.node, None where it is something else."""
    product = product_of(factor.node)
    if not isinstance(product, Product) or factor.bias is not None or factor.node.target is aten.addmm.default:
        return None
    sizes = shape(node)
    symbols = tuple(Integer(0) if n == 1 else Symbol(f"z{k}", integer=True, nonnegative=True) for k, n in enumerate(sizes))
    lift, current, index = Lift({z: (Integer(0), n - 1) for z, n in zip(symbols, sizes) if z != 0}), node, list(symbols)
    try:
        while current is not factor.node:
            if current.op != "call_function" or current.target not in VIEWS:
                return None
            current, index = VIEWS[current.target](lift, current, index)
    except Unliftable:
        return None
    row = sympy.expand(index[-1])
    found = sorted(row.free_symbols, key=str)
    place = next((z for z in found if row.coeff(z) == 1), None)
    others = [z for z in found if z != place]
    if place is None or len(others) > 1 or any(isinstance(e, sympy.Basic) and e.free_symbols & set(found) for e in index[:-1]):
        return None
    extent = {z: n for z, n in zip(symbols, sizes)}
    head = others[0] if others else None
    if not extent[place].is_Integer or head is not None and not extent[head].is_Integer:
        return None
    row = row.xreplace({place: E, **({head: sc.H} if head is not None else {})})
    return Rest(node, product, dataclasses.replace(factor, row=row), symbols, tuple(index), head, place, int(extent[head]) if head is not None else 1, int(extent[place]))


def build(graph: Graph, r: Rest) -> Node:
    """The same elements from a projection of these rows alone."""
    rows = weight_view(graph, r.factor, r.heads, r.length)
    rows = insert(graph, aten.reshape.default, rows, [r.heads * r.length, int(shape(rows)[-1])])
    y = insert(graph, aten.linear.default, r.product.x, rows)
    sizes = {z: n for z, n in zip(r.symbols, shape(r.node)) if z != 0}
    dims = layout(r.factor.node, [*r.index[:-1], Integer(0)], sizes)
    if dims is None:
        raise Unliftable(f"the layout of {r.node}, shape {[*shape(r.node)]}, mixes rows of the projection")
    dims[-1] = [z for z in (r.head, r.place) if z is not None]
    wanted = [[z] if z != 0 else [] for z in r.symbols]
    return arrange(graph, y, dims, wanted, sizes, sizes_of_nodes([r.factor.node, r.product.x]))


def barrier(keys, values, free) -> tuple | None:
    """(reason, node, cure) where keys that differ by head come from the latent of the values through something that is no product."""
    latents = {p.node for p in values if free(p)} | {p.factor.node for p in values if free(p)}
    for p in keys:
        if free(p) or p.zero or not p.by_head():
            continue
        stack, seen = [p.node], set()
        while stack and len(seen) < 60:
            n = stack.pop()
            if n in latents:
                return (f"{op_name(p.node)} stands between the latent and the keys of every head, so that their product with the queries cannot be taken in another order",
                        p.node, "norms of keys and rotary belong on a part of the key that all heads share, as in DeepSeek's k_pe")
            if n not in seen:
                seen.add(n)
                stack.extend(n.all_input_nodes)
    return None
