"""The scalar language: text and tree are the same thing, builders keep float64 values bit for bit or nearly, bad text is refused."""

import math

import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tileweld.compiler.errors import ScalarSyntaxError
from tileweld.compiler.ir import scalar as sc
from tileweld.compiler.ir.evaluate import Evaluator
from tileweld.compiler.ir.nodes import UNARY
from tileweld.compiler.ir.parser import MAX_TEXT, parse, parse_mask
from tileweld.compiler.ir.printer import text

quick = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
FLOATS = [0.5, 2.0, -3.0, 1e-3, 0.0, 1.0, -1.0, 30.0]


def evaluate(e, **env):
    return Evaluator({**{name: torch.as_tensor(x, dtype=torch.float64 if name == "s" else None) for name, x in env.items()}}, [], torch.float64)(e)


# ---------------------------------------------------------------- random programs, built and computed side by side

BINARY = {
    "add": (sc.add, torch.add), "sub": (sc.sub, torch.sub), "mul": (sc.mul, torch.mul), "div": (sc.div, torch.div),
    "min": (sc.minimum, torch.minimum), "max": (sc.maximum, torch.maximum),
}
FUNCTIONS = {name: (lambda x, name=name: sc.unary(name, x), function) for name, function in
             {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "abs": torch.abs, "exp": torch.exp, "relu": torch.relu, "floor": torch.floor}.items()}


@st.composite
def programs(draw, depth=4):
    """(expression, function of s that computes the same in torch, in the order written)."""
    kind = draw(st.sampled_from(["s", "number"] if depth == 0 else ["s", "number", "binary", "binary", "unary", "where"]))
    if kind == "s":
        return sc.S, lambda s: s
    if kind == "number":
        c = draw(st.sampled_from([*FLOATS, 1e30, -1e30, math.inf, -math.inf]))
        return sc.number(c), lambda s: torch.full_like(s, c)
    x, fx = draw(programs(depth - 1))
    if kind == "unary":
        build, function = FUNCTIONS[draw(st.sampled_from(sorted(FUNCTIONS)))]
        return build(x), lambda s: function(fx(s))
    y, fy = draw(programs(depth - 1))
    if kind == "binary":
        build, function = BINARY[draw(st.sampled_from(sorted(BINARY)))]
        return build(x, y), lambda s: function(fx(s), fy(s))
    op = draw(st.sampled_from(["<", "<=", ">", ">="]))
    compare = {"<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge}[op]
    return sc.select(sc.relation(op, x, y), x, sc.number(0.25)), lambda s: torch.where(compare(fx(s), fy(s)), fx(s), torch.full_like(s, 0.25))


POINTS = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.3, -2.7, 40.0, -55.5, 1e-9, 1e12, -1e12, 3e38], dtype=torch.float64)


@quick
@given(programs())
def test_builders_keep_the_value(program):
    """Infinities and NaN included; what folds is constants, one rounding away at most."""
    e, function = program
    expected = function(POINTS)
    got = evaluate(e, s=POINTS).to(torch.float64).expand(POINTS.shape)
    assert torch.equal(got.isnan(), expected.isnan()), text(e)
    torch.testing.assert_close(got.nan_to_num(0, 1e308, -1e308), expected.nan_to_num(0, 1e308, -1e308), rtol=1e-13, atol=1e-290)


@quick
@given(programs())
def test_text_is_the_tree(program):
    e, _ = program
    again = parse(text(e))
    assert text(again) == text(e)
    a, b = (evaluate(x, s=POINTS).to(torch.float64).expand(POINTS.shape) for x in (e, again))
    assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("source", [
    "s", "0.125*s", "50*tanh(s*0.0625/50)", "s + where(j <= i, 0, -3.4028234663852886e+38)", "c0[b, j] != 0", "(j <= i) & (i - j < 4096)",
    "(i//64 == j//64) | (j < 4)", "s - 0.5*abs(i - j)", "s + c0[c1[j - i + Tq - 1], h]", "where(s > 0, s, 0.1*s)", "min(3, max(-3, s))", "s + -inf", "exp2(-0.5*h)*(j - i)",
    "~((j < 3) | (c0[j] != 0))", "(j + n0) % 3 == 1", "s**3", "s/(1 + abs(s))", "c0*s", "trunc(8*log(0.125*j))", "s*(s + 1) - (s - (s - 1))", "1e-5*s",
])
def test_text_round_trip(source):
    e = parse(source)
    assert parse(text(e)) == e
    assert text(parse(text(e))) == text(e)


def test_floats_are_not_reassociated():
    """s + 1e30 - 1e30 is 0 for a small s, as in eager, and never s."""
    e = sc.sub(sc.add(sc.S, sc.number(1e30)), sc.number(1e30))
    assert evaluate(e, s=1.0) == 0
    assert evaluate(parse("(s + 1) - 1"), s=1e-17) == 0
    assert evaluate(parse("1e-300*(1e300*s)"), s=1e10) == pytest.approx(1e10)  # constants of a score meet
    assert evaluate(parse("3*(s + 1)"), s=1e16) == 3 * (1e16 + 1)


def test_negative_zero_and_nan():
    assert math.copysign(1, float(evaluate(sc.mul(sc.S, sc.number(-1.0)), s=0.0))) == -1
    for build in (sc.minimum, sc.maximum, sc.add, sc.mul):
        assert evaluate(build(sc.S, sc.number(2.0)), s=math.nan).isnan()
    assert not evaluate(sc.relation("<=", sc.S, sc.number(2.0)), s=math.nan)
    assert evaluate(sc.Not(sc.relation("<=", sc.S, sc.number(2.0))), s=math.nan)  # not the same as s > 2
    assert evaluate(sc.mul(sc.number(0.0), sc.S), s=math.inf).isnan()  # 0*x is not 0


