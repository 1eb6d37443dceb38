"""Tables: a formula that depends on one position, or on the distance j - i alone, computed once outside the kernel.

    c0[trunc(8*log(0.125*(j - i)))...], h]   ->   c0[c1[j - i + Tq - 1], h]   with   c1 = table("trunc(8*log(0.125*t))...", 1 - Tq, Tk)

T5's bucket is Tq + Tk - 1 logarithms instead of Tq * Tk, and since the table is computed by torch's own log, a bucket that sits
on a rounding boundary falls where the model's falls. ALiBi's slopes are a table over h.
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import sympy
import torch
from torch import Tensor

from . import scalar as sc
from .evaluate import Evaluator
from .parser import parse

#: functions that a kernel computes as well as torch does: no table for them alone
_CHEAP = {"abs", "floor", "ceil", "relu"}


@torch.library.custom_op("tileweld::table", mutates_args=())
def table(text: str, start: int, stop: int, sizes: Sequence[int], device: torch.device) -> Tensor:
    """The expression ``text`` of the variable t at start, ..., stop - 1; [stop - start], int64 for an integer expression, else float32."""
    return _entries(text, start, stop, tuple(sizes), device).clone()


@functools.lru_cache(maxsize=64)  # by symbolic sizes it is asked for at every call, of the same sizes mostly: 180 us to make, 10 to copy
def _entries(text: str, start: int, stop: int, sizes: tuple[int, ...], device: torch.device) -> Tensor:
    t = torch.arange(start, stop, device=device)
    return Evaluator({"t": t, **{f"n{k}": n for k, n in enumerate(sizes)}}, (), torch.float32, device)(parse(text)).expand(stop - start)


@table.register_fake
def _(text, start, stop, sizes, device):
    dtype = torch.int64 if sc.is_int(parse(text)) else torch.float32
    return torch.empty(stop - start, dtype=dtype, device=device)


@dataclasses.dataclass(frozen=True)
class Table:
    """text of t for t in [start, stop), an expression of sizes each."""

    expr: sympy.Expr
    start: sympy.Expr
    stop: sympy.Expr
    symbol: sympy.Symbol


def tabulate(e, ranges, taken: int = 0) -> tuple[sympy.Basic, list[Table]]:
    """Replace the largest parts of e that are worth a table; returns the new expression and the tables, numbered from ``taken``."""
    tables: dict = {}

    def visit(x):
        if not x.args or isinstance(x, (sympy.Symbol, sympy.Number)):
            return x
        if _worth(x) and (found := _as_table(x, ranges)) is not None:
            variable, offset, entry = found
            number = f"table_{taken + len(tables)}"
            symbol = sympy.Symbol(number, integer=True) if sc.is_int(x) else sympy.Symbol(number)
            entry = tables.setdefault((entry.expr, entry.start), dataclasses.replace(entry, symbol=symbol))
            return sc.load(entry.symbol, variable - offset)
        return x.func(*(visit(a) for a in x.args))

    return visit(e), list(tables.values())


def _worth(x) -> bool:
    if not isinstance(x, sympy.Expr) or x.has(sc.load, sc.S):
        return False
    return any(c.args[0].name not in _CHEAP for c in x.atoms(sc.call)) or bool(x.atoms(sc.fpow)) or bool(x.atoms(sc.trunc))


def _as_table(x, ranges):
    """(index expression, its lowest value, Table) when x is a function of one symbol or of j - i."""
    symbols = x.free_symbols & set(ranges)
    if len(symbols) == 1:
        (variable,) = symbols
        low, high = ranges[variable]
        inner = x.xreplace({variable: sc.T})
    elif symbols == {sc.I, sc.J}:
        inner = _rebuild(x, {sc.J: sc.T + sc.I})
        if inner.has(sc.I):
            return None
        variable = sc.J - sc.I
        low, high = -ranges[sc.I][1], ranges[sc.J][1]
    else:
        return None
    return variable, low, Table(inner, low, high + 1, None)


def _rebuild(x, replacement):
    """Replace symbols and let sums and relations of integers simplify again."""
    if isinstance(x, sympy.core.relational.Relational):
        return sc.relation(x.rel_op, *(_rebuild(a, replacement) for a in x.args))
    if x in replacement:
        return replacement[x]
    if not x.args:
        return x
    result = x.func(*(_rebuild(a, replacement) for a in x.args))
    return sympy.expand(result) if isinstance(result, (sympy.Add, sympy.Mul)) else result
