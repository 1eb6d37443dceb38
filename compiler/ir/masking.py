"""Splitting a score expression into score, mask and fill: which positions are masked, and what score they have.

    0.125*s + where(j <= i, 0, -3.4e38)   ->   score 0.125*s, mask j <= i, fill -3.4e38

Only what keeps the value: a `where` with a constant branch is a fill by definition; an *added* constant is one where it
swallows any finite score (-inf, or so large that s + constant rounds to the constant: |constant| >= 1e30). -10000 added to a
score does not, and stays in the score. Two fills are merged only where they are equal.
"""
from __future__ import annotations

import dataclasses
import math

import sympy
from sympy import And, Integer, Not

from . import scalar as sc
from .interval import drop_proved

#: an added constant at least this large swallows a score: fp32 and bf16 keep no digit of |s| < 1e22 next to it
ABSORBING = 1e30
#: a fill above this could carry weight next to visible scores; it stays in the score
HIGHEST_FILL = -1e3


@dataclasses.dataclass(frozen=True)
class Split:
    """score where mask, fill elsewhere. ``fill`` is None where nothing is masked.

    added: the fill came from an addition, whose gradient reaches the score at masked positions too; a `where` has none there.
    """

    score: sympy.Expr
    mask: sympy.Basic = sympy.true
    fill: float | None = None
    added: bool = False


#: float16's lowest number: a mask by intention, but s - 65504 keeps five bits of s. Taken for one where every row sees a key.
LOWEST_HALF = -65504.0


def split(e, of, absorbing: float = ABSORBING) -> Split:
    """Split an expression; ``of`` is the set of symbols that scores depend on (a part without them is no score).

    absorbing: how large an added constant must be to count as a mask. Below ABSORBING the split is right only where every row
    sees a key and the caller proves it.
    """
    if isinstance(e, sc.where):
        condition, x, y = e.args
        for kept, constant, visible in ((x, y, condition), (y, x, Not(condition))):
            if _is_fill(constant) and not sc.is_const(kept):
                inner = split(kept, of, absorbing)
                if inner.fill is None or inner.fill == float(constant) and not inner.added:
                    return Split(inner.score, And(visible, inner.mask), float(constant))
                return Split(kept, visible, float(constant))
    if isinstance(e, (sc.fadd, sc.fsub)):
        x, y = e.args
        if not _has(x, of) and isinstance(e, sc.fadd):
            x, y = y, x
        inner = split(x, of, absorbing)
        added = _added_mask(y, absorbing) if isinstance(e, sc.fadd) and not _has(y, of) else None
        if added is not None:
            visible, rest, constant = added
            if (inner.fill is None and (constant == -math.inf or moderate(inner.score))) or inner.fill == constant == -math.inf:
                return Split(sc.add(inner.score, rest), And(visible, inner.mask), constant, added=math.isfinite(constant))
            if inner.fill == -math.inf:  # a finite constant added to -inf leaves -inf: keep the inner mask outermost
                return Split(sc.add(inner.score, y), inner.mask, inner.fill)
            return Split(sc.add(x, rest), visible, constant) if constant == -math.inf else Split(e)  # twice finfo.min is -inf
        swallows = inner.fill is not None and (not y.has(sympy.oo, sympy.nan) if inner.fill == -math.inf else abs(inner.fill) >= absorbing and moderate(y))
        if swallows and not _has(y, of):
            return dataclasses.replace(inner, score=e.func(inner.score, y))  # fill + y rounds to fill
        return Split(e)
    if isinstance(e, (sc.fmul, sc.fmax, sc.fmin, sc.call)):
        varying = [k for k, x in enumerate(e.args) if _has(x, of)]
        if len(varying) == 1 and all(sc.is_const(x) or x.is_Symbol for k, x in enumerate(e.args) if k != varying[0]):
            inner = split(e.args[varying[0]], of, absorbing)
            if inner.fill is not None:  # f(where(m, x, c)) = where(m, f(x), f(c))
                fill = _apply(e, varying[0], sc.number(inner.fill))
                if fill is not None and _is_fill(fill):
                    passes = isinstance(e, (sc.fmul, sc.fmin))  # max(s - 3.4e38, c) has no gradient there
                    return Split(_apply(e, varying[0], inner.score), inner.mask, float(fill), inner.added and passes)
    return Split(e)


def split_where_seen(e, of, roles) -> Split:
    """`split`, which also takes float16's lowest number for a mask where every row provably sees a key (causal, no padding)."""
    parts = split(e, of)
    if parts.fill is None and any(float(x) == LOWEST_HALF for x in e.atoms(sympy.Number)):
        half = split(e, of, -LOWEST_HALF)
        mask = renormalised(drop_proved(half.mask, roles.ranges))
        if half.fill == LOWEST_HALF and moderate(half.score) and has_witness(mask, roles.ranges, roles.rows, roles.keys):
            return Split(half.score, mask, -math.inf)
    return parts


