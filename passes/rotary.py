"""rotary: x cos + partner(x) sin  ->  tileweld::rotary(x, cos, sin, width, pairs), for rotary that no projection has taken

What qkv_rotary leaves: q and k behind their own norms (Qwen 3, Gemma 3), packed or cached projections, graphs where it is off. Start at
a sum, a cat or a reshape; lift its value at (..., d) down to products of two elements (compiler/ir/lift.py) and compare, for every d, with

    half-split     y[t] = x[t] cos - x[t + w/2] sin         y[t + w/2] = x[t + w/2] cos + x[t] sin
    interleaved    y[2t] = x[2t] cos - x[2t + 1] sin        y[2t + 1] = x[2t + 1] cos + x[2t] sin
    regrouped      y[t] = x[2t] cos - x[2t + 1] sin         y[t + w/2] = x[2t + 1] cos + x[2t] sin             y[d] = x[d] from w on

so rotate_half, chunks, slices of step two, stacks, unbinds and partial rotary need no spelling of their own; complex_product has
written products of complex numbers in real ones. Angles and scalings (NTK, YaRN) are in the tables (Su et al., 2104.09864).

Cost for N elements: 3 N FLOPs before and after; eager reads 7 N and writes 5 N (negate, cat, two products, sum), the op reads N and writes N
besides the tables. Rounding: eager rounds each product to x's dtype, the op once.

Legality, each with a test that must be refused:
- it is a rotation: first minus, second plus (other signs are refused, the inverse rotation among them);
- cos and sin are the same tensors for both elements of a pair, read at the pair's or each element's own column;
- no product or sum in it has a consumer outside.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import sympy
import torch
from sympy import Integer, Symbol
from torch.fx import Graph, Node

from ..compiler.ir import rotary as _op  # noqa: F401 (registers the op)
from ..compiler.ir import scalar as sc
from ..compiler.ir.graph import insert, is_call, is_tensor, op_name, shape, value
from ..compiler.ir.interval import decide
from ..compiler.ir.lift import Lift
from ..compiler.ir.match import is_cast
from ..compiler.ir.rewrite import Match, NotThePattern, Refusal, Refused
from ..compiler.ir.unliftable import Unliftable
from ..compiler.ir.views import VIEWS

NAME = "rotary"
aten = torch.ops.aten
MAX_NODES = 40  # of one rotary; more is something else
T = Symbol("t", integer=True, nonnegative=True)  # the pair


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Every rotary of the graph, the last first and the outermost node of each, as a Match or a Refusal."""
    taken: set[Node] = set()
    for node in reversed(list(graph.nodes)):
        if node in taken or not is_call(node, aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.reshape.default, aten.to.dtype) or not is_tensor(node) or not value(node).dtype.is_floating_point:
            continue
        try:
            found = _real(node)
        except (NotThePattern, Unliftable):
            continue
        except Refused as refused:
            taken |= set(_inside(node)[0])
            yield refused.refusal
            continue
        taken |= found.nodes
        yield found.match(node)


@dataclasses.dataclass
class Rotary:
    """x rotated by cos and sin. nodes: what it replaces."""

    x: Node
    cos: Node
    sin: Node
    width: int
    pairs: str
    nodes: set[Node]

    def match(self, root: Node) -> Match:
        def build(graph: Graph) -> Node:
            x, cos, sin, dtype = self.x, self.cos, self.sin, value(root).dtype
            wide = torch.promote_types(value(x).dtype, dtype)
            x = x if value(x).dtype == wide else insert(graph, aten.to.dtype, x, wide)
            y = insert(graph, torch.ops.tileweld.rotary.default, x, cos, sin, self.width, self.pairs)
            return y if value(y).dtype == dtype else insert(graph, aten.to.dtype, y, dtype)

        total = int(shape(root)[-1])
        detail = f"{self.pairs}, {f'{self.width} of {total}' if self.width < total else total}"
        return Match(root, tuple(dict.fromkeys((self.x, self.cos, self.sin))), build, detail)


# ---------------------------------------------------------------- the real form


def _is_step(node) -> bool:
    """Moves or negates elements."""
    return isinstance(node, Node) and node.op == "call_function" and (node.target in VIEWS or is_cast(node) or is_call(node, aten.cat.default, aten.stack.default, aten.neg.default))


