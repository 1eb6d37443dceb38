"""row_gather: an operand of attention whose elements are columns of one linear, moved, repeated, and zeros  ->  a linear of the gathered rows; off unless options ask: {"passes": {"row_gather": True}}

    q[b, h, t, e] = y[b, t, r(h, e)] or 0,  y = x W^T + b     ->     q = view(x W'^T + b'),  W'[h D + e] = W[r(h, e)] or 0

Overlapping heads (MOHSA, 2410.14874: [last p columns of Q_(i-1), Q_i, first p of Q_(i+1)]) become attention over heads of d + 2p with nothing in between. What r is comes from running the
slices, cats and pads once on the numbers of the columns. W' is a cat of slices of W, kept and watched by compiler/folded.py.

Legality, each with a test that must be refused:
- between the linear and attention are only moves: views, slices, cats, padding with zeros;      - they give every token its own columns, the same for all;
- sizes are numbers;      - nobody else reads what lies between;      - no gradient is wanted, and kept values are not turned off.
Off by default, since it exchanges moves for products: a column that is taken twice costs 2 K FLOPs a token, where a move is a read and a write.

Cost: 2 M K (N' - N) FLOPs more, M (N' + N) elements not moved, (N' - N) K numbers of memory.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from ..compiler.ir.graph import argument, insert, is_call, is_tensor, value
from ..compiler.ir.products import Product, products
from ..compiler.ir.rewrite import Match, Refusal
from ..compiler.ir.views import VIEWS
from ..compiler.ir.weights import is_constant, why_trained

NAME = "row_gather"
OPTION = "fold_weights"
DEFAULT = False
aten = torch.ops.aten
PADS = (aten.constant_pad_nd.default, aten.pad.default)
MOST = 1 << 20  # elements of an operand that is run on numbers


def find(graph: Graph, fold: bool = True) -> Iterator[Match | Refusal]:
    """Every operand of a fused attention that is made of one linear by moves that are more than a view."""
    known, _ = products(graph)
    for node in list(graph.nodes):
        if not is_call(node, torch.ops.tileweld.attention.default):
            continue
        for operand in dict.fromkeys(node.args[:3]):
            if (found := _moves(operand, known)) is None:
                continue
            product, inside = found
            reader = next((n for n in inside if n is not operand for u in n.users if u not in inside and not is_call(u, aten.sym_size.int)), None)
            sources = [product.weight, *([product.bias] if product.bias is not None else [])]
            runs = None
            if reason := why_trained(graph, sources):
                refusal = f"the rows stay where they are: {reason}"
            elif not fold:
                refusal = "fold_weights is off: the rows would be gathered at every call"
            elif reader is not None:
                refusal = "a part of what is moved is also read elsewhere"
            elif not all(isinstance(n, int) for m in (*inside, product.node) for n in value(m).shape):
                refusal = "a size is no number"
            elif value(operand).numel() > MOST or (runs := _runs(operand, product, inside)) is None:
                refusal = "what is between the linear and attention is no move of columns, the same for every token"
            if runs is None:
                yield Refusal(refusal, operand)
                continue
            yield Match(operand, tuple(dict.fromkeys([product.x, *sources])), lambda graph, operand=operand, product=product, runs=runs: _build(graph, operand, product, runs), f"{product.width} -> {value(operand).shape[1] * value(operand).shape[3]} columns")


def _moves(operand: Node, known: dict[Node, Product]) -> tuple[Product, set[Node]] | None:
    """(the one product that an operand is moved from, the nodes that move it); None if there are others, or views alone."""
    found, inside, stack, cats = set(), set(), [operand], False
    while stack:
        n = stack.pop()
        if n in inside or n in found or is_call(n, aten.full.default) and n.args[1] == 0:  # how canonicalise writes zeros
            continue
        if n in known:
            found.add(n)
            continue
        if n.op != "call_function" or not (n.target in VIEWS or is_call(n, aten.cat.default, *PADS)):
            return None
        cats |= is_call(n, aten.cat.default, *PADS)
        inside.add(n)
        stack += [a for a in n.all_input_nodes if is_tensor(a)]
    if len(found) != 1 or not cats:
        return None
    product = known[found.pop()]
    return (product, inside) if is_constant(product.weight) and (product.bias is None or is_constant(product.bias)) else None


def _runs(operand: Node, product: Product, inside: set[Node]) -> list[tuple[int | None, int]] | None:
    """The rows as (first, how many) in order, first None for zeros; None where they are not the same for every token. The moves are run on 1 + the number of each element."""
    batch, heads, tokens, width = value(operand).shape
    columns = product.width
    if value(product.node).numel() != batch * tokens * columns or operand.op == "placeholder":
        return None
    made = {product.node: (1 + torch.arange(batch * tokens * columns)).view(tuple(value(product.node).shape))}

    def of(n):
        if n not in made:
            made[n] = torch.zeros(tuple(value(n).shape), dtype=torch.int64)  # the others are zeros by `_moves`
        return made[n]

    for n in sorted(inside):
        args, kwargs = torch.fx.node.map_arg((n.args, dict(n.kwargs)), lambda a: of(a) if is_tensor(a) else value(a))
        if is_call(n, *PADS):
            mode, filled = (argument(n, 2, "mode", "constant"), argument(n, 3, "value")) if is_call(n, aten.pad.default) else ("constant", argument(n, 2, "value"))
            if mode != "constant" or filled not in (None, 0):
                return None
            args, kwargs = args[:2], {}
        made[n] = n.target(*args, **kwargs)
    moved = made[operand].permute(0, 2, 1, 3).reshape(batch * tokens, heads * width)
    first = torch.arange(batch * tokens)[:, None] * columns
    rows = torch.where(moved == 0, -1, moved - 1 - first)
    if not torch.equal(rows, rows[:1].expand_as(rows)) or rows.numel() and int(rows.max()) >= columns or bool((rows < -1).any()):
        return None
    runs: list[list] = []
    for row in rows[0].tolist():
        row = None if row < 0 else row
        if runs and (row is None and runs[-1][0] is None or row is not None and runs[-1][0] is not None and runs[-1][0] + runs[-1][1] == row):
            runs[-1][1] += 1
        else:
            runs.append([row, 1])
    return [(first, count) for first, count in runs]


def _build(graph: Graph, operand: Node, product: Product, runs: list[tuple[int | None, int]]) -> Node:
    batch, heads, tokens, width = value(operand).shape

    def gathered(x: Node, dim: int) -> Node:
        parts = []
        for first, count in runs:
            if first is None:
                sizes = [*value(x).shape]
                sizes[dim] = count
                parts.append(insert(graph, aten.full.default, sizes, 0.0, dtype=value(x).dtype, device=value(x).device))
            else:
                parts.append(insert(graph, aten.slice.Tensor, x, dim, first, first + count))
        return insert(graph, aten.cat.default, parts, dim)

    weight = gathered(product.weight, 1 if product.transposed else 0)
    if product.transposed:
        weight = insert(graph, aten.permute.default, weight, [1, 0])
    made = insert(graph, aten.linear.default, product.x, weight, *([gathered(product.bias, 0)] if product.bias is not None else []))
    return insert(graph, aten.permute.default, insert(graph, aten.reshape.default, made, [batch, tokens, heads, width]), [0, 2, 1, 3])
