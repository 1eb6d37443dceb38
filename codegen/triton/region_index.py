"""The index arithmetic of a region's nest for Triton: loads become offsets, neighbouring loops one where memory allows.

    load(c0, i, j) -> load(c0, i*s0 + j*s1, guard)        guard: what keeps the index inside the tensor where the ranges do not prove it
    i, j -> m = i*n + j                                   where every offset and condition is one of m: then it runs along memory
"""
from __future__ import annotations

import math

import sympy
from sympy import And, Integer, Symbol
from sympy.core.relational import Relational

from ...compiler.ir import scalar as sc
from ...compiler.ir.interval import interval, nonnegative, tighten
from ...compiler.ir.region import Body, Nest


class Flattened:
    """A nest with offsets in place of indices.

    rows, columns: (symbol, size) from the outside in, as few as possible; without reductions all are rows. reductions: expressions in
    their order; outputs, offsets: value and place of each output; checks: indices from data. ``ranges`` of the symbols.
    """

    def __init__(self, body: Body, nest: Nest, number: int):
        self.body, self.nest = body, nest
        self.ranges = dict(nest.ranges)
        self._known: dict = {}
        self.rows, self.columns = list(nest.rows), list(nest.columns)
        if not nest.reductions:
            self.rows, self.columns = [*self.rows, *self.columns], []
        flat = lambda e: self._flat(_refined(e, self.ranges, {}))  # noqa: E731
        self.reductions = [flat(r.expr) for r in nest.reductions]
        self.outputs = [flat(o.expr) for o in nest.outputs]
        self.offsets = [self._offset(body.outputs[o.number], [self._flat(e) for e, n in zip(o.index, body.outputs[o.number].sizes) if n != 1]) for o in nest.outputs]
        self.checks = [(flat(c.index), c.low, c.high) for c in body.checks if c.nest == number]
        self.rows, self.columns = self._ordered(self.rows), self._ordered(self.columns)
        self.rows = self._merged(self.rows)
        self.columns = self._merged(self.columns)

    @property
    def total(self) -> sympy.Expr:
        return sympy.Mul(*(n for _, n in self.rows))

    @property
    def width(self) -> sympy.Expr:
        return sympy.Mul(*(n for _, n in self.columns))

    @property
    def row_symbols(self) -> set[Symbol]:
        return {x for x, _ in self.rows}

    @property
    def column_symbols(self) -> set[Symbol]:
        return {x for x, _ in self.columns}

    @property
    def everything(self) -> list:
        return [*self.reductions, *self.outputs, *self.offsets, *(c[0] for c in self.checks)]

    @property
    def is_down(self) -> bool:
        """Are neighbours in memory neighbouring rows? Accesses that both rows and columns move decide."""
        down = across = 0
        for offset in self._accesses():
            if offset.free_symbols & self.row_symbols and offset.free_symbols & self.column_symbols:
                down += any(offset.coeff(x) == 1 for x in self.row_symbols)
                across += any(offset.coeff(x) == 1 for x in self.column_symbols)
        return down > across

    def linear(self) -> sympy.Expr:
        """The number of an element in the order of the rows."""
        terms, stride = [], Integer(1)
        for x, n in reversed(self.rows):
            terms.append(x * stride)
            stride *= n
        return sympy.expand(sympy.Add(*terms))

    def extents(self) -> list[sympy.Expr]:
        """What an index must be able to hold: counts, offsets, and integers that are computed from positions."""
        found = [self.total * self.width]
        for t in (*(self.body.inputs[int(x.args[0].name[1:])] for e in self.everything for x in e.atoms(sc.load)), *(self.body.outputs[o.number] for o in self.nest.outputs)):
            found.append(sympy.Add(*((n - 1) * abs(s) for n, s in zip(t.sizes, t.strides))))
        for e in (x for whole in (*self.reductions, *self.outputs) for x in _integers(whole)):
            if isinstance(e, (sympy.Add, sympy.Mul, sympy.Pow)) and not e.has(sc.load):
                ends = interval(e, self.ranges)
                found += [sympy.Max(ends[1], -ends[0])] if ends is not None else [Integer(2**31)]
        return list(dict.fromkeys(found))

    def constancy(self, guard) -> int:
        """Of how many aligned neighbours along memory (16 at most, a power of two) a condition surely has one value."""
        loops = self.rows if self.is_down or not self.columns else self.columns
        if not loops or guard.atoms(sc.load):
            return 1
        x, n = loops[-1]
        count = math.gcd(16, int(n.as_coeff_Mul()[0]))
        for relation in guard.atoms(Relational):
            found = _edge(relation, x)
            if found is None:
                return 1
            edge, _ = found
            for term in sympy.Add.make_args(edge):
                count = math.gcd(count, int(term.as_coeff_Mul()[0]))
        return count

    # ---- offsets

    def _flat(self, e):
        if not isinstance(e, sympy.Basic) or not e.args or isinstance(e, Symbol):
            return e
        if e not in self._known:
            if isinstance(e, sc.load):
                tensor = self.body.inputs[int(e.args[0].name[1:])]
                guards = [g for x, d in zip(e.args[1:], tensor.kept) for g in self._guards(x, tensor.sizes[d])]
                made = sc.load(e.args[0], self._offset(tensor, [self._flat(x) for x in e.args[1:]]), And(*map(self._flat, guards)))
            else:
                made = e.func(*map(self._flat, e.args))
            self._known[e] = made
        return self._known[e]

    def _guards(self, index, size) -> list:
        ends = interval(index, self.ranges)
        low, high = (False, False) if ends is None else (nonnegative(ends[0]), nonnegative(size - 1 - ends[1]))
        return [g for g, proved in ((sc.relation(">=", index, Integer(0)), low), (sc.relation("<", index, size), high)) if not proved]

    @staticmethod
    def _offset(tensor, index):
        """index: an entry for every dim longer than one."""
        return sympy.expand(sympy.Add(*(e * tensor.strides[d] for e, d in zip(index, tensor.kept))))

    def _accesses(self) -> list:
        return [*self.offsets, *(x.args[1] for e in self.everything for x in sc.loads(e))]

    # ---- loops

    def _ordered(self, loops):
        """Loops in the order of an access that most of them move, the smallest stride innermost."""
        if len(loops) < 2:
            return loops
        symbols = {x for x, _ in loops}
        most = max(self._accesses(), key=lambda e: len(e.free_symbols & symbols))
        return [loops[k] for k in sorted(range(len(loops)), key=lambda k: (-_rank(most.coeff(loops[k][0])), k))]

    def _merged(self, loops):
        again = True
        while again:
            again = False
            for k in range(len(loops) - 1):
                (a, n), (b, m) = loops[k:k + 2]
                one = Symbol(f"{a}_{b}", integer=True, nonnegative=True)
                if self._substitute(a, b, one, m):
                    loops = [*loops[:k], (one, n * m), *loops[k + 2:]]
                    self.ranges[one] = (Integer(0), n * m - 1)
                    again = True
                    break
        return loops

    def _substitute(self, a, b, one, size) -> bool:
        """a*size + b becomes ``one`` everywhere, or nowhere if a or b would stay."""
        replaced = {}
        for part in dict.fromkeys(x for e in self.everything for x in _whole_integers(e)):
            if part.free_symbols & {a, b}:
                made = sympy.expand(part.xreplace({b: one - size * a}))
                if a in made.free_symbols:
                    return False
                replaced[part] = made
        change = lambda e: _replace(e, replaced)  # noqa: E731
        self.reductions, self.outputs, self.offsets = ([change(e) for e in row] for row in (self.reductions, self.outputs, self.offsets))
        self.checks = [(change(e), low, high) for e, low, high in self.checks]
        return True


