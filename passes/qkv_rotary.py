"""qkv_rotary: q, k and v of one x, with rotary on what has it  ->  one tileweld::linear, x read once, rotary in the epilogue

Linears of one x become one op with an output for each; a packed projection that is read through column slices (Phi-3's qkv) is
the same with slices of its weight. Every output takes along what follows it and is its own alone: rotary in either form,

    half-split    q[t, d] cos[t, d] + (-q[t, d + D/2] if d < D/2 else q[t, d - D/2]) sin[t, d]        (Llama, NeoX)
    interleaved   the partner of column 2 d is 2 d + 1                                                (GPT-J, Cohere)

partial rotary (the rest of a head passes through), scaling of the angles or of cos and sin (NTK, YaRN, attention scaling), tables
of any broadcastable layout, and biases. Nothing is matched by spelling: the rotated tensor is lifted to elements of the linear,
and the partner of a column is read off from their distance (compiler/ir/columns.py). Su et al., 2104.09864. The output is viewed as
[B, T, H, D] and permuted as the model had it, which moves no memory. Where there is no rotary (BERT, T5), or where the norm of q and
k stands between (Qwen 3), the linears are merged all the same; complex_product has written complex rotary in real numbers.

A projection that packs q, k and v head by head ([heads, 3, dim]: GPT-NeoX) stays one output, whose text says what each column gets (compiler/ir/linear_packed.py):
no weight is copied. Behind views of the columns ([heads + 2, dim]: Falcon) the parts are slices again. Without rotary (BLOOM) nothing is gained, and it is one linear.

Legality, each with a test that must be refused or left alone:
- one x, one dtype; every merged linear stands before the next matmul of another tensor (cross-attention keys of all decoder
  layers read one x, and computing them at once would keep them all);
- a rotated tensor whose raw form is read elsewhere keeps its rotary outside, the linear is merged;
- no input of an output is computed from another output;   - nothing is written in place that the op reads.

Cost for M rows and N columns in all: the FLOPs of the linears before and after; eager reads x three times and, for rotary in five
passes over q and k, reads 7 and writes 5 M N; the op writes M N.
"""
from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from ..compiler.ir.linear_build import Output, longest, match, sweep, weights_text
from ..compiler.ir.linear_packed import cannot_pack
from ..compiler.ir.products import Product, Writes, products
from ..compiler.ir.rewrite import Match, Refusal, Refused
from ..compiler.ir.streams import packed_starts, piece_starts
from .merge import reaching_output

NAME = "qkv_rotary"


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every group of linears of one x, as a Match, or as a Refusal where merging them would be wrong."""
    found, _ = products(graph)
    writes, outside = Writes(graph), reaching_output(graph)
    for group in _groups(list(found.values())):
        outputs = [o for product in group for o in _outputs(product)]
        if len(outputs) < 2:
            continue
        try:
            found = match(outputs, _detail(outputs), writes, outside)
        except Refused:  # one takes another in as a capture (a gate that was not fused): each without what follows it
            outputs = [o for product in group if (o := longest(product.node, product, None, lambda o: o.epilogue.is_plain)) is not None]
            try:
                found = match(outputs, _detail(outputs), writes, outside)
            except Refused as refused:
                yield refused.refusal
                continue
        yield found
        sweep(graph, outputs)


def _groups(found: list[Product]) -> list[list[Product]]:
    """Products of one x and dtype, split where a product of another x stands between."""
    groups: list[list[Product]] = []
    for product in found:
        if groups and groups[-1][-1].source is product.source and groups[-1][-1].x.meta["val"].dtype == product.x.meta["val"].dtype:
            groups[-1].append(product)
        else:
            groups.append([product])
    return groups


def _outputs(product: Product) -> list[Output]:
    """The streams of a product: one, or one a piece where it is packed and every piece is a slice of columns that has an epilogue."""
    starts: list[Node] | None = piece_starts(product)
    if starts:
        pieces = [longest(start, product) for start in starts]
        if all(pieces):
            return pieces
    whole = longest(product.node, product)
    if whole is not None and whole.stream.root is not product.node:  # neighbours that rotary pairs are read through slices as well
        return [whole]
    starts = packed_starts(product)
    if starts:
        pieces = [longest(start, product, packed=True) for start in starts]
        if all(pieces) and (not any(o.epilogue.is_packed for o in pieces) or _is_one_text(pieces)):
            return pieces
    return [whole] if whole is not None else []


def _is_one_text(pieces: list[Output]) -> bool:
    """Are these all the parts of every head, and does one of them do more than the product alone?"""
    if not all(o.epilogue.is_packed and len(o.epilogue.accumulators) == 1 for o in pieces) or all(o.epilogue.is_plain for o in pieces):
        return False
    return cannot_pack([(o.epilogue.accumulators[0], o.epilogue.pair, o.epilogue.expr) for o in pieces]) is None


def _detail(outputs: list[Output]) -> str:
    pairs = [o.epilogue.pair for o in outputs if o.epilogue.pair != (0, 0)]
    if not pairs:
        return f"{weights_text(outputs)}, no rotary"
    block, half = pairs[0]
    form = "interleaved" if (block, half) == (2, 1) else f"half-split, {2 * half} of {block}" if 2 * half < block else f"half-split over {block}"
    return f"{weights_text(outputs)}, rotary on {len(pairs)} of {len(outputs)} ({form})"
