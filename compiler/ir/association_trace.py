"""From an operand of attention back to what it is made of: views, cats and a product with constants, element by element.

    k[b, h, j, d] = sum over l of  c[b, j, l] W[28 h + d, l] + bias[28 h + d]         for d in [0, 16)
    k[b, h, j, d] = k_pe[b, j, d - 16]                                                for d in [16, 24)

`trace` walks from a node at the index (b, h, position, d) through views (compiler/ir/views.py), cats along the head dim and writes into an empty tensor
(Hugging Face's DeepSeek fills one), and splits the head dim where a cat does. It ends at a product with a constant (`Factor`), at a diagonal one (a multiplication by a constant of heads
and head dim), or at whatever else there is: a norm or a rotary embedding is a barrier.
"""
from __future__ import annotations

import dataclasses

import sympy
import torch
from sympy import Integer, Symbol
from torch.fx import Graph, Node

from . import scalar as sc
from .graph import argument, insert, is_call, is_tensor, shape, value
from .layout import arrange, layout
from .lift import Lift
from .products import Product, product_of
from .unliftable import Unliftable
from .views import VIEWS, broadcast_index
from .weights import is_constant

aten = torch.ops.aten
E = Symbol("e", integer=True, nonnegative=True)  # the place within a piece
MAX_STEPS = 64
PADS = (aten.pad.default, aten.constant_pad_nd.default)
CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default)


@dataclasses.dataclass(frozen=True)
class Factor:
    """A constant that a piece was multiplied with.

    matrix: the product with it summed over the last dim of its input, weight[row, l] (stored as [l, row] if transposed), plus bias[row]; else a diagonal, weight[index], index a tuple.
    """

    node: Node
    weight: Node
    row: sympy.Expr | None = None
    index: tuple = ()
    bias: Node | None = None
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the head dim: node[index], times a factor. index: over b, h, the position, and E, the place within the piece (within the summed dim, behind a matrix).

    inside: the nodes between, which nobody needs once the operand is computed another way; places: they and node, with their indices. zero: it is padding.
    """

    start: int
    stop: int
    node: Node
    index: tuple
    factor: Factor | None = None
    inside: tuple[Node, ...] = ()
    places: tuple[tuple[Node, tuple], ...] = ()
    zero: bool = False

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def width(self) -> int:
        """Elements of the last dim of what is read: the latent's size behind a matrix, else `length`."""
        return int(shape(self.node)[-1]) if self.factor is not None and self.factor.row is not None else self.length

    def by_head(self) -> bool:
        """Does what is read differ from head to head?"""
        return any(isinstance(e, sympy.Basic) and e.has(sc.H) for e in self.index)


def trace(node: Node, position: Symbol) -> list[Piece]:
    """The pieces of an operand [B, H, positions, D] of attention, in order. D must be a number. Raises Unliftable where a view has no index arithmetic in the middle of a cat."""
    sizes = shape(node)
    if not sizes[3].is_Integer:
        raise Unliftable("a symbolic head dim")
    ranges = {sc.B: (Integer(0), sizes[0] - 1), sc.H: (Integer(0), sizes[1] - 1), position: (Integer(0), sizes[2] - 1), E: (Integer(0), sizes[3] - 1)}
    index = [Integer(0) if n == 1 and s in (sc.B, sc.H) else s for s, n in zip((sc.B, sc.H, position, E), sizes)]
    return _walk(Lift(ranges), node, index, 0, int(sizes[3]), ())


