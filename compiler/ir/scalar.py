"""The scalar language: what an attention variant does to one score, as text, as a tree and as algebra.

A *score* is a float expression of the raw dot product and of where it stands, a *mask* a boolean one:

    score = "50*tanh(0.00125*s)"          mask = "(j <= i) & (i - j < 4096)"

Names: ``s`` raw dot product q.k; ``b h i j`` batch, query head, query position, key position; ``Tq Tk`` the number of query
and key positions; ``n0 n1 ...`` integer scalars; ``c0[b, j]`` an element of the captured tensor c0 (indices are expressions).

Integers and booleans are plain sympy: over them reassociation is exact. **Floats are not**: sympy flattens sums and
distributes numbers over them, and ``s + 3.4e38*m - 3.4e38`` evaluated from the left loses ``s``. So every float operation is
an ordered node of its own (`FloatOp`), with the few simplifications that keep the value, and its derivative in ``fdiff``, so
that ``sympy.diff`` works through it.

Build nodes with the builders below (add, mul, relation, select, ...), never with the classes: the builders hold the normal form.
"""
from __future__ import annotations

import functools
import math
import operator
import re

import sympy
from sympy import And, Eq, Float, Ge, Gt, Integer, Le, Lt, Ne, Not, Or, Symbol
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction

from .nodes import FloatOp, call, compare, fadd, fdiv, floordiv, fmax, fmin, fmul, fpow, fsub, load, mod, trunc, where

S = Symbol("s", real=True)
B, H, I, J = (Symbol(name, integer=True, nonnegative=True) for name in "bhij")
TQ, TK = (Symbol(name, integer=True, positive=True) for name in ("Tq", "Tk"))
T = Symbol("t", integer=True)  # the variable of a table, see table.py
X, R, U = (Symbol(name, real=True) for name in "xru")  # of a matrix product's prologue: element, reciprocal deviation and mean of its row; see linear.py
V = Symbol("v", real=True)  # an element of attention's values, in its text ``value`` alone
K, D = Symbol("k", real=True), Symbol("d", integer=True, nonnegative=True)  # an element of attention's keys and its place in the head dim, in the text ``key`` alone
NAMES = {symbol.name: symbol for symbol in (S, B, H, I, J, TQ, TK, T, X, R, U, V, K, D)}
_ACCUMULATOR = re.compile(r"[ap](\d{1,2})")


def accumulator_symbol(name: str) -> Symbol | None:
    """The symbol of ``a0``, an accumulator of a matrix product, or ``p0``, its partner column; None for other names."""
    return Symbol(name, real=True) if _ACCUMULATOR.fullmatch(name) else None


def accumulator_number(symbol: Symbol) -> int | None:
    """0 of a0 and p0."""
    found = _ACCUMULATOR.fullmatch(symbol.name)
    return int(found[1]) if found else None


def size_symbol(k: int) -> Symbol:
    """The symbol ``n{k}`` of an integer scalar that is known only at run time."""
    return Symbol(f"n{k}", integer=True)


def capture_symbol(k: int, integer: bool = False) -> Symbol:
    """The symbol ``c{k}`` of a captured tensor; ``integer`` for bool and integer dtypes."""
    return Symbol(f"c{k}", integer=True) if integer else Symbol(f"c{k}")

#: unary functions on Python floats, to fold constants
_EVAL = {"exp": math.exp, "exp2": lambda x: 2.0**x, "log": math.log, "tanh": math.tanh, "sigmoid": lambda x: 1 / (1 + math.exp(-x)), "sqrt": math.sqrt,
         "rsqrt": lambda x: 1 / math.sqrt(x), "sin": math.sin, "cos": math.cos, "erf": math.erf, "abs": abs, "floor": math.floor, "ceil": math.ceil,
         "relu": lambda x: max(x, 0.0)}


# ---------------------------------------------------------------- kinds and constants


def is_bool(x) -> bool:
    """Is x a condition? (A sympy Symbol is a Boolean to isinstance, hence the list.)"""
    return isinstance(x, (Relational, BooleanFunction, BooleanAtom))


def is_const(x) -> bool:
    """Is x a number, infinities and NaN included?"""
    return isinstance(x, sympy.Expr) and (x.is_Number or x is sympy.nan)


def is_int(x) -> bool:
    """Is x an integer expression, over which sympy may reassociate?"""
    return not is_bool(x) and not isinstance(x, FloatOp) and not isinstance(x, Float) and x not in (sympy.oo, -sympy.oo, sympy.nan) and bool(x.is_integer)


