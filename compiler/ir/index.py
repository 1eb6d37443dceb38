"""Index arithmetic: views as exact functions from indices to indices, kept simple with the ranges of the symbols."""
from __future__ import annotations

import sympy
from sympy import Integer

from . import scalar as sc
from .interval import interval, nonnegative


def within(x, n, ranges) -> bool:
    """Is 0 <= x < n proved?"""
    ends = interval(x, ranges)
    return ends is not None and nonnegative(ends[0]) and nonnegative(n - 1 - ends[1])


def _divisible(term, n):
    """term / n when that is an integer polynomial, else None."""
    if term == n:
        return Integer(1)
    quotient = sympy.cancel(term / n) if not (n.is_Integer and term.is_Integer) else term / n
    numerator, denominator = quotient.as_numer_denom()
    return numerator if denominator == 1 else None


def divmod_index(x, n, ranges) -> tuple:
    """(x // n, x % n) of an index: multiples of n leave the division, a remainder within [0, n) needs none."""
    if n == 1:
        return x, Integer(0)
    if within(x, n, ranges):
        return Integer(0), x
    quotient, remainder = Integer(0), Integer(0)
    for term in sympy.Add.make_args(sympy.expand(x)):
        part = _divisible(term, n)
        if part is None:
            remainder += term
        else:
            quotient += part
    if within(remainder, n, ranges):
        return quotient, remainder
    return quotient + sc.floordiv(remainder, n), sc.mod(remainder, n)


def join(terms):
    """A sum of index terms in which n*(x // n) + x % n is x again."""
    total = sympy.expand(sympy.Add(*terms))
    for part in total.atoms(sc.mod):
        x, n = part.args
        whole = sympy.expand(n * sc.floordiv(x, n))
        for scale in {total.coeff(part)} - {0}:
            if sympy.expand(total.coeff(sc.floordiv(x, n)) - scale * n) == 0 and whole != 0:
                return join([sympy.expand(total - scale * part - scale * whole + scale * x)])
    return total


def groups_of_dims(old, new):
    """Pairs of runs of dims with equal products: a view never mixes dims of two groups."""
    a = b = 0
    while a < len(old) or b < len(new):
        start_a, start_b = a, b
        product_a = product_b = Integer(1)
        if a < len(old):
            product_a, a = product_a * old[a], a + 1
        if b < len(new):
            product_b, b = product_b * new[b], b + 1
        while sympy.expand(product_a - product_b) != 0:
            fewer_a = a < len(old) and (b >= len(new) or _smaller(product_a, product_b))
            if fewer_a:
                product_a, a = product_a * old[a], a + 1
            elif b < len(new):
                product_b, b = product_b * new[b], b + 1
            elif a < len(old):
                product_a, a = product_a * old[a], a + 1
            else:
                yield (start_a, len(old)), (start_b, len(new))
                return
        yield (start_a, a), (start_b, b)


def _smaller(x, y):
    if x.is_Integer and y.is_Integer:
        return x < y
    ratio = sympy.cancel(y / x)
    return ratio.as_numer_denom()[1] == 1


def reindex(index, old, new, ranges) -> list:
    """Index into the shape ``old`` for an index into its view of shape ``new`` (row-major, equal number of elements)."""
    old_kept = [n for n in old if n != 1]
    new_kept = [(n, e) for n, e in zip(new, index) if n != 1]
    result = []
    for (a0, a1), (b0, b1) in groups_of_dims(old_kept, [n for n, _ in new_kept]):
        dims, parts = old_kept[a0:a1], new_kept[b0:b1]
        if len(dims) == 1 and len(parts) == 1:
            result.append(parts[0][1])
            continue
        stride, terms = Integer(1), []
        for n, e in reversed(parts):
            terms.append(e * stride)
            stride *= n
        linear = join(terms)
        split = []
        for n in reversed(dims[1:]):
            linear, rest = divmod_index(linear, n, ranges)
            split.append(rest)
        result.extend([linear, *reversed(split)])
    remaining = iter(result)
    return [Integer(0) if n == 1 else next(remaining) for n in old]


def wrap_index(e, n, ranges):
    """A possibly negative index (advanced indexing counts from the end) as a nonnegative one."""
    ends = interval(e, ranges)
    if ends is not None and nonnegative(ends[0]):
        return e
    return sc.select(sc.relation("<", e, Integer(0)), e + n, e)


def clamp_index(e, n, ranges):
    """An index kept inside [0, n), so that a kernel never reads elsewhere; where it acts, the model itself would have raised."""
    return e if within(e, n, ranges) else sc.minimum(sc.maximum(e, Integer(0)), n - 1)