def _walk(lift: Lift, node: Node, index, start: int, stop: int, inside: tuple[Node, ...]) -> list[Piece]:
    places = [(node, tuple(index))]
    for _ in range(MAX_STEPS):
        target = node.target if node.op == "call_function" else None
        try:
            if target in (aten.cat.default, aten.slice_scatter.default, *PADS):
                parts = _split(lift, node, index) or ()
                found = [piece for source, at, low, high in parts for piece in _part(lift, source, at, low, high, start, (*inside, node))]
                if any(piece.factor is not None or piece.zero for piece in found):  # else a cat like any other: of the halves of a rotated key
                    return found
                if not (len(found) > 1 and len({piece.by_head() for piece in found}) > 1):  # unless only one of its parts differs by head
                    break
                return found
            if (factor := _factor(lift, node, index)) is not None:
                source, at, found = factor
                return [Piece(start, stop, source, tuple(at), found, (*inside, node))]
            if target in VIEWS:
                source, index = VIEWS[target](lift, node, index)
            elif target in CASTS and (value(node).dtype, value(node).device) == (value(node.args[0]).dtype, value(node.args[0]).device):
                source = node.args[0]
            else:
                break
        except Unliftable:
            break
        inside, node = (*inside, node), source
        places.append((node, tuple(index)))
    return [Piece(start, stop, *places[-1], None, inside, tuple(places))]


def _split(lift, node, index) -> list | None:
    """Where a cat or a write splits the head dim: (source, index, first, end) with first and end places of this piece; None where it runs over another dim."""
    extent = int(lift.ranges[E][1]) + 1
    if node.target in PADS:
        how = [argument(node, 2, "mode", "constant"), argument(node, 3, "value")] if node.target is aten.pad.default else ["constant", argument(node, 2, "value", 0)]
        if how[0] != "constant" or how[1] not in (None, 0) or len(node.args[1]) != 2 or node.args[1][0] != 0:
            return None
        dim = len(index) - 1
        spans = [(node.args[0], 0, shape(node.args[0])[dim]), (None, shape(node.args[0])[dim], shape(node)[dim])]
    elif node.target is aten.cat.default:
        dim, spans, total = argument(node, 1, "dim", 0) % len(index), [], Integer(0)
        for source in node.args[0]:
            if len(shape(source)) == len(index):  # torch lets an empty vector through
                spans.append((source, total, total + shape(source)[dim]))
                total += shape(source)[dim]
    else:
        base, source = node.args[:2]
        dim, size = argument(node, 2, "dim", 0) % len(index), shape(node)[argument(node, 2, "dim", 0) % len(index)]
        low, high = (_bound(argument(node, k, name), default, size) for k, name, default in ((3, "start", 0), (4, "end", size)))
        if argument(node, 5, "step", 1) != 1:
            return None
        spans = [(base, 0, low, 0), (source, low, high, low), (base, high, size, 0)]
    offset = sympy.expand(index[dim] - E) if isinstance(index[dim], sympy.Basic) else None
    if offset is None or not offset.is_Integer or not all(sympy.sympify(b).is_Integer for span in spans for b in span[1:3]):
        return None
    parts = []
    for source, low, high, *origin in spans:
        first, end = max(0, int(low) - int(offset)), min(extent, int(high) - int(offset))
        if first < end:
            at = list(index)
            at[dim] = index[dim] - (origin[0] if origin else low)
            parts.append((source, at, first, end))
    return parts


def _bound(x, default, size) -> sympy.Expr:
    if x is None or isinstance(x, int) and x > 1 << 60:
        return sympy.sympify(default)
    if isinstance(x, Node):
        raise Unliftable("a computed bound")
    return sympy.Min(x, size) if x >= 0 else size + x


def _part(lift, source, at, low, high, start, inside) -> list[Piece]:
    if source is None:
        return [Piece(start + low, start + high, inside[-1], (), None, inside, zero=True)]
    inner = Lift({**lift.ranges, E: (Integer(0), Integer(high - low - 1))})
    at = [e.xreplace({E: E + low}) if isinstance(e, sympy.Basic) else e for e in at]
    return _walk(inner, source, at, start + low, start + high, inside)


def _factor(lift, node, index):
    """(input, its index, Factor) of a product with a constant at an element; None for anything else."""
    product = product_of(node)
    if isinstance(product, Product) and is_constant(product.weight) and (product.bias is None or is_constant(product.bias)):
        row = index[-1]
        return product.x, [*broadcast_index(product.x, [*index[:-1], Integer(0)], lift.ranges)[:-1], E], Factor(node, product.weight, row, (), product.bias, product.transposed)
    if is_call(node, aten.mul.Tensor):
        for x, w in (node.args, node.args[::-1]):
            if is_tensor(x) and is_tensor(w) and is_constant(w) and not is_constant(x) and value(x).dtype == value(node).dtype == value(w).dtype:
                return x, broadcast_index(x, index, lift.ranges), Factor(node, w, None, tuple(broadcast_index(w, index, lift.ranges)))
    return None