def number(value):
    """A Python number as a leaf; floats keep their 53 bits, infinities and NaN included."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return Integer(value)
    if math.isnan(value):
        return sympy.nan
    if math.isinf(value):
        return sympy.oo if value > 0 else -sympy.oo
    return Float(value)


def equals(x, n: int) -> bool:
    """Is x the number n, as an Integer or a Float? (To sympy Float(1) == 1 is false.)"""
    return is_const(x) and x is not sympy.nan and float(x) == n


def value_of(x) -> float | int:
    """The Python number of a constant leaf."""
    return int(x) if x.is_Integer else float(x)


# ---------------------------------------------------------------- builders: the only way to make nodes


def _fold(f, *constants):
    try:
        return number(float(f(*map(float, map(value_of, constants)))))
    except (ZeroDivisionError, OverflowError, ValueError):
        return None


def _through_where(build, x, y):
    """op(where(c, 1, 0), const) -> where(c, op(1, const), op(0, const)): constant branches fold, the value is the same."""
    for inner, rebuild in ((x, lambda leaf: build(leaf, y)), (y, lambda leaf: build(x, leaf))):
        other = y if inner is x else x
        if isinstance(inner, where) and is_const(inner.args[1]) and is_const(inner.args[2]) and is_const(other):
            return select(inner.args[0], rebuild(inner.args[1]), rebuild(inner.args[2]))
    return None


def _as_value(x):
    return select(x, Integer(1), Integer(0)) if is_bool(x) else x


def add(x, y):
    """x + y."""
    x, y = _as_value(x), _as_value(y)
    if is_int(x) and is_int(y):
        return x + y
    if is_const(x) and is_const(y) and (folded := _fold(operator.add, x, y)) is not None:
        return folded
    if is_const(x):
        x, y = y, x
    if equals(y, 0):  # x + 0 -> x
        return x
    if (moved := _through_where(add, x, y)) is not None:
        return moved
    if is_const(y) and float(value_of(y)) < 0:
        return fsub(x, number(-float(value_of(y))))
    if not x.has(S) and y.has(S):
        x, y = y, x
    return fadd(x, y)


def sub(x, y):
    """x - y."""
    x, y = _as_value(x), _as_value(y)
    if is_int(x) and is_int(y):
        return x - y
    if is_const(y):
        return add(x, number(-float(value_of(y))))
    if (moved := _through_where(sub, x, y)) is not None:
        return moved
    return fsub(x, y)


def mul(x, y):
    """x * y; constants fold, and stand first."""
    x, y = _as_value(x), _as_value(y)
    if is_int(x) and is_int(y):
        return x * y
    if is_const(x) and is_const(y) and (folded := _fold(operator.mul, x, y)) is not None:
        return folded
    if is_const(y):
        x, y = y, x
    if equals(x, 1):  # 1*x -> x
        return y
    if (moved := _through_where(mul, x, y)) is not None:
        return moved
    if is_const(x) and isinstance(y, fmul) and is_const(y.args[0]) and _is_score(y):  # c1*(c2*s) -> (c1*c2)*s
        return mul(mul(x, y.args[0]), y.args[1])
    return fmul(x, y)


def div(x, y):
    """x / y in floats. A division by a power of two is a product, exactly; one of a score by any constant too, at most 1 ulp away."""
    x, y = _as_value(x), _as_value(y)
    if is_const(x) and is_const(y) and (folded := _fold(operator.truediv, x, y)) is not None:
        return folded
    if is_const(y) and not equals(y, 0) and y not in (sympy.oo, -sympy.oo, sympy.nan) and (_is_score(x) or abs(math.frexp(float(y))[0]) == 0.5):
        return mul(number(1.0 / float(value_of(y))), x)
    if (moved := _through_where(div, x, y)) is not None:
        return moved
    return fdiv(x, y)


def _is_score(e) -> bool:
    """Does e depend on a dot product? Its rounding is that of a sum in any order; a position's is not (rotary multiplies it by thousands)."""
    return any(symbol.is_real and not symbol.is_integer for symbol in e.free_symbols)


def neg(x):
    """-x."""
    return mul(Integer(-1), x)


def minimum(x, y):
    """min(x, y); a NaN on either side gives NaN, as in torch."""
    return _extremum(min, sympy.Min, fmin, minimum, x, y)


def maximum(x, y):
    """max(x, y); a NaN on either side gives NaN, as in torch."""
    return _extremum(max, sympy.Max, fmax, maximum, x, y)


def _extremum(fold, integer_op, float_op, build, x, y):
    x, y = _as_value(x), _as_value(y)
    if is_const(x) and is_const(y) and not (x is sympy.nan or y is sympy.nan):
        return x if fold(value_of(x), value_of(y)) == value_of(x) else y
    if is_int(x) and is_int(y):
        return integer_op(x, y)
    moved = _through_where(build, x, y)
    return moved if moved is not None else float_op(x, y)


def power(x, y):
    """x ** y for a constant y."""
    if equals(y, 1):
        return x
    if is_const(x) and is_const(y) and (folded := _fold(operator.pow, x, y)) is not None:
        return folded
    if equals(y, 2):
        return mul(x, x)
    return fpow(x, y)


def unary(name: str, x):
    """A function of the table `UNARY` applied to x."""
    x = _as_value(x)
    if name == "abs" and is_int(x):
        return sympy.Abs(x)
    if name in ("floor", "ceil") and is_int(x):
        return x
    if is_const(x) and (folded := _fold(_EVAL[name], x)) is not None:
        return folded
    if isinstance(x, where) and is_const(x.args[1]) and is_const(x.args[2]):
        return select(x.args[0], unary(name, x.args[1]), unary(name, x.args[2]))
    return call(Symbol(name), x)


