"""Scalar expressions to text. `Text` prints the language itself (parse(text(e)) == e); codegen/ derives its C++ and Triton printers from `Printer`."""
from __future__ import annotations

import sympy
from sympy import And, Not, Or
from sympy.core.relational import Relational

from . import scalar as sc

# precedence of Python's operators that the language uses, loosest first
OR, AND, COMPARE, ADD, MUL, UNARY, POW, ATOM = range(8)


class Printer:
    """Walks a tree and gives text; a target overrides the leaves and the words."""

    AND_WORD, OR_WORD, NOT_WORD = " & ", " | ", "~"
    PRECEDENCE_OF_COMPARE = COMPARE

    def __call__(self, expr) -> str:
        return self.emit(expr, OR)

    # leaves and words, for targets to override -----------------------------------------------
    def integer(self, value: int) -> str:
        return str(value)

    def float(self, value: float) -> str:
        text = repr(value)
        return text[:-2] if text.endswith(".0") else text

    def boolean(self, value: bool) -> str:
        return str(value)

    def symbol(self, symbol) -> str:
        return symbol.name

    def load(self, name: str, indices: list) -> str:
        return f"{name}[{', '.join(map(self, indices))}]" if indices else name

    def function(self, name: str, arguments: list[str]) -> str:
        return f"{name}({', '.join(arguments)})"

    def where(self, condition: str, x: str, y: str) -> str:
        return self.function("where", [condition, x, y])

    def power(self, x, exponent: float) -> str:
        return f"{self.emit(x, ATOM)}**{self.float(exponent)}"

    def true_div(self, x, y) -> str:
        return f"{self.emit(x, MUL)}/{self.emit(y, UNARY)}"

    # the walk ---------------------------------------------------------------------------------
    def emit(self, expr, outer: int) -> str:
        text, precedence = self._node(expr)
        return f"({text})" if precedence < outer else text

    def _node(self, e) -> tuple[str, int]:
        if e is sympy.true or e is sympy.false:
            return self.boolean(e is sympy.true), ATOM
        if e.is_Integer:
            return self.integer(int(e)), ATOM if e >= 0 else UNARY
        if sc.is_const(e):
            value = float(e)
            return self.float(value), UNARY if value < 0 else ATOM
        if e.is_Symbol:
            return self.symbol(e), ATOM
        if isinstance(e, sc.load):
            return self.load(e.args[0].name, list(e.args[1:])), ATOM
        if isinstance(e, sc.where):
            c, x, y = e.args
            return self.where(self(c), self(x), self(y)), ATOM
        if isinstance(e, sc.call):
            return self.function(e.args[0].name, [self(e.args[1])]), ATOM
        if isinstance(e, (sc.floordiv, sc.mod)):
            return self.function(type(e).__name__, [self(x) for x in e.args]), ATOM
        if isinstance(e, sc.trunc):
            return self.function("trunc", [self(e.args[0])]), ATOM
        if isinstance(e, (sc.fmin, sympy.Min)):
            return self._nest("min", e.args), ATOM
        if isinstance(e, (sc.fmax, sympy.Max)):
            return self._nest("max", e.args), ATOM
        if isinstance(e, sympy.Abs):
            return self.function("abs", [self(e.args[0])]), ATOM
        if isinstance(e, sc.fadd):
            x, y = e.args
            return f"{self.emit(x, ADD)} + {self.emit(y, MUL)}", ADD  # the right operand in brackets: a + (b + c) is not (a + b) + c
        if isinstance(e, sc.fsub):
            x, y = e.args
            return f"{self.emit(x, ADD)} - {self.emit(y, MUL)}", ADD
        if isinstance(e, sc.fmul):
            x, y = e.args
            if sc.equals(x, -1):
                return f"-{self.emit(y, UNARY)}", UNARY
            return f"{self.emit(x, MUL)}*{self.emit(y, UNARY)}", MUL
        if isinstance(e, sc.fdiv):
            return self.true_div(*e.args), MUL
        if isinstance(e, sc.fpow):
            return self.power(e.args[0], float(e.args[1])), POW
        if isinstance(e, sc.compare):
            op, x, y = e.args
            return self._compare(op.name, x, y), self.PRECEDENCE_OF_COMPARE
        if isinstance(e, Relational):
            return self._compare({"==": "==", "!=": "!="}.get(e.rel_op, e.rel_op), *e.args), self.PRECEDENCE_OF_COMPARE
        if isinstance(e, Not):
            return f"{self.NOT_WORD}{self.emit(e.args[0], ATOM)}", UNARY
        if isinstance(e, (And, Or)):
            word, own = (self.AND_WORD, AND) if isinstance(e, And) else (self.OR_WORD, OR)
            parts = sorted((self.emit(x, ATOM) for x in e.args), key=lambda t: ("c" in t, len(t), t))  # loads last: cheap tests first
            return word.join(parts), own
        if isinstance(e, sympy.Add):
            return self._sum(e), ADD
        if isinstance(e, sympy.Mul):
            return self._product(e)
        if isinstance(e, sympy.Pow) and e.args[1].is_Integer and e.args[1] > 0:
            return "*".join([self.emit(e.args[0], UNARY)] * int(e.args[1])), MUL
        raise TypeError(f"no text for {type(e).__name__} {e}")

    def _nest(self, name, arguments):
        ordered = sorted(map(self, arguments)) if name else []
        text = ordered[-1]
        for other in reversed(ordered[:-1]):
            text = self.function(name, [other, text])
        return text

    def _compare(self, op, x, y):
        return f"{self.emit(x, ADD)} {op} {self.emit(y, ADD)}"

    def _sum(self, e):
        constant, rest = e.as_coeff_Add()
        terms = sorted(sympy.Add.make_args(rest), key=lambda t: (t.could_extract_minus_sign(), str(t)))
        if constant != 0:
            terms.append(constant)
        text = self.emit(terms[0], ADD)
        for term in terms[1:]:
            text += f" - {self.emit(-term, MUL)}" if term.could_extract_minus_sign() else f" + {self.emit(term, MUL)}"
        return text

    def _product(self, e):
        coefficient, factors = e.as_coeff_Mul()
        if coefficient.is_Rational and not coefficient.is_Integer:  # from a derivative: p/q stays exact
            return self.true_div(coefficient.p * factors, sympy.Integer(coefficient.q)), MUL
        parts = [self.emit(f, UNARY) for f in sorted(sympy.Mul.make_args(factors), key=str)]
        if coefficient == -1:
            return "-" + "*".join(parts), UNARY
        if coefficient != 1:
            parts.insert(0, self.emit(coefficient, UNARY))
        return "*".join(parts), MUL



class Text(Printer):
    """The language's own spelling."""


_TEXT = Text()


def text(expr) -> str:
    """The expression in the scalar language; ``parse(text(e))`` gives e back."""
    return _TEXT(expr)
