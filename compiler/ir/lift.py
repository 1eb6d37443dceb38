"""Lifting: the value of a tensor at an index, as a scalar expression.

``Lift.at(node, (b, h, i, j))`` walks back from a node of the captured graph through pointwise ops, casts, views and gathers,
composing the index expression on the way, until it ends in positions (arange), constants, contractions (a dot product, left
as a symbol) and tensors that come from outside (a capture, ``c0[b, j]``). A padding mask expanded to [B, 1, T, T] ends as
``c0[b, j]``, a causal mask as ``j <= i``, T5's bias as ``c0[bucket(j - i), h]``.

An op is a row of `ROWS` (or of `POINTWISE`): (lift, node, idx) -> expression. An op without a row, or one whose meaning cannot
be kept exactly (`Unliftable`), becomes a capture at that node: always right, only less compact.
"""
from __future__ import annotations

import dataclasses
import math
import operator

import sympy
import torch
from sympy import And, Integer, Not, Or, Symbol
from torch.fx import Node

from . import scalar as sc
from .graph import is_tensor, shape, size, value
from .unliftable import Unliftable
from .views import VIEWS, broadcast_index

aten = torch.ops.aten
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HALVES = (torch.float16, torch.bfloat16)
_WIDE_INTS = (torch.int32, torch.int64)
_NARROW_INTS = (torch.int8, torch.uint8, torch.int16)
MAX_LEVEL = 48  # ops on the way to an element: Python's stack holds a thousand calls, and an op takes five of them here and more in a printer
MAX_TREE = 6000  # nodes of an expression as a tree: sympy walks x + sin(x) of x + sin(x) of ... in time that doubles with every op


@dataclasses.dataclass(frozen=True)
class Dot:
    """A contraction met on the way: node[index] = sum over d of lhs[lhs_index] * rhs[rhs_index]."""

    node: Node
    index: tuple
    symbol: Symbol
    lhs: Node
    lhs_index: tuple
    rhs: Node
    rhs_index: tuple
    d: Symbol
    length: sympy.Expr