def _inside(root: Node) -> tuple[list[Node], list[Node]]:
    """(the nodes between root and its products, the products): steps, then sums of two, then steps, then products."""
    seen, products, stack = [], [], [(root, False)]
    while stack:
        node, summed = stack.pop()
        if node in seen or not is_tensor(node):
            continue
        if len(seen) > MAX_NODES:
            raise NotThePattern
        if is_call(node, aten.mul.Tensor) and summed and all(is_tensor(a) for a in node.args):
            seen.append(node)
            products.append(node)
        elif is_call(node, aten.add.Tensor, aten.sub.Tensor) and not summed and len(node.args) == 2 and all(map(is_tensor, node.args)):
            seen.append(node)
            stack += [(a, True) for a in node.args]
        elif _is_step(node):
            seen.append(node)
            stack += [(a, summed) for a in node.all_input_nodes]
    if not products:
        raise NotThePattern
    return seen, products


def _reach(node: Node) -> set[Node]:
    """What the elements of node are elements of."""
    seen, stack = set(), [node]
    while stack and len(seen) <= MAX_NODES:
        n = stack.pop()
        if n not in seen and is_tensor(n):
            seen.add(n)
            stack += n.all_input_nodes if _is_step(n) else []
    return seen


def _real(root: Node) -> Rotary:
    inside, products = _inside(root)
    total = shape(root)[-1] if shape(root) else Integer(0)
    if len(products) not in (2, 4) or not total.is_Integer or total < 2:
        raise NotThePattern
    sides = [[_reach(a) for a in p.args] for p in products]
    shared = set.intersection(*(a | b for a, b in sides))
    candidates = sorted((n for n in shared if shape(n) == shape(root) and value(n).dtype.is_floating_point), reverse=True)
    candidates.sort(key=lambda n: value(n).dtype != value(root).dtype)  # x in the result's dtype rather than a wide copy of it
    failure: Refused | None = None
    for x in candidates[:6]:
        if any((x in a) == (x in b) for a, b in sides):
            continue
        tables = [p.args[1] if x in a else p.args[0] for p, (a, b) in zip(products, sides)]
        moving = {n for p, (a, b) in zip(products, sides) for n in (a if x in a else b)}
        lift = _Elements(root, x, tables, set(inside) | moving)
        for pairs in _op.PAIRS:
            for width in _widths(int(total), products):
                try:
                    cos, sin = lift.tables(width, pairs)
                except (NotThePattern, Unliftable):
                    continue
                except Refused as refused:
                    failure = failure or refused
                    continue
                behind = _between(inside, products, x)
                _nothing_escapes(root, behind)
                return Rotary(x, cos, sin, width, pairs, behind)
    raise failure or NotThePattern


def _widths(total: int, products: list[Node]) -> list[int]:
    sizes = [int(n) for p in products if (n := shape(p)[-1]).is_Integer]
    return sorted({w for n in sizes for w in (n, 2 * n) if w % 2 == 0 and 2 <= w <= total}, reverse=True)


def _between(inside: list[Node], products: list[Node], x: Node) -> set[Node]:
    """The nodes of the rotary that depend on a product."""
    found = set(products)
    for node in sorted(inside):
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _nothing_escapes(root: Node, nodes: set[Node]) -> None:
    for node in sorted(nodes - {root}):
        for user in node.users:
            if user not in nodes and not is_call(user, aten.sym_size.int):
                if not is_call(node, aten.mul.Tensor):
                    raise NotThePattern  # the rotated part is a root of its own
                raise Refused(f"{op_name(node)} is also used outside the rotary, by {op_name(user)}", node, "keep the intermediate to itself")


