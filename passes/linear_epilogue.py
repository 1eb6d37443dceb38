"""linear_epilogue: a linear and the pointwise chain behind it  ->  tileweld::linear, the chain computed before the result is stored

Activation, residual (x + linear(...)), scale, softcap, gate: the longest chain from the linear in which every value is read inside
alone, lifted to one expression of the accumulator; all else that it reads is a capture with a broadcast index.

    epilogue  "a0 + c0[j] + c1[i, j]"       bias and residual
              "30*tanh(a0/30)"              softcap of the logits

Legality, each with a test that must be refused or left alone:
- the linear's own result is read by the chain alone;                            - no dropout in training in the chain;
- values stay floats of x's dtype or wider: a cast to a narrower dtype or to integers is meant, and ends the chain;
- the chain keeps the rows and columns of the linear: no reduction, no broadcast to more;
- nothing is written in place that the op reads.
Half types: as gated_mlp, more precise than eager.

Cost for M rows, N columns: every op of the chain that joins saves 2 M N elements of traffic, and one launch.
"""
from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from ..compiler.ir.linear_build import Output, described, longest, match, sweep, weights_text
from ..compiler.ir.graph import op_name, source_of, value
from ..compiler.ir.products import Product, Writes, products
from ..compiler.ir.rewrite import Match, Refusal, Refused
from ..compiler.ir.streams import computes, is_size, joins
from .merge import reaching_output

NAME = "linear_epilogue"


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every linear with something to fuse behind it, as a Match, or as a Refusal where its result is also read elsewhere."""
    found, _ = products(graph)
    writes, outside = Writes(graph), reaching_output(graph)
    for product in found.values():
        reasons: list = []
        output = longest(product.node, product, None, _does_more, reasons)
        if output is not None:
            try:
                yield match([output], f"{weights_text([output])}, {described(output)}", writes, outside)
            except Refused as refused:
                yield refused.refusal
            sweep(graph, [output])
        elif (refusal := _escape(product)) is not None:
            yield refusal


def _does_more(output: Output) -> bool:
    return not output.epilogue.is_plain


def _escape(product: Product) -> Refusal | None:
    """A linear whose result one pointwise op reads, and somebody else too."""
    dtype = value(product.node).dtype
    users: list[Node] = [u for u in product.node.users if not is_size(u)]
    fusable = [u for u in users if joins(u, dtype) and computes(u)]
    others = [u for u in users if u not in fusable]
    if not fusable or not others:
        return None
    where = source_of(others[0])
    return Refusal(f"the linear's result is also used elsewhere, by {op_name(others[0])}" + (f" ({where})" if where else ""), fusable[0], "read it in one place")