class Lift:
    """Lifts values to expressions. ``ranges``: inclusive range of every index symbol; grows with the reduction index ``d``.

    captures: node -> symbol; dots: every contraction met.
    """

    def __init__(self, ranges: dict):
        self.ranges = dict(ranges)
        self.captures: dict[Node, Symbol] = {}
        self.row_sums: dict = {}  # core.RowSum -> Symbol
        self.dots: dict[Symbol, Dot] = {}
        self._memo: dict[tuple, sympy.Basic] = {}
        self._extent: dict[sympy.Basic, tuple[int, int]] = {}
        self._level = 0

    def at(self, x, index=()):
        """The value of x (a node or a Python number) at an index."""
        if not isinstance(x, Node):
            return self.scalar(x)
        index = tuple(index)
        key = (x, index)
        if key not in self._memo:
            if not is_tensor(x):
                result = self._scalar_node(x)
            else:
                self._level += 1
                try:
                    if self._level > MAX_LEVEL:
                        raise Unliftable("too long a chain of operations")
                    result = self._lift(x, index)
                    if self.extent(result)[0] > MAX_TREE:
                        raise Unliftable("too large an expression")
                except Unliftable:
                    result = self.capture(x, index)
                finally:
                    self._level -= 1
            self._memo[key] = result
        return self._memo[key]

    def extent(self, e) -> tuple[int, int]:
        """(number of nodes, height) of an expression as a tree."""
        if e not in self._extent:
            parts = [self.extent(a) for a in e.args if a.args]
            self._extent[e] = 1 + len(e.args) + sum(n for n, _ in parts), 1 + max((h for _, h in parts), default=0)
        return self._extent[e]

    def path(self, symbols) -> set[Node]:
        """The visited nodes whose value depends on these symbols."""
        return {node for (node, _), e in self._memo.items() if e.free_symbols & symbols}

    def scalar(self, x):
        if isinstance(x, (bool, int, float)):
            return sc.number(x)
        if isinstance(x, torch.SymInt):
            return size(x)
        raise Unliftable(f"a scalar of type {type(x).__name__}")

    def _scalar_node(self, node):
        """A SymInt is its size expression; a SymFloat is the element of the tensor it was read from."""
        known = value(node)
        if isinstance(known, (int, float, bool)):
            return sc.number(known)
        if isinstance(known, torch.SymInt) and node.target is not aten.item.default:
            return size(known)
        if node.op == "call_function" and node.target in (aten.item.default, aten._local_scalar_dense.default):
            return self.at(node.args[0], (Integer(0),) * value(node.args[0]).dim())
        if node.op == "call_function" and node.target in _SCALAR_OPS:
            return _SCALAR_OPS[node.target](*(self.at(a) for a in node.args))
        raise Unliftable(f"the scalar {node}")

    def _lift(self, node, index):
        if node.op == "get_attr":
            return self._constant(node)
        if node.op != "call_function":
            raise Unliftable
        if node.target in POINTWISE:
            if value(node).dtype in _NARROW_INTS and node.target not in _CHOICES:
                raise Unliftable("integers that wrap at 8 or 16 bits")
            operands = _compared(node) if node.target in COMPARISONS else node.args
            result = POINTWISE[node.target](*(self.broadcast(a, index) for a in operands), **{k: self.at(v) for k, v in node.kwargs.items() if k == "alpha"})
            return self.cast(result, value(node).dtype) if value(node).dtype in (*_HALVES, torch.bool) else result  # True + True is True
        row = ROWS.get(node.target)
        if row is None:
            raise Unliftable
        return row(self, node, index)

    def _constant(self, node):
        """A number that the model wrote as a tensor, torch.tensor(-1e9): it is known now."""
        known = getattr(node.graph.owning_module, node.target, None)
        if type(known) is not torch.Tensor or known.dim() != 0 or known.is_complex():
            raise Unliftable
        return self.scalar(known.item())

    def broadcast(self, x, index):
        """x at an index of the tensor it broadcasts to."""
        if not is_tensor(x):
            return self.at(x)
        return self.at(x, broadcast_index(x, index, self.ranges))

    def row_sum(self, what) -> Symbol:
        """The symbol of a sum over the head dim of every query, a tensor [B, H, Tq] that is made with the op."""
        return self.row_sums.setdefault(what, Symbol(f"row_sum_{len(self.row_sums)}", finite=True))

    def capture(self, node, index):
        """The element as data: sizes of one are dropped, so that [B, 1, 1, T] reads c0[b, j]."""
        if not is_tensor(node):
            raise Unliftable
        if node not in self.captures:
            integer = not value(node).dtype.is_floating_point
            if value(node).dtype.is_complex:
                raise Unliftable("a complex tensor")
            known = {"integer": True} if integer else {"finite": True} if _is_weight(node) else {}  # a weight is no mask in disguise
            self.captures[node] = Symbol(f"tensor_{node.name}", **known)
        element = sc.load(self.captures[node], *(e for e, n in zip(index, shape(node)) if n != 1))
        return sc.relation("!=", element, Integer(0)) if value(node).dtype == torch.bool else element

    def dot(self, node, index, lhs, lhs_index, rhs, rhs_index, d, length):
        """A contraction as a symbol; ``d`` is its reduction index, from `reduction_index`."""
        symbol = Symbol(f"dot{len(self.dots)}", real=True)
        self.dots[symbol] = Dot(node, tuple(index), symbol, lhs, tuple(lhs_index), rhs, tuple(rhs_index), d, length)
        return symbol

    def data_index(self, position, n, wraps: bool):
        """A position in [0, n) that is read from data. Here such gathers stay with the model's own, which checks them; a kernel may check itself."""
        raise Unliftable("a gather at positions that are data")

    def reduction_index(self, length):
        """A new index over [0, length)."""
        d = Symbol(f"d{len(self.dots)}", integer=True, nonnegative=True)
        self.ranges[d] = (Integer(0), length - 1)
        return d

    def cast(self, e, dtype):
        """A value in another dtype: constants are rounded to it, integers are cut, conditions compared; floats keep their value."""
        if dtype == torch.bool:
            return sc.as_condition(e)
        if dtype in _WIDE_INTS:
            return e if sc.is_bool(e) else sc.to_int(e)
        if dtype not in FLOATS:
            raise Unliftable(f"a cast to {dtype}")
        if sc.is_bool(e):
            return sc.select(e, Integer(1), Integer(0))
        if sc.is_const(e):
            return sc.number(torch.tensor(float(e), dtype=torch.float64).to(dtype).item())
        if isinstance(e, sc.where):
            return sc.select(e.args[0], self.cast(e.args[1], dtype), self.cast(e.args[2], dtype))
        if sc.is_int(e) and dtype in _HALVES:  # 257 is not a bfloat16: positions would be rounded
            raise Unliftable(f"integers as {dtype}")
        return e


