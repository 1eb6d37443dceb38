"""The value of a stream as an epilogue: which columns of which weights, in what order, and what is done with them.

A stream's root is lifted at an index (y0, y1, ...) down to elements acc[row, column] of its products. All of them must have the
same row: the dims of the root that make it up, in mixed radix, are its rows i, all others its columns j. What the columns are
to the weights, accumulator or rotary's partner, is seen in columns.py.
"""
from __future__ import annotations

import dataclasses

import sympy
import torch
from sympy import Integer, Symbol

from . import scalar as sc
from .columns import Accumulator, Grid, classify, kind, number
from .graph import shape, value
from .lift import Lift
from .products import Product
from .streams import Stream, signature
from .unliftable import Unliftable

PACKED = Symbol("packed", integer=True, nonnegative=True)  # the column of the whole product, in the epilogue of a part of it
MAX_NODES = 600  # of an expression; one beyond this is no epilogue


@dataclasses.dataclass(frozen=True)
class Element:
    """A capture: tensor ``border[number]`` (or a product's bias, number = -1 - product, sliced as its accumulator), read as the symbol.

    runs: consecutive dims that are read as one: (first, last + 1) of the dims longer than one.
    """

    number: int
    symbol: Symbol
    runs: tuple[tuple[int, int], ...] = ()
    accumulator: Accumulator | None = None


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What a stream computes: expr of a0.., p0.., i, j, captures and sizes; rows and columns: dims of the root, outermost first."""

    expr: sympy.Basic
    accumulators: tuple[Accumulator, ...]
    elements: tuple[Element, ...]
    sizes: tuple[tuple[Symbol, sympy.Expr], ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    width: int
    pair: tuple[int, int]

    @property
    def is_packed(self) -> bool:
        """Its columns are a part of every head's: no slice of a weight."""
        return any(a.block for a in self.accumulators)

    @property
    def is_plain(self) -> bool:
        """Nothing but the product itself, a bias aside."""
        e = self.expr
        if isinstance(e, sc.fadd) and isinstance(e.args[1], sc.load) and e.args[1].args[1:] in ((sc.J,), (PACKED,)) and self.elements[0].accumulator is not None:
            e = e.args[0]
        return e.is_Symbol and len(self.accumulators) == 1


_KNOWN: dict[tuple, Epilogue | str] = {}


def epilogue(stream: Stream) -> Epilogue:
    """The stream's epilogue. Raises Unliftable with the reason where it has none."""
    key = signature(stream)
    if key not in _KNOWN:
        if len(_KNOWN) > 4096:
            _KNOWN.clear()
        try:
            _KNOWN[key] = _epilogue(stream)
        except Unliftable as error:
            _KNOWN[key] = str(error) or "no scalar expression"
    found = _KNOWN[key]
    if isinstance(found, str):
        raise Unliftable(found)
    return found


class _Down(Lift):
    """Lifts within a stream: its products are elements acc[...], what lies outside is a capture."""

    def __init__(self, ranges, stream: Stream):
        super().__init__(ranges)
        self.numbers = {p.node: k for k, p in enumerate(stream.products)}
        self.products, self.inside = stream.products, set(stream.inside)

    def _lift(self, node, index):
        k = self.numbers.get(node)
        if k is None:
            if node not in self.inside and not (node.op == "get_attr" and value(node).dim() == 0):
                raise Unliftable("outside")
            return super()._lift(node, index)
        element = sc.load(Symbol(f"acc{k}"), *index)
        bias = self.products[k].bias
        return element if bias is None else sc.add(element, sc.load(Symbol(f"bias{k}"), index[-1]))