def rebuilt(e, replacement):
    """e with parts replaced and every builder applied again, so that constants meet: 0.5*(0.25*s) becomes 0.125*s."""
    if e in replacement:
        return replacement[e]
    if not e.args or not any(x in e.free_symbols for r in replacement for x in r.free_symbols):
        return e
    arguments = [rebuilt(a, replacement) for a in e.args]
    for node, builder in ((sc.fadd, sc.add), (sc.fsub, sc.sub), (sc.fmul, sc.mul), (sc.fdiv, sc.div), (sc.fmin, sc.minimum), (sc.fmax, sc.maximum), (sc.where, sc.select)):
        if isinstance(e, node):
            return builder(*arguments)
    return e.func(*arguments)


def _apply(e, position, x):
    arguments = [x if k == position else a for k, a in enumerate(e.args)]
    builders = {sc.fmul: sc.mul, sc.fmax: sc.maximum, sc.fmin: sc.minimum}
    if type(e) in builders:
        return builders[type(e)](*arguments)
    return sc.unary(arguments[0].name, arguments[1])


def _is_fill(x) -> bool:
    return sc.is_const(x) and x is not sympy.nan and float(x) <= HIGHEST_FILL


def _has(e, symbols) -> bool:
    return bool(e.free_symbols & symbols)


def moderate(y) -> bool:
    """Nothing in y is itself as large as a mask constant. A float tensor may hold a mask, unless it is known to be a weight (`Lift.capture`)."""
    numbers = all(abs(float(x)) < 1e20 for x in y.atoms(sympy.Number)) and not y.has(sympy.oo, -sympy.oo, sympy.nan)
    return numbers and all(element.is_integer or element.args[0].is_finite for element in y.atoms(sc.load))


def _added_mask(y, absorbing):
    """(visible, what else is added, constant) of an additive mask where(c, x, -big); None where y is no such mask."""
    if isinstance(y, sc.where):
        condition, x, z = y.args
        for rest, constant, visible in ((x, z, condition), (z, x, Not(condition))):
            if sc.is_const(constant) and constant is not sympy.nan and float(constant) <= -absorbing and not rest.has(sympy.oo, sympy.nan):
                return visible, rest, float(constant)
        inner = {k: _added_mask(branch, absorbing) for k, branch in ((1, x), (2, z)) if not sc.is_const(branch)}
        for k, found in inner.items():  # where(c, where(d, x, -big), -big)
            other = y.args[3 - k]
            if found and sc.is_const(other) and float(other) == found[2]:
                return And(condition if k == 1 else Not(condition), found[0]), found[1], found[2]
    if isinstance(y, sc.fadd) and moderate(y.args[1]):
        found = _added_mask(y.args[0], absorbing)
        return found and (found[0], sc.add(found[1], y.args[1]), found[2])
    return None


def has_witness(mask, ranges, rows, keys) -> bool:
    """Does every row provably see a key? Then the fill can carry no weight, and -inf serves as well.

    Candidates: the first and the last key, the diagonal, and the diagonal that ends in the corner (rows, keys: Tq, Tk).
    """
    candidates = [Integer(0), keys - 1]
    if sympy.expand(keys - rows).is_nonnegative:
        candidates += [sc.I, sc.I + keys - rows]
    without_j = {symbol: ends for symbol, ends in ranges.items() if symbol != sc.J}
    return any(drop_proved(_renormalise(mask, candidate), without_j) is sympy.true for candidate in candidates)


def renormalised(mask):
    """The mask in normal form: negations moved to the relations (not a-or-b is not-a and not-b), j > i negated is j <= i."""
    return _renormalise(_negations_inward(mask), sc.J)


def _negations_inward(mask, negated=False):
    if isinstance(mask, Not):
        return _negations_inward(mask.args[0], not negated)
    if isinstance(mask, (sympy.And, sympy.Or)):
        swapped = {sympy.And: sympy.Or, sympy.Or: sympy.And}[mask.func] if negated else mask.func
        return swapped(*(_negations_inward(x, negated) for x in mask.args))
    return Not(mask) if negated else mask


def _renormalise(mask, candidate):
    """The mask with j replaced, relations brought back to normal form."""
    if isinstance(mask, (sympy.And, sympy.Or, Not)):
        return mask.func(*(_renormalise(x, candidate) for x in mask.args))
    if isinstance(mask, sympy.core.relational.Relational):
        x, y = (side.xreplace({sc.J: candidate}) for side in mask.args)
        return sc.relation(mask.rel_op, x, y)
    return mask.xreplace({sc.J: candidate}) if isinstance(mask, sympy.Basic) else mask