_KEEP_WEIGHTS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.to.dtype, aten.mul.Tensor, aten.sigmoid.default, aten.tanh.default, aten.pow.Tensor_Tensor, aten.cat.default)


_SUMS = (aten.linear.default, aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.addmm.default, aten.einsum.default)


def _is_weight(node) -> bool:
    """A parameter, a lookup, view, cast or product of parameters, or a contraction: far from the size of a mask constant."""
    if node.target in _SUMS:
        return True
    if node.op in ("placeholder", "get_attr"):
        return node.meta.get("is_weight", False)  # set by capture
    if node.target in (aten.full.default, aten.scalar_tensor.default):
        return all(abs(x) < 1e20 for x in node.args if isinstance(x, (int, float)))
    sources = [a for a in node.all_input_nodes if is_tensor(a) and value(a).dtype.is_floating_point]
    return bool(sources) and (node.target in VIEWS or node.target in _KEEP_WEIGHTS) and all(map(_is_weight, sources))


# ---------------------------------------------------------------- pointwise rows: op -> builder of expressions


def _scaled(build):
    return lambda x, y, alpha=Integer(1): build(x, y if alpha == 1 else sc.mul(alpha, y))


def _bitwise(build):
    def row(x, y):
        if not (sc.is_bool(x) and sc.is_bool(y)):
            raise Unliftable("bits of integers")
        return build(x, y)

    return row


def _logical(build):
    return lambda x, y: build(sc.as_condition(x), sc.as_condition(y))


def _not(x):
    if not sc.is_bool(x):
        raise Unliftable("bits of integers")
    return Not(x)


def _unary(name):
    return lambda x: sc.unary(name, x)


def _compared(node) -> list:
    """What a comparison compares: it happens in the common dtype, so 0.1 next to a bfloat16 tensor is 0.10009765625."""
    dtype = torch.result_type(*(value(a) if isinstance(a, Node) else a for a in node.args))
    if dtype in _HALVES and any(is_tensor(a) and value(a).dtype != dtype for a in node.args):
        raise Unliftable(f"a comparison that rounds an operand to {dtype}")
    return [torch.tensor(a, dtype=dtype).item() if isinstance(a, (int, float)) and dtype.is_floating_point else a for a in node.args]


def _divided(build):
    """Integers, by what cannot be zero: torch raises an error there, a processor stops the program. torch's // and % of floats are those of
    fmod, exact: 1 // 0.1 is 9 while floor(1 / 0.1) is 10."""
    def row(x, y):
        if not (sc.is_int(x) and sc.is_int(y)):
            raise Unliftable("an exact remainder of floats")
        if y.has(sc.load) or y == 0:
            raise Unliftable("a division by what may be zero")
        return build(x, y)

    return row


def _power(x, y):
    if sc.is_const(y) and not (sc.is_int(x) and y.is_Integer and y != 2):  # int ** int is an int
        return sc.power(x, y)
    if sc.is_const(x) and float(x) > 0 and math.frexp(float(x))[0] == 0.5:  # ALiBi's slopes, 2**y or 0.25**y: exact
        return sc.unary("exp2", sc.mul(sc.number(math.log2(float(x))), y))
    raise Unliftable("a power with a varying exponent: exp2(log2(x)*y) loses digits, 3e-3 of an angle for rotary's 10000**y at position 4096")