def to_int(x):
    """x cut to an integer."""
    x = _as_value(x)
    if is_int(x):
        return x
    if is_const(x) and math.isfinite(float(x)):
        return Integer(math.trunc(float(x)))
    return trunc(x)


def select(condition, x, y):
    """where(condition, x, y)."""
    condition = as_condition(condition)
    if condition is sympy.true or x == y:
        return x
    if condition is sympy.false:
        return y
    if _is_first(condition) and is_int(x) and is_int(y) and sympy.expand(y.xreplace({condition.args[0]: Integer(0)}) - x) == 0:
        return y  # where(k < 1, f(0), f(k)) -> f(k)
    if is_bool(x) and is_bool(y):
        return Or(And(condition, x), And(Not(condition), y))
    return where(condition, _as_value(x), _as_value(y))


def _is_first(condition) -> bool:
    """k <= 0 (the normal form of k < 1) of a symbol that counts from 0."""
    return isinstance(condition, Le) and condition.args[0].is_Symbol and bool(condition.args[0].is_nonnegative) and condition.args[1] == 0


def as_condition(x):
    """x as a condition: itself, or x != 0."""
    if is_bool(x):
        return x
    if isinstance(x, where) and is_const(x.args[1]) and is_const(x.args[2]):
        return select(x.args[0], as_condition(x.args[1]), as_condition(x.args[2]))
    return relation("!=", x, Integer(0))


_SYMPY_RELATION = {"<": Lt, "<=": Le, ">": Gt, ">=": Ge, "==": Eq, "!=": Ne}
_PYTHON_RELATION = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}


def relation(op: str, x, y):
    """x op y. Relations of integers are brought to one form (``j <= i``, ``i - j < 8``); relations of floats keep theirs, because of NaN."""
    x, y = _as_value(x), _as_value(y)
    if is_const(x) and is_const(y):
        return number(bool(_PYTHON_RELATION[op](value_of(x), value_of(y))))
    for inner, other, flip in ((x, y, False), (y, x, True)):
        if isinstance(inner, where) and is_const(inner.args[1]) and is_const(inner.args[2]) and is_const(other):
            branches = [relation(op, *((other, leaf) if flip else (leaf, other))) for leaf in inner.args[1:]]
            return select(inner.args[0], *branches)
    if not (is_int(x) and is_int(y)):
        return compare(Symbol(op), x, y)
    return _integer_relation(op, x, y)


def _integer_relation(op, x, y):
    if op in (">", ">="):
        x, y, op = y, x, {">": "<", ">=": "<="}[op]
    difference = sympy.expand(x - y)
    constant, terms = difference.as_coeff_Add()
    if not constant.is_Integer:
        constant, terms = Integer(0), difference
    bound = -constant  # terms op bound
    if terms == 0:
        return number(bool(_PYTHON_RELATION[op](0, int(bound))))
    if op in ("==", "!="):
        if terms.could_extract_minus_sign():
            terms, bound = -terms, -bound
        return _SYMPY_RELATION[op](*_sides(terms, bound))
    if op == "<":
        bound = bound - 1  # over the integers x < n is x <= n - 1
    if bound == 0:
        return Le(*_sides(terms, bound))
    if bound == -1:
        return Lt(*_sides(terms, Integer(0)))
    return Lt(terms, bound + 1) if bound > 0 else Ge(-terms, -bound)


def _sides(terms, bound):
    """j - i <= 0 reads better as j <= i."""
    if bound != 0:
        return terms, bound
    negative = [t for t in sympy.Add.make_args(terms) if t.could_extract_minus_sign()]
    return terms - sympy.Add(*negative), -sympy.Add(*negative)


def integer_floordiv(x, y):
    """x // y on integers."""
    return floordiv(x, y) if is_int(x) and is_int(y) else unary("floor", fdiv(x, y))


def integer_mod(x, y):
    """x % y on integers; on floats x - floor(x/y)*y as torch.remainder."""
    return mod(x, y) if is_int(x) and is_int(y) else sub(x, mul(unary("floor", fdiv(x, y)), y))


def loads(expr) -> list:
    """Every distinct element access in the expression, in a stable order."""
    return sorted(expr.atoms(load), key=str)


def ordered(expr):
    """A derivative with the floats that sympy added and multiplied as nodes in an order."""
    if not expr.args or is_bool(expr):
        return expr
    if is_int(expr):
        return expr
    args = [ordered(x) for x in expr.args]
    if isinstance(expr, sympy.Add):
        return functools.reduce(add, args)
    if isinstance(expr, sympy.Mul):
        return functools.reduce(mul, args)
    if isinstance(expr, sympy.Pow):
        return power(args[0], args[1]) if float(args[1]) > 0 else div(number(1), power(args[0], number(-value_of(args[1]))))
    return expr.func(*args)