class _Elements(Lift):
    """Lifts root to elements of x and of the tables, and to nothing behind them."""

    def __init__(self, root: Node, x: Node, tables: list[Node], inside: set[Node]):
        self.lead = [Integer(0) if n == 1 else Symbol(f"r{k}", integer=True, nonnegative=True) for k, n in enumerate(shape(root)[:-1])]
        super().__init__({r: (Integer(0), n - 1) for r, n in zip(self.lead, shape(root)) if r != 0})
        self.root, self.x, self.inside = root, x, inside - {x, *tables}

    def _lift(self, node, index):
        if node not in self.inside:
            raise Unliftable("an operand")
        return super()._lift(node, index)

    def tables(self, width: int, pairs: str) -> tuple[Node, Node]:
        """(cos, sin) if root is this rotary; NotThePattern, or Refused where only signs or tables differ."""
        half, total = width // 2, int(shape(self.root)[-1])
        apart, together = (T, T + half), (2 * T, 2 * T + 1)
        (first, second), places = apart if pairs == "half-split" else together, together if pairs == "interleaved" else apart
        a, b = ([self._term(*t) for t in self._terms(at, half)] for at in places)
        if width < total and self._terms(T + width, total - width) != [(1, [self._element(T + width)])]:
            raise NotThePattern
        signs, found = [], {}
        for terms, own, other, place in ((a, first, second, places[0]), (b, second, first, places[1])):
            by_column = {column: (sign, table) for sign, column, table in terms}
            if len(terms) != 2 or set(by_column) != {own, other}:
                raise NotThePattern
            signs.append((by_column[own][0], by_column[other][0]))
            found.setdefault("cos", []).append((by_column[own][1], place))
            found.setdefault("sin", []).append((by_column[other][1], place))
        if signs != [(1, -1), (1, 1)]:
            raise Refused("rotates backwards" if signs == [(1, 1), (1, -1)] else f"the signs are {_plus(signs[0])} and {_plus(signs[1])}, a rotation has +- and ++", self.root,
                          "negate sin before, or rotate the other way")
        return self._table("cos", found["cos"], width), self._table("sin", found["sin"], width)

    def _element(self, column):
        return sc.load(self.captures[self.x], *(e for e, n in zip((*self.lead, column), shape(self.x)) if n != 1)) if self.x in self.captures else None

    def _terms(self, column, count: int) -> list[tuple[int, list]]:
        """[(sign, [elements])] of root at a column, for t in [0, count)."""
        self.ranges[T] = (Integer(0), Integer(count - 1))
        self._memo.clear()  # the range of t is part of what was simplified
        e = self.at(self.root, (*self.lead, column))
        return list(self._sum(e, 1))

    def _sum(self, e, sign: int) -> Iterator[tuple[int, list]]:
        e = self._decided(e)
        if isinstance(e, sc.fadd):
            yield from self._sum(e.args[0], sign)
            yield from self._sum(e.args[1], sign)
        elif isinstance(e, sc.fsub):
            yield from self._sum(e.args[0], sign)
            yield from self._sum(e.args[1], -sign)
        else:
            factors = list(self._factors(e))
            yield sign * (-1) ** factors.count(-1), [f for f in factors if f != -1]

    def _factors(self, e) -> Iterator:
        e = self._decided(e)
        if isinstance(e, sc.fmul):
            yield from self._factors(e.args[0])
            yield from self._factors(e.args[1])
        elif isinstance(e, sc.load) or e == -1:
            yield e
        else:
            raise NotThePattern

    def _decided(self, e):
        while isinstance(e, sc.where):
            must, may = (sc.as_condition(c) if not isinstance(c, bool) else sympy.sympify(c) for c in decide(e.args[0], self.ranges))
            if must is not sympy.true and may is not sympy.false:
                raise NotThePattern
            e = e.args[1] if must is sympy.true else e.args[2]
        return e

    def _term(self, sign: int, elements: list) -> tuple:
        """(sign, column of x, the table's element) of a product of two elements."""
        symbol = self.captures.get(self.x)
        own = [e for e in elements if e.args[0] == symbol]
        if len(elements) != 2 or len(own) != 1:
            raise NotThePattern
        column = own[0].args[-1]
        if own[0] != self._element(column):
            raise NotThePattern
        return sign, column, elements[0] if elements[1] is own[0] else elements[1]

    def _table(self, name: str, elements: list[tuple], width: int) -> Node:
        """The tensor that both elements are of, at the row's place in it and the column of each."""
        (first, column_a), (second, column_b) = elements
        node = next(n for n, symbol in self.captures.items() if symbol == first.args[0])
        if second.args[0] != first.args[0]:
            raise Refused(f"{name} is another tensor for the second element of a pair", self.root, "take both from one table")
        sizes = shape(node)
        lead = [e for e, n in zip(self.lead[len(self.lead) - len(sizes) + 1:], sizes[:-1]) if n != 1]
        columns = [(T, T)] if sizes[-1] == width // 2 else [(column_a, column_b)] if sizes[-1] == width else []
        if not any((first.args[1:], second.args[1:]) == ((*lead, a), (*lead, b)) for a, b in columns):
            raise Refused(f"{name} [..., {sizes[-1]}] is not read at the row and column of a rotary of {width} columns", self.root, f"expected {width} columns, or {width // 2} that pairs share")
        return node


def _plus(signs) -> str:
    return "".join("+" if s > 0 else "-" for s in signs)