POINTWISE = {
    aten.add.Tensor: _scaled(sc.add), aten.add.Scalar: _scaled(sc.add), aten.sub.Tensor: _scaled(sc.sub), aten.sub.Scalar: _scaled(sc.sub),
    aten.rsub.Scalar: _scaled(lambda x, y: sc.sub(y, x)), aten.rsub.Tensor: _scaled(lambda x, y: sc.sub(y, x)),
    aten.mul.Tensor: sc.mul, aten.mul.Scalar: sc.mul, aten.div.Tensor: sc.div, aten.div.Scalar: sc.div, aten.neg.default: sc.neg,
    aten.floor_divide.default: _divided(sc.integer_floordiv), aten.floor_divide.Scalar: _divided(sc.integer_floordiv),
    aten.remainder.Tensor: _divided(sc.integer_mod), aten.remainder.Scalar: _divided(sc.integer_mod),
    aten.pow.Tensor_Scalar: _power, aten.pow.Scalar: _power, aten.pow.Tensor_Tensor: _power, aten.square.default: lambda x: sc.mul(x, x), aten.reciprocal.default: lambda x: sc.div(Integer(1), x),
    aten.minimum.default: sc.minimum, aten.maximum.default: sc.maximum, aten.min.other: sc.minimum, aten.max.other: sc.maximum,
    aten.le.Tensor: lambda x, y: sc.relation("<=", x, y), aten.le.Scalar: lambda x, y: sc.relation("<=", x, y),
    aten.lt.Tensor: lambda x, y: sc.relation("<", x, y), aten.lt.Scalar: lambda x, y: sc.relation("<", x, y),
    aten.ge.Tensor: lambda x, y: sc.relation(">=", x, y), aten.ge.Scalar: lambda x, y: sc.relation(">=", x, y),
    aten.gt.Tensor: lambda x, y: sc.relation(">", x, y), aten.gt.Scalar: lambda x, y: sc.relation(">", x, y),
    aten.eq.Tensor: lambda x, y: sc.relation("==", x, y), aten.eq.Scalar: lambda x, y: sc.relation("==", x, y),
    aten.ne.Tensor: lambda x, y: sc.relation("!=", x, y), aten.ne.Scalar: lambda x, y: sc.relation("!=", x, y),
    aten.__and__.Tensor: _bitwise(And), aten.bitwise_and.Tensor: _bitwise(And), aten.__or__.Tensor: _bitwise(Or), aten.bitwise_or.Tensor: _bitwise(Or),
    aten.logical_and.default: _logical(And), aten.logical_or.default: _logical(Or), aten.logical_xor.default: _logical(lambda x, y: Or(And(x, Not(y)), And(Not(x), y))),
    aten.bitwise_not.default: _not, aten.logical_not.default: lambda x: Not(sc.as_condition(x)),
    aten.where.self: sc.select, aten.where.ScalarOther: sc.select, aten.where.ScalarSelf: sc.select, aten.where.Scalar: sc.select,
    aten.masked_fill.Scalar: lambda x, c, y: sc.select(c, y, x), aten.masked_fill.Tensor: lambda x, c, y: sc.select(c, y, x),
    aten.exp.default: _unary("exp"), aten.exp2.default: _unary("exp2"), aten.log.default: _unary("log"), aten.tanh.default: _unary("tanh"),
    aten.sigmoid.default: _unary("sigmoid"), aten.sqrt.default: _unary("sqrt"), aten.rsqrt.default: _unary("rsqrt"), aten.sin.default: _unary("sin"),
    aten.cos.default: _unary("cos"), aten.erf.default: _unary("erf"), aten.abs.default: _unary("abs"), aten.floor.default: _unary("floor"),
    aten.ceil.default: _unary("ceil"), aten.relu.default: _unary("relu"),
}

_CHOICES = (aten.where.self, aten.masked_fill.Tensor, aten.masked_fill.Scalar, aten.minimum.default, aten.maximum.default)
COMPARISONS = {target for target in POINTWISE if target._schema.name.split("::")[1] in ("le", "lt", "ge", "gt", "eq", "ne")}

_SCALAR_OPS = {operator.add: sc.add, operator.sub: sc.sub, operator.mul: sc.mul, operator.truediv: sc.div, operator.neg: sc.neg, operator.floordiv: sc.integer_floordiv,
               operator.pow: _power, torch.sym_float: lambda x: x, torch.sym_sqrt if hasattr(torch, "sym_sqrt") else "sym_sqrt": lambda x: sc.unary("sqrt", x)}

#: op -> (lift, node, index) -> expression; filled by lift_rows.py
ROWS: dict = {}


def row(*targets):
    """Decorator: the function is the row of these ops."""
    def register(function):
        for target in targets:
            ROWS[target] = function
        return function

    return register


from . import lift_rows  # noqa: E402,F401  (fills ROWS)