def _edge(relation, x):
    """(the first x on the other side of a linear condition, does it hold below); edge 0 where x is not in it; None where there is no such number."""
    difference = sympy.expand(relation.lhs - relation.rhs)
    slope = difference.coeff(x)
    rest = sympy.expand(difference - slope * x)
    if x in rest.free_symbols or rest.atoms(sc.load, sc.mod, sc.floordiv) or slope not in (-1, 0, 1) or relation.rel_op not in ("<", "<=", ">", ">="):
        return None
    if slope == 0:
        return Integer(0), True
    below = (slope > 0) == (relation.rel_op in ("<", "<="))
    behind = relation.rel_op in ("<", ">=") if slope > 0 else relation.rel_op in ("<=", ">")  # x < 8 changes at 8, x <= 7 too
    return -slope * rest + (0 if behind else 1), below


def _refined(e, ranges: dict, known: dict):
    """e with what its conditions say of the indices put to use: in where(x < 8, c0[min(x, 7)], y) the minimum is x.

    A clamp in an index hides from Triton that neighbours are read; the guard of the load takes its place.
    """
    if not isinstance(e, sympy.Basic) or not e.args or not e.has(sc.where):
        return tighten(e, ranges)
    key = e, tuple(ranges.items())
    if key not in known:
        if isinstance(e, sc.where):
            condition, x, y = e.args
            condition = tighten(condition, ranges)
            known[key] = sc.select(condition, _refined(x, _narrowed(condition, ranges, True), known), _refined(y, _narrowed(condition, ranges, False), known))
        elif sc.is_bool(e):
            known[key] = tighten(e, ranges)
        else:
            known[key] = e.func(*(_refined(a, ranges, known) for a in e.args))
    return known[key]


