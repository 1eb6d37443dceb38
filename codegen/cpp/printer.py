"""Scalar expressions to C++. The functions it calls are in scalar_math.h.

Integers are ``Int`` (int32 where every size is below 2^24, see `SIZE_LIMIT`, int64 else): a product or sum that could leave 32
bits is widened, so both give the same value. ``&`` and ``|`` on conditions are spelled without short circuit, so that loops
over key positions have no branch and vectorise.
"""
from __future__ import annotations

import math
import struct

import sympy

from ...compiler.ir import scalar as sc
from ...compiler.ir.nodes import UNARY
from ...compiler.ir.printer import ADD, ATOM, COMPARE, MUL, OR, Printer
from ...compiler.ir.printer import UNARY as UNARY_PRECEDENCE

#: unary functions of the language -> C++; one row for every row of ir.nodes.UNARY
FUNCTIONS = {"exp": "exp_of", "exp2": "exp2_of", "log": "log_of", "tanh": "tanh_of", "sigmoid": "sigmoid_of", "sqrt": "sqrt_of", "rsqrt": "rsqrt_of", "sin": "sin_of",
             "cos": "cos_of", "erf": "erf_of", "abs": "absolute", "floor": "floor_of", "ceil": "ceil_of", "relu": "relu_of"}
_WORDS = {"min": "minimum", "max": "maximum", "abs": "absolute", "floordiv": "floor_divide", "mod": "floor_mod", "trunc": "int64_t"}
_PRECISE = {"float": ("f", "f"), "double": ("d", "")}

#: sizes and positions below this are held in int32; 16 million keys of one head are 2 GiB at head dim 32
SIZE_LIMIT = 1 << 24
_INT32 = (1 << 31) - 1
_ANY = 1 << 63


