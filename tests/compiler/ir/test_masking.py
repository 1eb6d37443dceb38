"""Splitting scores into score, mask and fill: only where the value stays."""

import math

import pytest
import sympy
import torch
from sympy import Integer
from tileweld.compiler.ir import scalar as sc
from tileweld.compiler.ir.evaluate import Evaluator
from tileweld.compiler.ir.masking import has_witness, moderate, renormalised, split
from tileweld.compiler.ir.parser import parse
from tileweld.compiler.ir.printer import text

LOW = -3.4028234663852886e38
INF = math.inf
INTEGERS = frozenset({0})


def parts(source):
    return split(parse(source, INTEGERS), {sc.S})


@pytest.mark.parametrize("source,score,mask,fill", [
    ("0.5*s", "0.5*s", "True", None),
    ("where(j <= i, s, -inf)", "s", "j <= i", -INF),
    ("where(j <= i, s, -1e9)", "s", "j <= i", -1e9),
    ("where(j > i, -1e9, 2*s)", "2*s", "j <= i", -1e9),
    (f"0.5*s + where(j <= i, 0, {LOW})", "0.5*s", "j <= i", LOW),
    (f"s + where(j <= i, 0.25*j, {LOW})", "s + 0.25*j", "j <= i", LOW),
    ("where(j <= i, s, -inf) + where(c0[b, j] != 0, 0, -inf)", "s", "(j <= i) & (c0[b, j] != 0)", -INF),
    ("0.5*where(j <= i, s, -1e9)", "0.5*s", "j <= i", -5e8),
    ("max(where(j <= i, s, -inf), -1e30)", "max(-1e+30, s)", "j <= i", -1e30),
])
def test_what_splits(source, score, mask, fill):
    found = parts(source)
    assert (text(found.score), text(renormalised(found.mask)), found.fill) == (score, mask, fill)


@pytest.mark.parametrize("source", [
    "s + where(j <= i, 0, -10000)",  # s - 10000 is not -10000
    f"(s + where(j <= i, 0, {LOW})) + where(c0[b, j] != 0, 0, {LOW})",  # both masked: -inf
    "50*tanh(where(j <= i, s, -1e9)/50)",  # -50 is a score
    "where(j <= i, s, -5)", "where(j <= i, s, 1e30)", "where(s > 0, s, 0)", f"s*where(j <= i, 1, {LOW})", "s + where(j <= i, 0, 1e38)",
    f"(s + c1[b, j]) + where(j <= i, 0, {LOW})",  # c1 may hold a mask of its own
])
def test_what_stays_whole(source):
    found = parts(source)
    assert found.fill is None and found.mask is sympy.true and found.score == parse(source, INTEGERS)


SCORES = [-40.0, -1.5, 0.0, 3.0, 900.0]
MASKS = ["j <= i", "i - j < 2", "c0[j] != 0"]


@pytest.mark.parametrize("fill", [-INF, LOW, -1e30, -1e9, -1e4])
@pytest.mark.parametrize("shape", ["where({m}, {x}, {f})", "{x} + where({m}, 0, {f})", "where({m}, 0, {f}) + {x}", "{x} + where({m}, c1[j], {f})", "where({m}, {x}, {f}) + c1[j]", "4*where({m}, {x}, {f})", "max({x} + where({m}, 0, {f}), -3e38)",
                                   "0.25*({x} + where({m}, 0, {f}))", "where({m}, {x}, {f}) - 3"])
def test_splits_keep_the_value(shape, fill):
    """Every combination nested twice, evaluated in float32 against what was written, at each position."""
    captures = [torch.tensor([1, 0, 1, 1, 0]), torch.tensor([0.0, -INF, LOW, -3.0, 7.0])]
    env = {"i": torch.arange(4)[:, None, None], "j": torch.arange(5)[None, :, None], "s": torch.tensor(SCORES)}
    for inner in ("s", "0.5*s", "(s + where(i - j < 2, 0, {f}))", "where(c0[j] != 0, s, {f})", "(s + where(c0[j] != 0, 0, -inf))", "(s + c1[j])"):
        for mask in MASKS:
            source = shape.format(m=mask, x=inner.format(f=fill), f=fill)
            e = parse(source, INTEGERS)
            found = split(e, {sc.S})
            evaluate = Evaluator(env, captures, torch.float32)
            expected = evaluate.float(e).expand(4, 5, 5)
            score = evaluate.float(found.score).expand(4, 5, 5)
            ours = score if found.fill is None else torch.where(evaluate(found.mask), score, torch.tensor(found.fill))
            assert torch.equal(ours.isnan(), expected.isnan()), source
            torch.testing.assert_close(ours.nan_to_num(), expected.nan_to_num(), rtol=1e-6, atol=1e-6, msg=source)


def test_moderate():
    assert moderate(parse("0.5*s + 30*tanh(s)")) and moderate(parse("s + c0[b, j]", INTEGERS))
    assert not moderate(parse("s + c1[b, j]")) and not moderate(parse("s + -inf")) and not moderate(parse("s - 1e30"))
    weight = sc.load(sympy.Symbol("c1", finite=True), sc.H)  # a parameter
    assert moderate(sc.add(sc.S, weight))


@pytest.mark.parametrize("mask,rows,keys,expected", [
    ("j <= i", 8, 8, True), ("j < 4", 8, 8, True), ("(j <= i) & (i - j < 3)", 8, 8, True), ("(j <= i) & (i - j < 3)", 8, 4, False), ("Tq + j <= Tk + i", 4, 8, True), ("j > i", 8, 8, False),
    ("(j <= i) & (c0[b, j] != 0)", 8, 8, False), ("(j < 2) | (c0[b, j] != 0)", 8, 8, True), ("j >= 7", 8, 8, True),
])
def test_rows_that_provably_see_a_key(mask, rows, keys, expected):
    e = parse(mask, INTEGERS).xreplace({sc.TQ: Integer(rows), sc.TK: Integer(keys)})
    ranges = {sc.I: (Integer(0), Integer(rows - 1)), sc.J: (Integer(0), Integer(keys - 1))}
    assert has_witness(e, ranges, Integer(rows), Integer(keys)) is expected
