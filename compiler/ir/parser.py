"""Text of the scalar language to its tree.

Text is read with `ast` over a fixed list of node types and names; nothing in it is ever evaluated as Python.
"""
from __future__ import annotations

import ast
import functools
import re

from sympy import And, Not, Or

from ..errors import ScalarSyntaxError
from .nodes import UNARY
from .scalar import (
    NAMES,
    accumulator_symbol,
    add,
    as_condition,
    capture_symbol,
    div,
    integer_floordiv,
    integer_mod,
    is_bool,
    is_const,
    load,
    maximum,
    minimum,
    mul,
    neg,
    number,
    power,
    relation,
    select,
    size_symbol,
    sub,
    to_int,
    unary,
    value_of,
)

_BINARY = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: div, ast.FloorDiv: integer_floordiv, ast.Mod: integer_mod, ast.Pow: power,
           ast.BitAnd: lambda x, y: And(as_condition(x), as_condition(y)), ast.BitOr: lambda x, y: Or(as_condition(x), as_condition(y))}
_COMPARE = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
#: functions of the language: name -> (number of arguments, builder)
_CALLS = {"where": (3, select), "min": (2, minimum), "max": (2, maximum), "trunc": (1, to_int), "floordiv": (2, integer_floordiv), "mod": (2, integer_mod),
          **{name: (1, lambda x, name=name: unary(name, x)) for name in UNARY}}
MAX_TEXT = 20_000

@functools.lru_cache(4096)
def parse(text: str, integer_captures: frozenset[int] = frozenset()):
    """Text to tree. ``integer_captures``: numbers k whose tensor c{k} holds integers or booleans. Raises ScalarSyntaxError."""
    if len(text) > MAX_TEXT:
        raise ScalarSyntaxError(f"an expression of {len(text)} characters", text=text[:40] + "...", cure=f"at most {MAX_TEXT} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return _build(tree, text, integer_captures)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        position = getattr(error, "offset", None)
        raise ScalarSyntaxError(f"no expression: {error}", text=text, position=position - 1 if position else None, cure="docs/scalar-language.md shows the language") from None

def _build(node, text, ints):
    def fail(what):
        raise ScalarSyntaxError(what, text=text, position=getattr(node, "col_offset", 0), cure="the names are s b h i j Tq Tk n0.. c0[..], of attention's values and keys v k d, of a matrix product x r u a0.. p0.., and " + " ".join(_CALLS))

    if isinstance(node, ast.Constant):
        if isinstance(node.value, (bool, int, float)):
            return number(node.value)
        fail(f"a literal {node.value!r}")
    if isinstance(node, ast.Name):
        if node.id in NAMES:
            return NAMES[node.id]
        if (accumulator := accumulator_symbol(node.id)) is not None:
            return accumulator
        if node.id in ("inf", "nan"):
            return number(float(node.id))
        if re.fullmatch(r"n\d{1,3}", node.id):
            return size_symbol(int(node.id[1:]))
        if re.fullmatch(r"c\d{1,3}", node.id):  # a captured scalar
            return load(capture_symbol(int(node.id[1:]), int(node.id[1:]) in ints))
        fail(f"unknown name {node.id!r}")
    if isinstance(node, ast.Subscript):
        if not (isinstance(node.value, ast.Name) and re.fullmatch(r"c\d{1,3}", node.value.id)):
            fail("only captures c0, c1, ... can be indexed")
        indices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        k = int(node.value.id[1:])
        return load(capture_symbol(k, k in ints), *(_build(index, text, ints) for index in indices))
    if isinstance(node, ast.UnaryOp):
        x = _build(node.operand, text, ints)
        if isinstance(node.op, ast.USub):
            return number(-value_of(x)) if is_const(x) else neg(x)
        if isinstance(node.op, ast.Invert):
            return Not(as_condition(x))
        fail("unknown operator")
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_build(node.left, text, ints), _build(node.right, text, ints))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        return relation(_COMPARE[type(node.ops[0])], _build(node.left, text, ints), _build(node.comparators[0], text, ints))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS and not node.keywords:
        arity, build = _CALLS[node.func.id]
        if len(node.args) != arity:
            fail(f"{node.func.id} takes {arity} argument(s)")
        return build(*(_build(argument, text, ints) for argument in node.args))
    fail(f"{type(node).__name__} is not part of the language")

def parse_mask(text: str, integer_captures: frozenset[int] = frozenset()):
    """Text to a condition; a number is refused."""
    mask = parse(text, integer_captures)
    if not is_bool(mask):
        raise ScalarSyntaxError("a mask must be a condition", text=text, cure="compare it, as in c0[b, j] != 0")
    return mask
