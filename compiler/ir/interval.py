"""Interval analysis of scalar expressions: which tiles of a mask are empty, full or partial, and what is always true.

`interval` bounds an integer expression, `decide` a condition, both given inclusive ranges of symbols; the ends are
expressions themselves. With the corners of a tile as ranges (`tile`), the answer is code: a kernel evaluates it per tile and
skips what is surely masked. With whole index ranges, it drops conditions that always hold.
"""
from __future__ import annotations

import sympy
from sympy import And, Integer, Not, Or, Symbol
from sympy.core.relational import Relational

from . import scalar as sc

#: corners of a tile, inclusive
I_LO, I_HI, J_LO, J_HI = (Symbol(name, integer=True, nonnegative=True) for name in ("i_lo", "i_hi", "j_lo", "j_hi"))
TILE = {sc.I: (I_LO, I_HI), sc.J: (J_LO, J_HI)}
#: stands for an unknown element of an integer tensor; small enough that sums with positions do not overflow int64
UNKNOWN = Integer(2**48)


def interval(e, ranges) -> tuple | None:
    """(lowest, highest) of an integer expression, or None where nothing is known."""
    if not isinstance(e, sympy.Basic) or e.is_Integer or (e.is_Symbol and e not in ranges):
        return (e, e) if not isinstance(e, sympy.Basic) or sc.is_int(e) else None
    if e.is_Symbol:
        return ranges[e]
    if isinstance(e, sympy.Add):
        parts = [interval(x, ranges) for x in e.args]
        return None if None in parts else (sympy.Add(*(lo for lo, _ in parts)), sympy.Add(*(hi for _, hi in parts)))
    if isinstance(e, sympy.Mul):
        return _product(e, ranges)
    if isinstance(e, sc.floordiv):
        x, n = interval(e.args[0], ranges), e.args[1]
        return (sc.floordiv(x[0], n), sc.floordiv(x[1], n)) if x and n.is_positive and not n.has(*ranges) else None
    if isinstance(e, sc.mod):
        x, n = interval(e.args[0], ranges), e.args[1]
        if not n.is_positive or n.has(*ranges):
            return None
        if x is None:
            return Integer(0), n - 1
        same_period = sc.relation("==", sc.floordiv(x[0], n), sc.floordiv(x[1], n))
        return sc.select(same_period, sc.mod(x[0], n), Integer(0)), sc.select(same_period, sc.mod(x[1], n), n - 1)
    if isinstance(e, (sympy.Min, sympy.Max)):
        parts = [interval(x, ranges) for x in e.args]
        return None if None in parts else (e.func(*(lo for lo, _ in parts)), e.func(*(hi for _, hi in parts)))
    if isinstance(e, sympy.Abs):
        x = interval(e.args[0], ranges)
        return x and (sympy.Max(0, x[0], -x[1]), sympy.Max(-x[0], x[1]))
    if isinstance(e, sc.where):
        must, may = decide(e.args[0], ranges)
        x, y = interval(e.args[1], ranges), interval(e.args[2], ranges)
        if x is None or y is None:
            return None
        return tuple(sc.select(must, a, sc.select(may, pick(a, b), b)) for a, b, pick in ((x[0], y[0], sympy.Min), (x[1], y[1], sympy.Max)))
    if isinstance(e, sc.load) and sc.is_int(e):
        point = _point(e, ranges)
        if point is None:
            return None
        known, element = point
        return sc.select(known, element, -UNKNOWN), sc.select(known, element, UNKNOWN)
    return None


def _product(e, ranges):
    fixed = [x for x in e.args if not x.has(*ranges)]
    moving = [x for x in e.args if x.has(*ranges)]
    if not moving:
        return e, e
    if len(moving) > 1:
        return None
    x, c = interval(moving[0], ranges), sympy.Mul(*fixed)
    if x is None:
        return None
    if c.is_nonnegative:
        return c * x[0], c * x[1]
    if c.is_nonpositive:
        return c * x[1], c * x[0]
    return sympy.Min(c * x[0], c * x[1]), sympy.Max(c * x[0], c * x[1])


