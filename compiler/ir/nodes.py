"""The nodes of a scalar expression. Built by the functions of scalar.py only, which hold the normal form.

Integers and booleans are plain sympy. Floats are `FloatOp`: each keeps its place and has its derivative in ``fdiff``.
"""
from __future__ import annotations

import math

from sympy import Float, Function, Integer, Symbol
from sympy.logic.boolalg import BooleanFunction


class load(Function):
    """``c0[b, j]``: load(c0, b, j), an element of a captured tensor."""

    def _eval_is_integer(self):
        return self.args[0].is_integer


class floordiv(Function):
    """``x // n`` on integers."""

    @classmethod
    def eval(cls, x, n):
        if n == 1:
            return x
        if x.is_Integer and n.is_Integer and n != 0:
            return Integer(int(x) // int(n))

    def _eval_is_integer(self):
        return True

    def _eval_is_nonnegative(self):
        return True if self.args[0].is_nonnegative and self.args[1].is_positive else None


class mod(Function):
    """``x % n`` on integers, with the sign of ``n`` (Python's and torch's remainder)."""

    @classmethod
    def eval(cls, x, n):
        if n == 1:
            return Integer(0)
        if x.is_Integer and n.is_Integer and n != 0:
            return Integer(int(x) % int(n))

    def _eval_is_integer(self):
        return True

    def _eval_is_nonnegative(self):
        return True if self.args[1].is_positive else None


class trunc(Function):
    """A float cut to an integer (``tensor.long()``)."""

    def _eval_is_integer(self):
        return True


class where(Function):
    """``where(condition, x, y)``."""

    def fdiff(self, argindex):
        return where(self.args[0], Integer(1), Integer(0)) if argindex == 2 else where(self.args[0], Integer(0), Integer(1))

    def _eval_is_integer(self):
        return self.args[1].is_integer and self.args[2].is_integer

    def _eval_derivative(self, symbol):
        condition, x, y = self.args
        dx, dy = x.diff(symbol), y.diff(symbol)
        return dx if dx == dy else where(condition, dx, dy)


class FloatOp(Function):
    """A float operation that keeps its place: no reassociation, no distribution."""

    @classmethod
    def _should_evalf(cls, arg):  # sympy would look up fadd, fdiv, ... in mpmath, which has them, and raise on 1/0
        return -1


class fadd(FloatOp):
    def fdiff(self, argindex):
        return Integer(1)


class fsub(FloatOp):
    def fdiff(self, argindex):
        return Integer(1) if argindex == 1 else Integer(-1)


class fmul(FloatOp):
    def fdiff(self, argindex):
        return self.args[2 - argindex]


class fdiv(FloatOp):
    def fdiff(self, argindex):
        x, y = self.args
        return fdiv(Integer(1), y) if argindex == 1 else fmul(Integer(-1), fdiv(x, fmul(y, y)))


class fmin(FloatOp):
    def fdiff(self, argindex):
        x, y = self.args
        return where(compare(_LE, x, y), *((Integer(1), Integer(0)) if argindex == 1 else (Integer(0), Integer(1))))


class fmax(FloatOp):
    def fdiff(self, argindex):
        x, y = self.args
        return where(compare(_GE, x, y), *((Integer(1), Integer(0)) if argindex == 1 else (Integer(0), Integer(1))))


class fpow(FloatOp):
    """``x ** y`` with a constant exponent."""

    def fdiff(self, argindex):
        x, y = self.args
        if argindex == 2:
            raise NotImplementedError("the derivative by an exponent is not needed: exponents are constants")
        return fmul(y, fpow(x, Float(float(y) - 1)))


class call(FloatOp):
    """``tanh(x)``: call(tanh, x), a unary function of the table `UNARY`."""

    @property
    def free_symbols(self):  # the function's name is no variable
        return self.args[1].free_symbols

    def _eval_derivative(self, symbol):
        name, x = self.args
        dx = x.diff(symbol)
        return Integer(0) if dx == 0 else UNARY[name.name](x, self) * dx


class compare(BooleanFunction):
    """A comparison of floats: compare(op, x, y). Unlike sympy's relations its negation is not rewritten, because NaN."""

    @classmethod
    def eval(cls, *args):
        return None

    @property
    def free_symbols(self):  # the operator is no variable
        return self.args[1].free_symbols | self.args[2].free_symbols


_LE, _GE = Symbol("<="), Symbol(">=")

#: unary functions: name -> derivative(x, f(x)). A new row needs a row in ir/evaluate.py and one in codegen/expr.py (a test holds it).
UNARY = {
    "exp": lambda x, y: y,
    "exp2": lambda x, y: fmul(Float(math.log(2)), y),
    "log": lambda x, y: fdiv(Integer(1), x),
    "tanh": lambda x, y: fsub(Integer(1), fmul(y, y)),
    "sigmoid": lambda x, y: fmul(y, fsub(Integer(1), y)),
    "sqrt": lambda x, y: fdiv(Float(0.5), y),
    "rsqrt": lambda x, y: fmul(Float(-0.5), fmul(y, fmul(y, y))),
    "sin": lambda x, y: call(Symbol("cos"), x),
    "cos": lambda x, y: fmul(Integer(-1), call(Symbol("sin"), x)),
    "erf": lambda x, y: fmul(Float(2 / math.sqrt(math.pi)), call(Symbol("exp"), fmul(Integer(-1), fmul(x, x)))),
    "abs": lambda x, y: where(compare(_GE, x, Integer(0)), Integer(1), Integer(-1)),
    "floor": lambda x, y: Integer(0),
    "ceil": lambda x, y: Integer(0),
    "relu": lambda x, y: where(compare(Symbol(">"), x, Integer(0)), Integer(1), Integer(0)),
}