class CppPrinter(Printer):
    """C++ text of an expression.

    names: what stands for a subexpression (a Symbol) instead of its own name.
    load_text: (number of the capture, [index expressions]) -> text of the element's value.
    integer_bound: capture number -> largest magnitude of its elements, for captures of integers.
    real: "float" or "double".
    """

    AND_WORD, OR_WORD, NOT_WORD = " & ", " | ", "!"

    def __init__(self, load_text=None, integer_bound=None, real="float"):
        self.load_text, self.integer_bound, self.real_type = load_text, integer_bound or {}, real

    # leaves -----------------------------------------------------------------------------------
    def float(self, value: float) -> str:
        code, suffix = _PRECISE[self.real_type]
        if math.isfinite(value) and code == "f":
            try:
                value = struct.unpack("f", struct.pack("f", value))[0]
            except OverflowError:  # beyond float32: infinite, as torch.tensor(value) is
                value = math.copysign(math.inf, value)
        if math.isnan(value):
            return f"std::numeric_limits<{self.real_type}>::quiet_NaN()"
        if math.isinf(value):
            return f"{'-' if value < 0 else ''}std::numeric_limits<{self.real_type}>::infinity()"
        return repr(value) + suffix

    def boolean(self, value: bool) -> str:
        return "true" if value else "false"

    def integer(self, value: int) -> str:
        return str(value) if abs(value) <= _INT32 else f"INT64_C({value})"

    def load(self, name, indices):
        return self.load_text(int(name[1:]), indices)

    def function(self, name, arguments):
        return f"{_WORDS.get(name, name)}({', '.join(arguments)})"

    def real(self, e, outer: int = OR) -> str:
        """Text of e as a float, whatever it is."""
        if not sc.is_int(e):
            return self.emit(e, outer)
        if e.is_Integer:
            return self.float(float(int(e))) if e >= 0 or outer <= UNARY_PRECEDENCE else f"({self.float(float(int(e)))})"
        return f"{self.real_type}({self(e)})"

    # the walk: floats get float operands, wide integers get int64 operands, the rest is the base's --
    def _node(self, e):
        if isinstance(e, (sc.fadd, sc.fsub)):
            word = " + " if isinstance(e, sc.fadd) else " - "
            return self.real(e.args[0], ADD) + word + self.real(e.args[1], MUL), ADD
        if isinstance(e, sc.fmul):
            x, y = e.args
            return (f"-{self.real(y, ATOM)}", UNARY_PRECEDENCE) if x == -1 else (f"{self.real(x, MUL)} * {self.real(y, UNARY_PRECEDENCE)}", MUL)
        if isinstance(e, sc.fdiv):
            return f"{self.real(e.args[0], MUL)} / {self.real(e.args[1], UNARY_PRECEDENCE)}", MUL
        if isinstance(e, (sc.fmin, sc.fmax)):
            return self.function("min" if isinstance(e, sc.fmin) else "max", [self.real(x) for x in e.args]), ATOM
        if isinstance(e, sc.call):
            return f"{FUNCTIONS[e.args[0].name]}({self.real(e.args[1])})", ATOM
        if isinstance(e, sc.fpow):
            return self._power(e.args[0], float(e.args[1]))
        if isinstance(e, sc.where):
            condition, x, y = e.args
            text = self if sc.is_int(e) else self.real
            return f"({self(condition)} ? {text(x)} : {text(y)})", ATOM
        if isinstance(e, sc.compare):
            op, x, y = e.args
            return f"{self.real(x, ADD)} {op.name} {self.real(y, ADD)}", COMPARE
        if isinstance(e, (sc.floordiv, sc.mod)) and e.args[1].is_Integer and e.args[1] > 0 and int(e.args[1]).bit_count() == 1:
            n = int(e.args[1])
            inner = self.emit(e.args[0], ATOM)
            return (f"({inner} >> {n.bit_length() - 1})" if isinstance(e, sc.floordiv) else f"({inner} & {n - 1})"), ATOM
        if isinstance(e, (sympy.Add, sympy.Mul, sympy.Pow)) and sc.is_int(e) and self.magnitude(e) > _INT32:
            return self._wide(e)
        return super()._node(e)

    def _wide(self, e):
        if isinstance(e, sympy.Pow):
            base = f"int64_t({self(e.args[0])})"
            return " * ".join([base] * int(e.args[1])), MUL
        parts = sorted(e.args, key=str)
        word, inner, own = (" + ", MUL, ADD) if isinstance(e, sympy.Add) else (" * ", UNARY_PRECEDENCE, MUL)
        return word.join([f"int64_t({self(parts[0])})", *(self.emit(x, inner) for x in parts[1:])]), own

    def _power(self, x, exponent):
        halves = {0.5: "sqrt_of", -0.5: "rsqrt_of"}
        if exponent in halves:
            return f"{halves[exponent]}({self.real(x)})", ATOM
        if exponent == int(exponent) and 0 < exponent <= 64:
            return f"integer_power<{int(exponent)}>({self.real(x)})", ATOM
        return f"__builtin_pow{_PRECISE[self.real_type][1]}({self.real(x)}, {self.float(exponent)})", ATOM  # a libm call: right, but the loop stays scalar

    def magnitude(self, e) -> int:
        """A bound of |e| for an integer expression, with every size and position below SIZE_LIMIT."""
        if e.is_Integer:
            return abs(int(e))
        if e.is_Symbol:
            return SIZE_LIMIT
        if isinstance(e, sc.load):
            return self.integer_bound.get(int(e.args[0].name[1:]), _ANY)
        bounds = [self.magnitude(x) for x in e.args if sc.is_int(x)]
        if isinstance(e, sympy.Add):
            return sum(bounds)
        if isinstance(e, sympy.Mul):
            return math.prod(bounds)
        if isinstance(e, sympy.Pow):
            return bounds[0] ** int(e.args[1])
        if isinstance(e, sc.mod):
            return bounds[1]
        if isinstance(e, sc.trunc):
            return _ANY
        return max(bounds)


assert FUNCTIONS.keys() == UNARY.keys()
