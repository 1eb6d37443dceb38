"""linear: a matrix product with a weight and no epilogue but a bias  ->  tileweld::linear, so that few rows get the GEMV kernel

    linear(x, w, b), addmm(b, x, w^T), matmul(x, w^T)     ->     epilogue "a0" or "a0 + c0[j]"

Runs after the passes that fuse more. Where the kernel does not pay, for many rows on most machines, lowering expands the op into
the library's matmul again; a norm that comes before it may still move into its prologue (rms_norm_linear).

Legality, each with a test that must be refused or left alone: the weight is a parameter, a constant or an input, or a view or cast
of one, [N, K] for all of the batch; one float dtype throughout; plain dense tensors.

Cost: 2 M N K FLOPs before and after, the same traffic.
"""
from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph

from ..compiler.ir.linear_build import longest, match, sweep, weights_text
from ..compiler.ir.products import Writes, products
from ..compiler.ir.rewrite import Match, Refusal, Refused
from .merge import reaching_output

NAME = "linear"


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every product with a weight that no other pass took, as a Match, or as a Refusal with what is wrong with its operands."""
    found, problems = products(graph)
    for node, reason in problems.items():
        yield Refusal(f"the matmul stays as it is: {reason}", node)
    writes, outside = Writes(graph), reaching_output(graph)
    for product in found.values():
        output = longest(product.node, product, None, lambda o: o.epilogue.is_plain)
        if output is None:  # its result is read in several places, which is fine: the product alone is a stream without an inside
            continue
        try:
            yield match([output], weights_text([output]) + (" + bias" if product.bias is not None else ""), writes, outside)
        except Refused as refused:
            yield refused.refusal
        sweep(graph, [output])