def _point(element, ranges):
    """(condition, element at the low corner): an access is known on a tile where all its indices are constant there."""
    known, corner = sympy.true, []
    for index in element.args[1:]:
        ends = interval(index, ranges)
        if ends is None:
            return None
        known = And(known, sc.relation("==", *ends))
        corner.append(ends[0])
    return (known, element.func(element.args[0], *corner)) if known is not sympy.false else None


def decide(condition, ranges) -> tuple:
    """(must, may): a condition under which it surely holds everywhere in the ranges, and one without which it holds nowhere."""
    if condition is sympy.true or condition is sympy.false:
        return condition, condition
    if isinstance(condition, And):
        parts = [decide(x, ranges) for x in condition.args]
        return And(*(m for m, _ in parts)), And(*(m for _, m in parts))
    if isinstance(condition, Or):
        parts = [decide(x, ranges) for x in condition.args]
        return Or(*(m for m, _ in parts)), Or(*(m for _, m in parts))
    if isinstance(condition, Not):
        must, may = decide(condition.args[0], ranges)
        return Not(may), Not(must)
    if isinstance(condition, Relational):
        return _decide_relation(condition, ranges)
    return (sympy.false, sympy.true) if condition.has(*ranges) or not isinstance(condition, sc.compare) else (condition, condition)


def _decide_relation(condition, ranges):
    x, y = (interval(side, ranges) for side in condition.args)
    op = condition.rel_op
    if x is None or y is None:
        return sympy.false, sympy.true
    if op in (">", ">="):
        x, y, op = y, x, {">": "<", ">=": "<="}[op]
    if op in ("<", "<="):
        return sc.relation(op, x[1], y[0]), sc.relation(op, x[0], y[1])
    equal = And(sc.relation("==", *x), sc.relation("==", *y), sc.relation("==", x[0], y[0]))
    overlap = And(sc.relation("<=", x[0], y[1]), sc.relation("<=", y[0], x[1]))
    return (equal, overlap) if op == "==" else (Not(overlap), Not(equal))


def tile(mask) -> tuple:
    """(must, may) of a mask over the tile [i_lo, i_hi] x [j_lo, j_hi]: full where must holds, empty where may does not."""
    return decide(mask, TILE)


def always(condition, ranges) -> bool:
    """Is the condition proved over the whole ranges?"""
    return decide(condition, ranges)[0] is sympy.true


def nonnegative(e) -> bool:
    """Is e >= 0 proved by the assumptions of its symbols?"""
    return bool(sympy.expand(e).is_nonnegative)


def drop_proved(condition, ranges):
    """The condition without the parts that always (or never) hold in the ranges, whose ends may be symbolic sizes."""
    if isinstance(condition, (And, Or)):
        return condition.func(*(drop_proved(x, ranges) for x in condition.args))
    if isinstance(condition, Not):
        return Not(drop_proved(condition.args[0], ranges))
    if not isinstance(condition, Relational):
        return condition
    x, y = condition.args
    ends = interval(y - x, ranges)
    if ends is None:
        return condition
    low, high = ends  # of y - x
    positive, negative, zero = nonnegative(low - 1), nonnegative(-high - 1), nonnegative(low) and nonnegative(-high)
    proved = {"<": (positive, nonnegative(-high)), "<=": (nonnegative(low), negative), ">": (negative, nonnegative(low)), ">=": (nonnegative(-high), positive),
              "==": (zero, positive or negative), "!=": (positive or negative, zero)}[condition.rel_op]
    return sympy.true if proved[0] else sympy.false if proved[1] else condition


def tighten(e, ranges):
    """e with the conditions, minima and maxima decided that the ranges decide."""
    if not e.args or isinstance(e, sympy.Symbol):
        return e
    if sc.is_bool(e):
        return drop_proved(e, ranges)
    if isinstance(e, sc.where):
        condition, x, y = e.args
        return sc.select(tighten(condition, ranges), tighten(x, ranges), tighten(y, ranges))
    e = e.func(*(tighten(a, ranges) for a in e.args))
    if isinstance(e, (sympy.Max, sympy.Min)):
        sign = 1 if isinstance(e, sympy.Max) else -1
        for a in e.args:
            if all(a is b or ((gap := interval(sign * (a - b), ranges)) and nonnegative(gap[0])) for b in e.args):
                return a
    return e