def _narrowed(condition, ranges: dict, holds: bool) -> dict:
    """The ranges where a condition on one index holds, or where it does not."""
    made = dict(ranges)
    for relation in condition.args if isinstance(condition, And) and holds else [condition]:
        symbols = relation.free_symbols & set(ranges) if isinstance(relation, Relational) else ()
        if len(symbols) != 1 or (found := _edge(relation, x := next(iter(symbols)))) is None:
            continue
        (edge, below), (low, high) = found, made[x]
        if below == holds:
            made[x] = (low, edge - 1 if high.is_Integer and edge.is_Integer and edge <= high else high)
        else:
            made[x] = (edge if low.is_Integer and edge.is_Integer and edge > low else low, high)
    return made


def _children(e):
    """The arguments that are values: not the names of captures, functions and comparisons."""
    return e.args[1:] if isinstance(e, (sc.load, sc.call, sc.compare)) else e.args


def _whole_integers(e) -> list:
    """The largest integer expressions within, offsets and guards of loads included."""
    found, seen, stack = [], set(), [e]
    while stack:
        x = stack.pop()
        if x in seen or not isinstance(x, sympy.Basic):
            continue
        seen.add(x)
        if not isinstance(x, sc.load) and sc.is_int(x):
            if not x.is_Integer:
                found.append(x)
        else:
            stack += _children(x)
    return found


def _integers(e) -> list:
    """Integer expressions outside of loads' offsets, inner ones included."""
    found, seen, stack = [], set(), [e]
    while stack:
        x = stack.pop()
        if isinstance(x, sc.load) or x in seen:
            continue
        seen.add(x)
        if sc.is_int(x):
            found.append(x)
        stack += _children(x)
    return found


def _replace(e, known: dict):
    """e with subexpressions replaced; a shared one is walked once. ``known`` takes up what was found."""
    if e not in known and isinstance(e, sympy.Basic) and e.args:
        known[e] = e.func(*(_replace(a, known) for a in e.args))
    return known.get(e, e)


def _rank(stride) -> float:
    """A stride to order by; symbolic ones are larger than any number they multiply, none at all is smallest."""
    coefficient, rest = stride.as_coeff_Mul()
    return float(coefficient) * 1e6 ** len(rest.free_symbols)