# ---------------------------------------------------------------- integers

INTEGER_OPS = ["<", "<=", ">", ">=", "==", "!="]
TERMS = [sc.I, sc.J, sc.I - sc.J, sc.J - sc.I, 2 * sc.I - sc.J, sc.J - sc.I + 3, sc.I + sc.J, sympy.Integer(4), -sc.J, sc.floordiv(sc.J, 3), sc.mod(sc.I, 4) - 2, sc.mod(sc.J - sc.I, -3),
         sc.floordiv(sc.I - sc.J, 2), sc.floordiv(sc.I, -2)]


def grid():
    return torch.arange(7)[:, None], torch.arange(9)


@pytest.mark.parametrize("op", INTEGER_OPS)
def test_integer_relations_keep_their_truth(op):
    """The normal form against Python over a grid, for each pair of terms; equal conditions get equal text."""
    compare = {"<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge, "==": torch.eq, "!=": torch.ne}[op]
    i, j = grid()
    for x in TERMS:
        for y in TERMS:
            a, b = (evaluate(e, i=i, j=j).expand(7, 9) for e in (x, y))
            assert torch.equal(evaluate(sc.relation(op, x, y), i=i, j=j).expand(7, 9), compare(a, b)), f"{x} {op} {y}"


@pytest.mark.parametrize("source,normal", [("i >= j", "j <= i"), ("j - i <= 0", "j <= i"), ("j < i + 1", "j <= i"), ("i - j > -1", "j <= i"), ("i - j + 1 <= 8", "i - j < 8"), ("j + 3 > i + 3", "i < j"), ("2 < 3", "True"),
                                           ("j - j == 0", "True"), ("i != i", "False")])
def test_normal_form_of_relations(source, normal):
    assert text(parse(source)) == normal


def test_floordiv_and_mod_are_floored():
    x = torch.arange(-9, 10)
    for n in (-4, -1, 1, 3):
        assert torch.equal(evaluate(sc.floordiv(sc.T, sympy.Integer(n)), t=x), torch.div(x, n, rounding_mode="floor"))
        assert torch.equal(evaluate(sc.mod(sc.T, sympy.Integer(n)), t=x).expand(x.shape), torch.remainder(x, n))


# ---------------------------------------------------------------- derivatives

SMOOTH = ["0.125*s", "50*tanh(s/50)", "s*s - s", "sigmoid(s)*s", "exp(0.1*s)", "exp2(0.1*s)", "log(s*s + 1)", "sqrt(s*s + 1)", "rsqrt(s*s + 1)", "sin(s)*cos(s)", "erf(s)", "abs(s)*2", "relu(s)", "min(s, 1.5)", "max(s, 0.5)", "s/(1 + s*s)",
          "where(s > 0.7, s, 0.1*s)", "(s*s + 1)**1.5", "s + where(j <= i, 0, -1e9)", "floor(s) + s", "ceil(s)*s", "(2*s - 1)/(s*s + 2) - 3*s"]


@pytest.mark.parametrize("source", SMOOTH)
def test_derivative_against_differences(source):
    e = parse(source)
    derivative = e.diff(sc.S)
    points, step = torch.tensor([-1.9, -0.4, 0.3, 1.2, 2.6], dtype=torch.float64), 1e-6
    env = {"i": torch.tensor(2), "j": torch.tensor(1)}
    numeric = (evaluate(e, s=points + step, **env) - evaluate(e, s=points - step, **env)) / (2 * step)
    torch.testing.assert_close(evaluate(derivative, s=points, **env).to(torch.float64).expand(5), numeric, rtol=1e-6, atol=1e-7)


def test_every_unary_function_has_a_derivative_test():
    assert set(UNARY) <= {name for name in UNARY for source in SMOOTH if name + "(" in source}


# ---------------------------------------------------------------- refused text

HOSTILE = ["__import__('os')", "s.__class__", "().__class__", "open('x')", "lambda: 1", "[s]", "{s: 1}", "s if s else s", "s; s", "exec(s)", "eval('1')", "s := 1", "'text'", "b'1'", "1j", "...", "None", "y", "a", "c", "c0.shape", "c0[b].T",
           "s[0]", "tanh", "tanh(s, s)", "tanh(x=s)", "tanh(*s)", "max(s)", "i < j < s", "s and s", "not s", "s @ s", "s << 1", "s ^ s", "f'{s}'", "(s for s in s)", "await s", "yield", "", "s +", "c9999", "n9999", "c0[", "import os", "s\nimport os"]


@pytest.mark.parametrize("source", HOSTILE)
def test_text_that_is_no_expression(source):
    with pytest.raises(ScalarSyntaxError):
        parse(source)


def test_long_and_deep_text():
    with pytest.raises(ScalarSyntaxError, match="characters"):
        parse("s" + " + s" * MAX_TEXT)
    with pytest.raises(ScalarSyntaxError):
        parse("(" * 4000 + "s" + ")" * 4000)


def test_a_mask_must_be_a_condition():
    with pytest.raises(ScalarSyntaxError, match="condition"):
        parse_mask("s + 1")


def test_errors_say_where():
    with pytest.raises(ScalarSyntaxError, match=r"unknown name 'q'.*position 4"):
        parse("s + q")
