"""A product whose columns hold q, k and v of one head after another ([heads, 3, dim]: GPT-NeoX, BLOOM), as one output of ``tileweld::linear``.

Taking q's columns out of such a weight would be a copy of it. The columns stay where they are instead, and one text says what each of them gets:

    q, k: rotary     v: as it is          where(mod(j, 48) < 32, a0*c0[i, mod(j, 16)] + where(..., -p0, p0)*c1[i, mod(j, 16)], a0)

An epilogue is found for every part alone, in the part's own columns j = dim * head + d; here they become the product's, j = period * head + offset + d:
mod(j, m) stays mod(j, m) where m divides dim, period and offset; floordiv(j, dim) becomes floordiv(j, period). A part that reads its columns in another way is refused.
The parts are views of the result: [M, heads, period][..., offset:offset + dim].
"""
from __future__ import annotations

from sympy import Dummy, Integer

from . import scalar as sc
from .columns import Accumulator
from .epilogue import PACKED
from .nodes import floordiv, mod
from .unliftable import Unliftable


def cannot_pack(parts: list[tuple[Accumulator, tuple[int, int], object]]) -> str | None:
    """Why (accumulator, pair, expression) of some parts are no parts of one text; None where they are."""
    if len({(a.product, a.period) for a, _, _ in parts}) > 1:
        return "its parts have different periods"
    pairs = {pair for _, pair, _ in parts if pair != (0, 0)}
    if len(pairs) > 1:
        return "its parts pair columns in different ways"
    if any(n % block for block, _ in pairs for a, _, _ in parts for n in (a.block, a.period, a.offset)):
        return "its pairs of columns do not fit into its parts"
    try:
        for a, _, e in parts:
            widened(e, a)
    except Unliftable as error:
        return str(error)
    return None


def widened(e, a: Accumulator):
    """An expression of a part's columns as one of the product's. Raises Unliftable."""
    names = {}
    for x in e.atoms(mod, floordiv):
        if x.args[0] != sc.J or not x.args[1].is_Integer:
            continue
        n = int(x.args[1])
        if isinstance(x, floordiv) and n == a.block:
            names[x] = (Dummy(integer=True, nonnegative=True), floordiv(sc.J, Integer(a.period)))
        elif isinstance(x, mod) and not any(m % n for m in (a.block, a.period, a.offset)):
            names[x] = (Dummy(integer=True, nonnegative=True), x)
    e = e.xreplace({x: dummy for x, (dummy, _) in names.items()})
    if sc.J in e.free_symbols:
        raise Unliftable("a part of the packed product reads more than a head's columns of something")
    return e.xreplace(dict(names.values())).xreplace({PACKED: sc.J})


def joined(parts: list[tuple[Accumulator, object]]):
    """The expression of the whole product from its parts'; equal neighbours are told apart no more. What no part covers gets the last one's: nobody reads it."""
    parts = sorted(parts, key=lambda part: part[0].offset)
    column = mod(sc.J, Integer(parts[0][0].period))
    result = parts[-1][1]
    for (_, e), (following, other) in zip(parts[-2::-1], parts[:0:-1]):
        if e != other:
            result = sc.select(sc.relation("<", column, Integer(following.offset)), e, result)
    return result