def _epilogue(stream: Stream) -> Epilogue:
    root, dims = stream.root, shape(stream.root)
    y = [Symbol(f"y{k}", integer=True, nonnegative=True) for k in range(len(dims))]
    lift = _Down({s: (Integer(0), n - 1) for s, n in zip(y, dims)}, stream)
    index = [Integer(0) if n == 1 else s for s, n in zip(y, dims)]
    e = lift.at(root, index)
    if stuck := next((n for n in lift.captures if n in lift.inside), None):
        raise Unliftable(f"{str(stuck.target).removeprefix('aten.').split('.')[0]} has no scalar expression")
    found = [x for x in sc.loads(e) if kind(x) == "acc"]
    if sc.is_bool(e) or not found:
        raise Unliftable("the result does not depend on the product")
    if (nodes := _nodes(e, {})) > MAX_NODES:
        raise Unliftable(f"its expression has {nodes} parts")
    rows = _rows(found, stream.products, y, dims)
    columns = [k for k, n in enumerate(dims) if n != 1 and k not in rows]
    grid = Grid([(y[k], dims[k]) for k in columns])
    e = grid.simplified(e)
    readings = grid.readings(e)
    pair, terms = classify({x: m for x, m in readings.items() if kind(x) == "acc"}, grid)
    return _named(e, stream, lift, grid, terms, pair, rows, columns, y, dims, readings)


def _nodes(e, known: dict) -> int:
    """The size of an expression when it is written out."""
    if e not in known:
        known[e] = 1 + sum(_nodes(a, known) for a in e.args)
    return known[e]


def _rows(found, products: tuple[Product, ...], y, dims) -> list[int]:
    """The dims of the root that make up the row of every element, outermost first."""
    rows = set()
    for x in found:
        sizes = shape(products[number(x)].node)[:-1]
        lead = x.args[1:-1]
        if all(e.is_Symbol for e, n in zip(lead, sizes) if n != 1):
            rows.add(tuple(y.index(e) for e, n in zip(lead, sizes) if n != 1))
            continue
        total, stride = Integer(0), Integer(1)
        for e, n in zip(reversed(lead), reversed(sizes)):
            total, stride = total + stride * e, stride * n
        rows.add(_mixed_radix(sympy.expand(total), y, dims))
    if len(rows) != 1:
        raise Unliftable("it combines different rows of the product")
    (order,) = rows
    if len(set(order)) != len(order) or sympy.expand(sympy.Mul(*(dims[k] for k in order)) - sympy.Mul(*shape(products[0].node)[:-1])) != 0:
        raise Unliftable("it reads some rows of the product, not all")
    return list(order)


def _mixed_radix(total, y, dims) -> tuple[int, ...]:
    order, stride, rest = [], Integer(1), total
    free = [k for k, s in enumerate(y) if s in total.free_symbols]
    while free:
        k = next((k for k in free if sympy.expand(rest.coeff(y[k]) - stride) == 0), None)
        if k is None:
            raise Unliftable("its rows are no rows of the product")
        order.insert(0, k)
        free.remove(k)
        rest = sympy.expand(rest - stride * y[k])
        stride *= dims[k]
    if rest != 0:
        raise Unliftable("it reads some rows of the product, not all")
    return tuple(order)


# ---------------------------------------------------------------- names of the op: i, j, a0, p0, c0, n0