# ---------------------------------------------------------------- back into the graph


def weight_view(graph: Graph, factor: Factor, heads: int, length: int) -> Node:
    """The constant as [heads, length, L] (heads 1 where all share it), a view of the stored matrix. Raises Unliftable where its rows do not lie regularly."""
    per_head, per_place, first = _coefficients(factor.row)
    weight = factor.weight
    if factor.transposed:
        weight = insert(graph, aten.permute.default, weight, [1, 0])
    return _rows(graph, weight, per_head, per_place, first, heads, length)


def bias_view(graph: Graph, factor: Factor, heads: int, length: int) -> Node:
    """The bias as [heads, length]."""
    return _rows(graph, factor.bias, *_coefficients(factor.row), heads, length)


def diagonal_view(graph: Graph, factor: Factor, by_head: bool, heads: int, length: int) -> Node:
    """A diagonal constant of heads and head dim as [heads, length], or [length]. Raises Unliftable where it is none."""
    sizes = {sc.B: Integer(1), sc.H: Integer(heads), sc.J: Integer(1), E: Integer(length)}
    dims = layout(factor.weight, factor.index, sizes)
    if dims is None or any(a in (sc.B, sc.J) for dim in dims for a in dim):
        raise Unliftable("a constant factor of the keys that is not one of heads and head dim")
    return arrange(graph, factor.weight, dims, [[sc.H], [E]] if by_head else [[E]], sizes, [])


def _rows(graph, x, per_head, per_place, first, heads, length) -> Node:
    rows, rest = int(shape(x)[0]), [int(n) for n in shape(x)[1:]]
    if heads == 1 or per_head == 0:
        piece = insert(graph, aten.slice.Tensor, x, 0, first, first + per_place * (length - 1) + 1, per_place)
        return insert(graph, aten.unsqueeze.default, piece, 0)
    outer, inner, swapped = (per_head, per_place, False) if per_head >= per_place else (per_place, per_head, True)
    counts = (length, heads) if swapped else (heads, length)
    if inner != 1 or rows % outer or first % outer + counts[1] > outer or first // outer + counts[0] > rows // outer:
        raise Unliftable("the weight's rows are not ordered by head and place")
    x = insert(graph, aten.reshape.default, x, [rows // outer, outer, *rest])
    for dim, (low, count) in enumerate(((first // outer, counts[0]), (first % outer, counts[1]))):
        if low or count != shape(x)[dim]:
            x = insert(graph, aten.slice.Tensor, x, dim, low, low + count)
    return insert(graph, aten.permute.default, x, [1, 0, *range(2, 2 + len(rest))]) if swapped else x


def _coefficients(row) -> tuple[int, int, int]:
    """(a, b, c) of a h + b e + c."""
    row = sympy.expand(row)
    a, b = row.coeff(sc.H), row.coeff(E)
    c = sympy.expand(row - a * sc.H - b * E)
    if not all(x.is_Integer and x >= 0 for x in (a, b, c)) or b == 0 and a == 0:
        raise Unliftable("the weight's rows are not ordered by head and place")
    return int(a), int(b) or 1, int(c)


def tensor_view(graph: Graph, piece: Piece, batch, heads, positions, position: Symbol, sources) -> Node:
    """What a piece reads as [B, heads or 1, positions, width], a view where that is possible. Raises Unliftable where its dims mix them."""
    sizes = {sc.B: batch, sc.H: heads, position: positions, E: Integer(piece.width)}
    for node, index in (*(p for p in piece.places if not any(isinstance(e, sympy.Basic) and e.has(sc.H) for e in p[1])), (piece.node, piece.index)):
        if (dims := layout(node, index, sizes)) is not None:
            return arrange(graph, node, dims, [[sc.B], [sc.H], [position], [E]], sizes, sources)
    raise Unliftable(f"the layout of {piece.node}, shape {[*shape(piece.node)]}, mixes batch, heads and positions")
