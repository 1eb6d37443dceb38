"""Interval analysis: what it says about a tile is held against every element of the tile."""

import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sympy import Integer
from tileweld.compiler.ir import scalar as sc
from tileweld.compiler.ir.evaluate import Evaluator
from tileweld.compiler.ir.interval import I_HI, I_LO, J_HI, J_LO, always, drop_proved, interval, tile
from tileweld.compiler.ir.parser import parse_mask

quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
GENERATOR = torch.Generator().manual_seed(0)
C0 = torch.randint(0, 2, (48,), generator=GENERATOR)
C1 = torch.randint(-3, 40, (48,), generator=GENERATOR)
INTEGERS = frozenset({0, 1})


@st.composite
def integers(draw, depth=3):
    if depth == 0:
        return draw(st.sampled_from([sc.I, sc.J, sc.I, sc.J, Integer(draw(st.integers(-9, 9))), sc.load(sc.capture_symbol(1, True), sc.J), sc.load(sc.capture_symbol(1, True), sc.I)]))
    kind = draw(st.sampled_from(["leaf", "add", "sub", "scale", "floordiv", "mod", "min", "max", "abs", "where"]))
    if kind == "leaf":
        return draw(integers(0))
    x = draw(integers(depth - 1))
    if kind == "scale":
        return sc.mul(x, Integer(draw(st.integers(-3, 3))))
    if kind == "floordiv":
        return sc.floordiv(x, Integer(draw(st.sampled_from([1, 2, 3, 8, -2]))))
    if kind == "mod":
        return sc.mod(x, Integer(draw(st.sampled_from([2, 3, 8, -3]))))
    if kind == "abs":
        return sc.unary("abs", x)
    y = draw(integers(depth - 1))
    if kind == "where":
        return sc.select(sc.relation("<=", y, Integer(3)), x, y)
    return {"add": sc.add, "sub": sc.sub, "min": sc.minimum, "max": sc.maximum}[kind](x, y)


@st.composite
def conditions(draw, depth=2):
    kind = draw(st.sampled_from(["relation", "relation", "load", "and", "or", "not"] if depth else ["relation", "load"]))
    if kind == "load":
        return sc.relation("!=", sc.load(sc.capture_symbol(0, True), draw(st.sampled_from([sc.I, sc.J]))), Integer(0))
    if kind == "relation":
        return sc.relation(draw(st.sampled_from(["<", "<=", ">", ">=", "==", "!="])), draw(integers(2)), draw(integers(2)))
    x = draw(conditions(depth - 1))
    if kind == "not":
        return sympy.Not(x)
    return (sympy.And if kind == "and" else sympy.Or)(x, draw(conditions(depth - 1)))


def evaluate(e, **env):
    return Evaluator(env, [C0, C1], torch.float64)(e)


TILES = st.tuples(st.integers(0, 12), st.integers(1, 6), st.integers(0, 12), st.integers(1, 6))


@quick
@given(conditions(), TILES)
def test_must_and_may_hold_on_every_element(mask, corners):
    i_lo, rows, j_lo, keys = corners
    must, may = tile(mask)
    ends = {"i_lo": i_lo, "i_hi": i_lo + rows - 1, "j_lo": j_lo, "j_hi": j_lo + keys - 1}
    truth = evaluate(mask, i=torch.arange(i_lo, i_lo + rows)[:, None], j=torch.arange(j_lo, j_lo + keys))
    if bool(evaluate(must, **ends)):
        assert truth.all(), f"must of {mask}"
    if not bool(evaluate(may, **ends)):
        assert not truth.any(), f"may of {mask}"


@quick
@given(integers(3), TILES)
def test_intervals_contain_every_value(e, corners):
    i_lo, rows, j_lo, keys = corners
    ends = interval(e, {sc.I: (I_LO, I_HI), sc.J: (J_LO, J_HI)})
    if ends is None:
        return
    corner = {"i_lo": i_lo, "i_hi": i_lo + rows - 1, "j_lo": j_lo, "j_hi": j_lo + keys - 1}
    values = evaluate(e, i=torch.arange(i_lo, i_lo + rows)[:, None], j=torch.arange(j_lo, j_lo + keys))
    assert evaluate(sympy.sympify(ends[0]), **corner) <= values.min(), f"lower end of {e}"
    assert evaluate(sympy.sympify(ends[1]), **corner) >= values.max(), f"upper end of {e}"


@quick
@given(conditions())
def test_what_is_dropped_always_held(mask):
    ranges = {sc.I: (Integer(0), Integer(9)), sc.J: (Integer(0), Integer(13))}
    i, j = torch.arange(10)[:, None], torch.arange(14)
    truth, dropped = (evaluate(e, i=i, j=j).expand(10, 14) for e in (mask, drop_proved(mask, ranges)))
    assert torch.equal(truth, dropped)
    if always(mask, ranges):
        assert truth.all()


@pytest.mark.parametrize("mask,i,j,expected", [
    ("j <= i", (64, 127), (0, 63), "full"), ("j <= i", (64, 127), (64, 127), "partial"), ("j <= i", (0, 63), (64, 127), "empty"),
    ("(j <= i) & (i - j < 32)", (128, 191), (0, 63), "empty"), ("(j <= i) & (i - j < 32)", (64, 96), (64, 64), "partial"), ("(j <= i) & (i - j < 512)", (64, 127), (0, 63), "full"),
    ("j + Tq <= i + Tk", (0, 15), (0, 15), "full"), ("i//64 == j//64", (64, 127), (64, 127), "full"), ("i//64 == j//64", (64, 127), (0, 63), "empty"),
    ("(j < 4) | (j <= i)", (0, 1), (0, 3), "full"), ("j%128 < 64", (0, 0), (64, 127), "empty"), ("j%128 < 64", (0, 0), (128, 191), "full"),
    ("c0[j] != 0", (0, 15), (0, 15), "partial"),
])
def test_tiles_of_common_masks(mask, i, j, expected):
    must, may = tile(parse_mask(mask, INTEGERS))
    env = dict(zip(("i_lo", "i_hi", "j_lo", "j_hi"), (*i, *j))) | {"Tq": 128, "Tk": 192, "b": 0}
    found = "full" if evaluate(must, **env) else "partial" if evaluate(may, **env) else "empty"
    assert found == expected


def test_symbolic_sizes_prove_what_holds_for_all():
    n = sympy.Symbol("n", integer=True, positive=True)
    ranges = {sc.I: (Integer(0), n - 1), sc.J: (Integer(0), n - 1)}
    assert drop_proved(sc.relation("<", sc.J, n), ranges) is sympy.true
    assert drop_proved(sc.relation(">=", sc.I - sc.J, n), ranges) is sympy.false
    assert drop_proved(sc.relation("<", sc.J, n - 1), ranges) is not sympy.true