def _named(e, stream, lift, grid, terms, pair, rows, columns, y, dims, readings) -> Epilogue:
    accumulators = tuple(sorted({a for a, _ in terms.values()}, key=lambda a: (a.product, a.offset)))
    names = {x: sc.accumulator_symbol(f"{'p' if partner else 'a'}{accumulators.index(a)}") for x, (a, partner) in terms.items()}
    sizes: dict[sympy.Expr, Symbol] = {}

    def size(n):
        return sizes.setdefault(n, sc.size_symbol(len(sizes)))

    place = {y[k]: p for k, p in zip(rows, _digits(sc.I, [size(dims[k]) if n else Integer(1) for n, k in enumerate(rows)]))}
    place |= {y[k]: p for k, p in zip(columns, _digits(sc.J, [dims[k] for k in columns]))}
    node_of = {symbol: node for node, symbol in lift.captures.items()}
    border = {node: k for k, node in enumerate(stream.border)}
    elements: list[Element] = []
    by_place = {(number(x), x.args[1], x.args[-1]): t for x, t in terms.items()}

    def element(place, integer=False, runs=(), accumulator=None):
        known = next((c for c in elements if (c.number, c.runs, c.accumulator) == (place, runs, accumulator)), None)
        if known is None:
            known = Element(place, Symbol(f"capture{len(elements)}", integer=True) if integer else Symbol(f"capture{len(elements)}"), runs, accumulator)
            elements.append(known)
        return known.symbol

    for x in sc.loads(e):
        if kind(x) == "acc":
            continue
        if kind(x) == "bias":
            a, partner = by_place.get((number(x), x.args[1], x.args[-1]), (None, True))
            if a is None:
                raise Unliftable("the bias stands at another column than its product")
            position = sc.J if not partner else (x.args[-1] - a.offset).xreplace(place)
            if a.block:
                position = _packed_position(x, readings[x], a, grid, stream.products[a.product].width)
            names[x] = sc.load(element(-1 - a.product, accumulator=a), position)
            continue
        node = node_of[x.args[0]]
        if node not in border:  # the tensor of a number that was read with item()
            raise Unliftable(f"it reads a number from {node}")
        index, runs = _joined(x.args[1:], node, [y[k] for k in rows], [y[k] for k in columns])
        names[x] = sc.load(element(border[node], bool(x.args[0].is_integer), runs), *(p.xreplace(place) for p in index))
    e = e.xreplace(names).xreplace(place)
    for symbol in sorted(e.free_symbols, key=str):
        if not (symbol in (sc.I, sc.J, PACKED) or sc.accumulator_number(symbol) is not None or symbol in sizes.values() or symbol in {c.symbol for c in elements}):
            e = e.xreplace({symbol: size(symbol)})
    used = e.free_symbols
    kept = tuple((s, n) for n, s in sizes.items() if s in used)
    return Epilogue(e, accumulators, tuple(elements), kept, tuple(rows), tuple(columns), grid.width, pair)


def _packed_position(x, mask, a: Accumulator, grid: Grid, width: int):
    """Where the bias of a packed product is read: the whole bias at a shift of the product's own column, within its bounds where it is not used too."""
    shifts = (grid(x.args[-1]) - a.at(grid.j))[mask].unique().tolist() if grid.knows(x.args[-1]) else ()
    if len(shifts) != 1:
        raise Unliftable("the bias of a packed product stands at columns that are no shift of its own")
    shift = Integer(int(shifts[0]))
    return PACKED if shift == 0 else sympy.Min(PACKED + shift, Integer(width - 1)) if shift > 0 else sympy.Max(PACKED + shift, Integer(0))


def _digits(symbol, sizes) -> list:
    """The digits of a number in mixed radix, most significant first; the first size is not needed."""
    digits, rest = [], symbol
    for n in reversed(sizes[1:]):
        digits.insert(0, sc.mod(rest, n))
        rest = sc.floordiv(rest, n)
    return [rest, *digits] if sizes else []


def _joined(index, node, rows, columns):
    """(index, runs): runs of an element's dims that are all of the rows, or all of the columns, in order, are read as one where the tensor's strides allow it."""
    known = value(node)
    kept = [d for d, n in enumerate(known.shape) if not isinstance(n, int) or n != 1]
    result, runs, k = [], [], 0
    while k < len(index):
        for symbols, whole in ((rows, sc.I), (columns, sc.J)):
            m = len(symbols)
            if m > 1 and list(index[k:k + m]) == symbols and _dense(known, kept[k:k + m]):
                result.append(whole)
                runs.append((k, k + m))
                k += m
                break
        else:
            result.append(index[k])
            runs.append((k, k + 1))
            k += 1
    return result, tuple(runs)


def _dense(known: torch.Tensor, dims) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(known.stride(a) == known.stride(b) * known.shape[b]) for a, b in zip(dims, dims[1:]))
