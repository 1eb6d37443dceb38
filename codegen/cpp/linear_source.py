"""The part of a linear kernel that its spec decides: loops over columns that evaluate the prologue of a row of x or the epilogue of a row of sums.

A loop is cut where a condition on the column changes and where a constant ``mod(j, m)`` wraps, so that in each piece an index is the
loop's variable plus something fixed: captures are then read at unit stride and the loop vectorises. Rotary's tables, indexed by
``mod(j, head_dim)`` under ``where(mod(j, head_dim) < half, ...)``, become two plain loops a head.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import sympy
from sympy import Integer, Symbol
from sympy.core.relational import Relational

from ...compiler.errors import UnsupportedError
from ...compiler.ir import scalar as sc
from ...compiler.ir.index import divmod_index
from ...compiler.ir.interval import interval, nonnegative, tighten
from .printer import CppPrinter
from .score import Captures

#: a column is period * BASE + STEP; STEP is the innermost loop's variable
BASE, STEP = Symbol("base", integer=True, nonnegative=True), Symbol("t", integer=True, nonnegative=True)
_MOST_PIECES = 12  # of a period; interleaved rotary would be cut at every second column: it gathers instead
_LONGEST_PERIOD = 1 << 14


@dataclasses.dataclass
class Loops:
    """Prints loops over columns and remembers which dims of captures they want at unit stride: pairs (capture, dim)."""

    captures: Captures
    num_sizes: int
    known: Sequence[Sequence[bool]] | None = None  # for every capture, which dims have stride 1; None: found out at the call
    unit: set = dataclasses.field(default_factory=set)

    def function(self, name: str, parameters: str, expr, columns: int, names: dict[str, str]) -> str:
        """``void name(parameters)``: writes the expression of each of the columns [first, first + width) to ``to``; ``columns`` there are in all.

        names: what is read at every column -> C++ text, in which ``n`` counts from ``first``. Where strides are not known ahead, loops are made
        twice: for captures that all lie as the loops read them, and for any.
        """
        asked = set(self.unit)
        self.unit.clear()
        body = self._body(expr, columns, names)
        twofold = bool(self.unit)
        self.unit |= asked
        if not twofold:
            return "\n".join([f"static void {name}({parameters}) {{", *body, "}", ""])
        arguments = ", ".join(p.split()[-1].lstrip("*&") for p in parameters.split(","))
        return "\n".join(["template <bool unit>", f"static void {name}_by({parameters}) {{", *body, "}",
                          f"static void {name}({parameters}) {{ call.unit ? {name}_by<true>({arguments}) : {name}_by<false>({arguments}); }}", ""])

    def _body(self, expr, columns, names) -> list[str]:
        period, pieces = cut(expr, columns)
        lines = [*(f"    const int64_t n{k} = call.n{k};" for k in range(self.num_sizes) if expr.has(sc.size_symbol(k))),
                 f"    for (int64_t start = first / {period} * {period}; start < first + width; start += {period}) {{"]
        if any(piece.has(BASE) for *_, piece in pieces):
            lines.append(f"        const int64_t base = start / {period};")
        for low, high, piece in pieces:
            printer, used = self._printer({STEP: (Integer(low), Integer(high - 1))}), {symbol.name for symbol in piece.free_symbols}
            lines += [f"        for (int64_t begin = larger_size({low}, first - start), end = smaller({high}, first + width - start), once = 1; once; once = 0)",
                      "#pragma omp simd", "            for (int32_t t = int32_t(begin); t < int32_t(end); ++t) {", "                const int64_t n = start - first + t;"]
            lines += [f"                const float {name} = {source};" for name, source in names.items() if name in used]
            lines += [f"                to[n] = {printer.real(piece)};", "            }"]
        return [*lines, "    }"]

    def _printer(self, ranges: dict) -> CppPrinter:
        printer = self.captures.printer()

        def load_text(k, indices):
            rank = self.captures.ranks[k] if k < len(self.captures.ranks) else None
            if len(indices) != rank:
                raise UnsupportedError(f"c{k} is read with {len(indices)} indices and has {'no' if rank is None else rank} dimensions")
            return f"element(call.c{k}[{' + '.join(self._offset(printer, k, d, index, ranges) for d, index in enumerate(indices)) or '0'}])"

        printer.load_text = load_text
        return printer

    def _offset(self, printer, k, d, index, ranges) -> str:
        size, stride = f"call.c{k}_size[{d}]", f"call.c{k}_stride[{d}]"
        if index.is_Integer:
            return f"{int(index)} * {stride}" if index >= 0 else f"({size} - {-int(index)}) * {stride}"
        ends = interval(index, ranges) if not index.has(sc.load) else None
        if ends is None or not nonnegative(ends[0]):
            return f"at({printer(index)}, {size}) * {stride}"
        # A position that never counts from the end: in range wherever the definition reads.
        if index.has(STEP) and not sympy.expand(index - STEP).has(STEP):
            if self.known is None:
                self.unit.add((k, d))
            stride = f"(unit ? 1 : {stride})" if self.known is None else "1" if self.known[k][d] else stride
        return f"int64_t({printer(index)}) * {stride}"

    def unit_source(self) -> str:
        """``call.unit``: do all captures lie as the fast loops read them?"""
        return " && ".join(f"call.c{k}_stride[{d}] == 1" for k, d in sorted(self.unit)) or "true"


def cut(expr, columns: int) -> tuple[int, list[tuple[int, int, sympy.Expr]]]:
    """(period, pieces): stretches [low, high) of STEP in a period of columns, with the expression as it is there."""
    moduli = sorted({int(e.args[1]) for e in expr.atoms(sc.mod, sc.floordiv) if e.args[0].has(sc.J) and e.args[1].is_Integer and e.args[1] > 0})
    period = math.lcm(*moduli) if moduli else columns
    if not moduli or period >= min(columns, _LONGEST_PERIOD):
        period, column = max(columns, 1), STEP
    else:
        column = period * BASE + STEP
    edges = sorted({0, period, *(edge for m in moduli for edge in range(0, period, m))})
    if len(edges) - 1 > _MOST_PIECES:
        edges = [0, period]
    pieces = [piece for low, high in zip(edges, edges[1:]) for piece in _pieces(expr, column, low, high)]
    return period, pieces if len(pieces) <= 2 * _MOST_PIECES else [(0, period, _placed(expr, column, 0, period))]


def _pieces(expr, column, low, high):
    placed = _placed(expr, column, low, high)
    cuts = sorted(edge for relation in placed.atoms(Relational) if relation.free_symbols == {STEP} for edge in _edges(relation) if low < edge < high)
    if not cuts:
        return [(low, high, placed)]
    middle = cuts[len(cuts) // 2]
    return _pieces(expr, column, low, middle) + _pieces(expr, column, middle, high)


def _placed(expr, column, low, high):
    """The expression with the column in the place of j, where STEP is in [low, high)."""
    ranges = {STEP: (Integer(low), Integer(high - 1))}

    def walk(e):
        if e == sc.J:
            return column
        if not e.args:
            return e
        arguments = [walk(x) for x in e.args]
        if isinstance(e, (sc.mod, sc.floordiv)) and arguments[1].is_Integer and arguments[1] > 0:
            return divmod_index(arguments[0], arguments[1], ranges)[isinstance(e, sc.mod)]
        return e.func(*arguments)

    return tighten(walk(expr), ranges)


def _edges(relation) -> set[int]:
    """Where a linear condition on STEP changes; none where it is not linear."""
    difference = sympy.expand(relation.lhs - relation.rhs)
    slope = difference.coeff(STEP)
    rest = sympy.expand(difference - slope * STEP)
    if not slope.is_Integer or slope == 0 or not rest.is_Integer:
        return set()
    edge = int(sympy.floor(-rest / slope))
    return {t for t in (edge, edge + 1) if relation.subs(STEP, t) != relation.subs(STEP, t - 1)}
