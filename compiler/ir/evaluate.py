"""Scalar expressions on torch tensors: the meaning of the language, used by the reference target and by every test."""
from __future__ import annotations

import functools
import operator

import sympy
import torch
from sympy import And, Not, Or
from sympy.core.relational import Relational

from . import scalar as sc

#: name -> torch function; one row for every row of scalar.UNARY
UNARY = {"exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "sin": torch.sin,
         "cos": torch.cos, "erf": torch.erf, "abs": torch.abs, "floor": torch.floor, "ceil": torch.ceil, "relu": torch.relu}
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}


class Evaluator:
    """Evaluates expressions; ``env`` maps symbol names to tensors or numbers, ``captures`` holds c0, c1, ...

    Floats are computed in ``dtype``, integers in int64; every result broadcasts as its symbols do.
    """

    def __init__(self, env: dict, captures, dtype: torch.dtype, device=None):
        self.captures, self.dtype, self.device, self.memo = captures, dtype, device, {}
        self.env = {name: value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device=device) for name, value in env.items()}

    def __call__(self, e) -> torch.Tensor:
        if e not in self.memo:
            self.memo[e] = self._evaluate(e)
        return self.memo[e]

    def float(self, e) -> torch.Tensor:
        value = self(e)
        return value if value.dtype == self.dtype else value.to(self.dtype)

    def _evaluate(self, e):
        if e is sympy.true or e is sympy.false:
            return torch.tensor(e is sympy.true, device=self.device)
        if e.is_Integer:
            return torch.tensor(int(e), device=self.device)
        if sc.is_const(e):
            return torch.tensor(float(e), dtype=self.dtype, device=self.device)
        if e.is_Symbol:
            return self.env[e.name]
        if isinstance(e, sc.load):
            value = self.captures[int(e.args[0].name[1:])]
            if len(e.args) > 1:
                value = value[tuple(self(index).long() for index in e.args[1:])]
            return value.to(self.dtype) if value.is_floating_point() else value.long()
        if isinstance(e, sc.where):
            c, x, y = e.args
            if sc.is_int(e):
                return torch.where(self(c), self(x), self(y))
            return torch.where(self(c), self.float(x), self.float(y))
        if isinstance(e, sc.call):
            return UNARY[e.args[0].name](self.float(e.args[1]))
        if isinstance(e, sc.trunc):
            return self(e.args[0]).long()
        if isinstance(e, sc.floordiv):
            return torch.div(self(e.args[0]), self(e.args[1]), rounding_mode="floor")
        if isinstance(e, sc.mod):
            return torch.remainder(self(e.args[0]), self(e.args[1]))
        if isinstance(e, sc.fpow):
            return torch.pow(self.float(e.args[0]), float(e.args[1]))
        if isinstance(e, (And, Or)):
            return functools.reduce(operator.and_ if isinstance(e, And) else operator.or_, map(self, e.args))
        if isinstance(e, Not):
            return ~self(e.args[0])
        if isinstance(e, sc.compare):
            return _COMPARE[e.args[0].name](self(e.args[1]), self(e.args[2]))
        if isinstance(e, Relational):
            return _COMPARE[e.rel_op](self(e.args[0]), self(e.args[1]))
        if isinstance(e, sympy.Abs):
            return torch.abs(self(e.args[0]))
        for node, op in ((sc.fadd, torch.add), (sc.fsub, torch.sub), (sc.fmul, torch.mul), (sc.fdiv, torch.div), (sc.fmin, torch.minimum), (sc.fmax, torch.maximum)):
            if isinstance(e, node):
                return op(self.float(e.args[0]), self.float(e.args[1]))
        return self._algebra(e)

    def _algebra(self, e):
        """sympy's own nodes: integer arithmetic, and the sums and products that a derivative makes."""
        for node, op in ((sympy.Add, operator.add), (sympy.Mul, operator.mul), (sympy.Min, torch.minimum), (sympy.Max, torch.maximum)):
            if isinstance(e, node):
                of = self if sc.is_int(e) else self.float
                return functools.reduce(op, map(of, e.args))
        if isinstance(e, sympy.Rational):
            return torch.tensor(float(e), dtype=self.dtype, device=self.device)
        if isinstance(e, sympy.Pow):
            return torch.pow(self.float(e.args[0]), float(e.args[1]))
        raise TypeError(f"no meaning for {type(e).__name__} {e}")
