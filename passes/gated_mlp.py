"""gated_mlp: act(x Wg^T + bg) * (x Wu^T + bu), with any pointwise act  ->  tileweld::linear, one pass over x, nothing between in memory

The value of the product at (row, column) is lifted down to the two accumulators, so that SwiGLU, GeGLU (erf or tanh), ReGLU, GLU and
gpt-oss's clamped (up + 1) * gate * sigmoid(1.702 gate) are one case:

    epilogue  a0*sigmoid(a0)*a1             for silu, with a0 = gate, a1 = up, biases as captures

Gate and up may be two linears of the same x, or two column slices of one packed linear (Phi-3, GLM: halves; gpt-oss: even and odd
columns): the weights are then slices of the packed one, views and no copies.

Legality, each with a test that must be refused or left alone:
- both products have the same x and as many columns;       - neither gate, up nor a value between is read elsewhere;
- no dropout in training between;                          - nothing is written in place that the op reads.
Half types: the op computes in float32 and rounds once. It is more precise than eager; where a half intermediate of eager's
overflows to inf, the op's result may be finite.

Cost for M rows, K inputs, N columns: 4 M N K FLOPs before and after. Eager writes 3 M N elements and reads 4 M N between the
matmuls and the product, the op writes M N.
"""
from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from ..compiler.ir.linear_build import described, longest, match, sweep, weights_text
from ..compiler.ir.graph import is_call, op_name, source_of, value
from ..compiler.ir.lift import aten
from ..compiler.ir.products import Product, Writes, products
from ..compiler.ir.rewrite import Match, Refusal, Refused
from ..compiler.ir.streams import is_size, joins
from .merge import reaching_output

NAME = "gated_mlp"


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every gated product of the graph, as a Match, or as a Refusal where gate and up meet but cannot be fused."""
    found, _ = products(graph)
    writes, outside = Writes(graph), reaching_output(graph)
    by_source: dict[Node, dict[Node, Product]] = {}
    siblings_of = {product: by_source.setdefault(product.source, {}) for product in found.values()}  # now: a match replaces what later products read
    for product, siblings in siblings_of.items():
        siblings[product.node] = product
    taken: set[Node] = set()
    for product in found.values():
        if product.node in taken:
            continue
        siblings = {n: p for n, p in siblings_of[product].items() if n not in taken and n is not product.node}
        reasons: list = []
        output = longest(product.node, product, siblings, _is_gated, reasons)
        if output is not None:
            taken |= {p.node for p in output.stream.products}
            try:
                yield match([output], f"gate+up {weights_text([output])}, {described(output)}", writes, outside)
            except Refused as refused:
                yield refused.refusal
            sweep(graph, [output])
        elif (refusal := _near_miss(product, found, taken)) is not None:
            yield refusal


def _is_gated(output) -> bool:
    return len(output.epilogue.accumulators) > 1


def _near_miss(product: Product, found: dict[Node, Product], taken: set[Node]) -> Refusal | None:
    """Where a function of a product is multiplied by a later product of the same width: why the two were not fused."""
    dtype, chain = value(product.node).dtype, [product.node]
    while len(chain) < 9:
        users = [u for u in chain[-1].users if not is_size(u)]
        for user in users:
            up = next((p for a in user.all_input_nodes if a is not chain[-1] and (p := _product_behind(a, found, dtype))), None) if is_call(user, aten.mul.Tensor) else None
            if up is None or up.node in taken or up.width != product.width or not product.node < up.node:
                continue
            if up.source is not product.source:
                return Refusal(f"gate and up are matmuls of different tensors, {product.source} and {up.source}", user)
            reader = next((u for n in (*chain, up.node) for u in n.users if u not in chain and u is not user and not is_size(u) and (u.op == "output" or not joins(u, dtype))), None)
            if reader is None:
                return Refusal("the way from gate and up to their product has no scalar expression", user)
            where = source_of(reader)
            return Refusal(f"gate or up is also used elsewhere, by {op_name(reader)}" + (f" ({where})" if where else ""), user, "keep the product alone")
        following = next((u for u in users if joins(u, dtype) or is_call(u, aten.dropout.default)), None)
        if following is None:
            return None
        chain.append(following)
    return None


def _product_behind(node: Node, found: dict[Node, Product], dtype) -> Product | None:
    for _ in range(4):
        if node in found:
            return found[node]
        if not joins(node, dtype) or not isinstance(node.args[0], Node):
            return None
        node = node.args[0]
    return None
