"""A mask to ranges of keys: which key tiles a block of rows has to visit, and which of them need no mask.

    (j <= i) & (i - j < 4096)   ->   j in [i_lo - 4095, i_hi], unmasked in [i_hi - 4095, i_lo]

Every conjunct that is linear in j bounds a range; the others (window | global, block tables, ...) stay as a test per tile,
built by compiler/ir/interval.py.
"""
from __future__ import annotations

import dataclasses

import sympy
from sympy import And, Or
from sympy.core.relational import Relational

from ...compiler.ir import interval
from ...compiler.ir import scalar as sc


@dataclasses.dataclass(frozen=True)
class Ranges:
    """uppers: e of ``j <= e``; lowers: e of ``j >= e``; rest: the conjuncts that bound nothing."""

    uppers: tuple
    lowers: tuple
    rest: sympy.Basic

    @property
    def has_full_tiles(self) -> bool:
        """Can tiles be known to need no mask?"""
        return self.rest is sympy.true

    @property
    def tile_test(self):
        """A condition without which a tile holds no visible key; true where there is nothing to test."""
        return interval.tile(_decidable(self.rest))[1]


def ranges(mask) -> Ranges:
    """The key ranges of a mask."""
    uppers, lowers, rest = [], [], []
    for conjunct in And.make_args(mask):
        bound = _bound(conjunct)
        if bound is None:
            rest.append(conjunct)
        else:
            (uppers if bound[0] == "upper" else lowers).append(bound[1])
    return Ranges(tuple(uppers), tuple(lowers), And(*rest))


SMALLEST_BLOCK = 16


def _decidable(condition):
    """The condition, with true for what no tile decides: an element that changes with every key, a period shorter than a tile.

    A test that never skips costs more than its own time: Triton pipelines no loads that stand under a branch.
    """
    if isinstance(condition, (And, Or)):
        return condition.func(*map(_decidable, condition.args))
    return sympy.true if any(map(_changes_within_a_tile, condition.atoms(sc.load, sc.mod))) else condition


def _changes_within_a_tile(e) -> bool:
    if isinstance(e, sc.mod):
        return e.args[0].has(sc.J) and e.args[1].is_Integer and abs(int(e.args[1])) <= SMALLEST_BLOCK
    # j // 64 may be the same all over a tile, j is not
    return any(index.xreplace({x: sc.TK for x in index.atoms(sc.floordiv)}).has(sc.J) for index in e.args[1:])


def _bound(conjunct):
    """("upper", e) for a conjunct that says j <= e, ("lower", e) for j >= e, else None."""
    if not isinstance(conjunct, Relational) or conjunct.rel_op not in ("<", "<=", ">", ">="):
        return None
    difference = sympy.expand(conjunct.lhs - conjunct.rhs)
    coefficient = difference.coeff(sc.J, 1)
    other = sympy.expand(difference - coefficient * sc.J)
    if coefficient not in (1, -1) or other.has(sc.J) or not sc.is_int(other):
        return None
    less = (conjunct.rel_op in ("<", "<=")) == (coefficient == 1)  # j is below its bound
    strict = conjunct.rel_op in ("<", ">")
    bound = -coefficient * other
    if less:
        return "upper", bound - 1 if strict else bound
    return "lower", bound + 1 if strict else bound


def ends(bound) -> tuple | None:
    """(lowest, highest) of a bound over the rows [i_lo, i_hi], or None where it has to be computed row by row."""
    if any(load.has(sc.I) for load in sc.loads(bound)):
        return None
    return interval.interval(bound, {sc.I: interval.TILE[sc.I]})
