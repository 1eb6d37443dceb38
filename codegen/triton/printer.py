"""Scalar expressions to Triton text.

Captures are loaded in place: ``c0[b, j]`` is ``tl.load(c0_ptr + b*c0_s0 + j*c0_s1)``, floats cast to fp32, integers and
booleans to int64. Loads that do not move with the key are hoisted by the template, which hands their names in ``hoisted``.
"""
from __future__ import annotations

import math
import struct


from ...compiler.ir import scalar as sc
from ...compiler.ir.printer import ATOM, MUL, UNARY as UNARY_PRECEDENCE, Printer

LOG2E = 1 / math.log(2)
FP32_MAX = 3.4028234e38

#: name -> text of the function on fp32 {x}; one row for every row of scalar.UNARY. Nothing here is from libdevice: every row
#: runs on cuda, on hip and in the interpreter.
UNARY = {
    "exp": "tl.exp({x})",
    "exp2": "tl.exp2({x})",
    "log": "tl.log({x})",
    "tanh": "tanh({x})",
    "sigmoid": "1.0/(1.0 + tl.exp(-({x})))",  # exp overflows to inf for x < -88, and 1/inf is the limit
    "sqrt": "tl.sqrt_rn({x})",
    "rsqrt": "tl.rsqrt({x})",
    "sin": "tl.sin({x})",
    "cos": "tl.cos({x})",
    "erf": "tl.erf({x})",
    "abs": "tl.abs({x})",
    "floor": "tl.floor({x})",
    "ceil": "tl.ceil({x})",
    "relu": "tl.maximum({x}, 0.0, propagate_nan=tl.PropagateNan.ALL)",
}

#: name -> source of a function that a generated module defines where it is used
HELPERS = {
    "tanh": '''@triton.jit
def tanh(x):
    """Below 0.3 its odd polynomial (next term 5e-8 relative): 1 - 2/(e^2x + 1) cancels there. Large |x| saturates, NaN stays."""
    y = x * x
    small = x * (1.0 + y * (-0.33333333 + y * (0.13333333 + y * (-0.053968254 + y * 0.021869488))))
    return tl.where(tl.abs(x) < 0.3, small, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))
''',
    "floordiv": '''@triton.jit
def floordiv(x, n):
    """x // n rounded down; Triton's // rounds towards zero."""
    q = x // n
    r = x - q * n
    return q - tl.where((r != 0) & ((r < 0) != (n < 0)), 1, 0)
''',
    "mod": '''@triton.jit
def mod(x, n):
    """x % n with the sign of n."""
    r = x - x // n * n
    return r + tl.where((r != 0) & ((r < 0) != (n < 0)), n, 0)
''',
}


def float_text(value: float) -> str:
    """A float32 literal: Triton makes a Python float outside of fp32's range an fp64 tensor, which is slow and not meant."""
    if math.isnan(value) or math.isinf(value):
        return f'float("{value}")'
    try:
        rounded = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return f'float("{"-" if value < 0 else ""}inf")'
    return "0.0" if abs(rounded) < 2.0**-126 else repr(rounded)  # kernels flush subnormals


class TritonText(Printer):
    """Prints over tensors and scalars of Triton.

    names:   symbol -> text ("i" -> "rows"); others keep their own name
    guards:  symbol -> text that is true where an index with this symbol is inside its tensor ("j" -> "j < Tk")
    hoisted: load -> name of the value loaded before the loop
    After printing, ``helpers`` holds the functions of HELPERS in use, ``wrapped`` the (capture, dim) whose size is read.
    """

    def __init__(self, names: dict | None = None, guards: dict | None = None, hoisted: dict | None = None):
        self.names, self.guards, self.hoisted = names or {}, guards or {}, hoisted or {}
        self.helpers: set[str] = set()
        self.wrapped: set[tuple[int, int]] = set()

    def float(self, value: float) -> str:
        return float_text(value)

    def symbol(self, symbol) -> str:
        return self.names.get(symbol.name, symbol.name)

    def _node(self, e):
        if e in self.hoisted:
            return self.hoisted[e], ATOM
        if isinstance(e, sc.load):
            return self._load(e, condition=None), ATOM
        if isinstance(e, sc.where) and isinstance(e.args[1], sc.load) and e.args[1] not in self.hoisted:
            condition = self(e.args[0])  # the load itself is conditional: its index may be out of range elsewhere
            return self.where(condition, self._load(e.args[1], condition), self(e.args[2])), ATOM
        if isinstance(e, sc.call):
            return self._call(e.args[0].name, e.args[1])
        if isinstance(e, (sc.floordiv, sc.mod)) and e.args[0].is_nonnegative and e.args[1].is_positive:
            word = "//" if isinstance(e, sc.floordiv) else "%"  # rounding towards zero is rounding down
            return f"{self.emit(e.args[0], MUL)} {word} {self.emit(e.args[1], UNARY_PRECEDENCE)}", MUL
        return super()._node(e)

    def function(self, name, arguments):
        if name in HELPERS:
            self.helpers.add(name)
            return f"{name}({', '.join(arguments)})"
        if name in ("min", "max"):
            return f"tl.{name}imum({', '.join(arguments)}, propagate_nan=tl.PropagateNan.ALL)"
        if name == "trunc":
            return f"tl.cast({arguments[0]}, tl.int64)"
        if name in ("where", "abs"):
            return f"tl.{name}({', '.join(arguments)})"
        raise TypeError(f"no Triton text for {name}")

    def _call(self, name, x):
        text = f"tl.cast({self(x)}, tl.float32)" if sc.is_int(x) else self(x)
        if name in HELPERS:
            self.helpers.add(name)
        return UNARY[name].format(x=text), MUL if name == "sigmoid" else ATOM

    def power(self, x, exponent):
        special = {0.5: "sqrt", -0.5: "rsqrt"}.get(exponent)
        if special:
            return self._call(special, x)[0]
        if exponent.is_integer() and 1 <= abs(exponent) <= 8:
            product = "*".join([self.emit(x, UNARY_PRECEDENCE)] * int(abs(exponent)))
            return f"(1.0/({product}))" if exponent < 0 else f"({product})"
        if exponent.is_integer():  # |x|**n with the sign of an odd power
            size = f"tl.exp2({self.float(exponent)}*tl.log2(tl.abs({self(x)})))"
            return f"tl.where({self(x)} < 0, -{size}, {size})" if exponent % 2 else size
        return f"tl.exp2({self.float(exponent)}*tl.log2({self(x)}))"  # NaN for x < 0, as torch.pow

    def true_div(self, x, y):
        left = f"tl.cast({self(x)}, tl.float32)" if sc.is_int(x) else self.emit(x, MUL)
        return f"{left} / {self.emit(y, ATOM)}"

    def _load(self, e, condition):
        k = int(e.args[0].name[1:])
        offset = "".join(f" + tl.cast({self._index(k, axis, index)}, tl.int64)*c{k}_s{axis}" for axis, index in enumerate(e.args[1:]))
        used = [text for name, text in self.guards.items() if e.has(sc.NAMES[name])]
        if condition is not None:
            used.append(condition)
        guard = f", mask={' & '.join(f'({text})' for text in used)}, other=0" if used else ""
        return f"tl.load(c{k}_ptr{offset}{guard}).to({'tl.int64' if sc.is_int(e) else 'tl.float32'})"

    def _index(self, k, axis, index):
        text = self(index)
        if index.is_nonnegative:
            return text
        self.wrapped.add((k, axis))  # an index from the end, as torch reads it
        return f"tl.where({text} < 0, {text} + c{k}_n{axis}, {text})"


def fold_log2e(e):
    """log2(e) * e with the factor moved into constants, or None where a finite value could become infinite by it.

    exp(x - m) is exp2(fold(x) - fold(m)): one multiplication an element less. A bias tensor may hold -3.4e38 (finfo.min), of
    which 1.44 times is -inf, so scores with such loads are kept in natural units.
    """
    if sc.is_const(e):
        value = float(sc.value_of(e))
        return sc.number(value * LOG2E) if not math.isfinite(value) or abs(value) < FP32_MAX / LOG2E else None
    if isinstance(e, (sc.fadd, sc.fsub)):
        parts = [fold_log2e(x) for x in e.args]
        return None if None in parts else e.func(*parts)
    if isinstance(e, sc.where):
        parts = [fold_log2e(x) for x in e.args[1:]]
        return None if None in parts else sc.where(e.args[0], *parts)
    if isinstance(e, sc.fmul) and sc.is_const(e.args[0]):
        if isinstance(e.args[1], sc.load) or not _bounded(e.args[1]):
            return None
        return sc.fmul(sc.number(float(sc.value_of(e.args[0])) * LOG2E), e.args[1])
    return sc.fmul(sc.number(LOG2E), e) if _bounded(e) else None


def _bounded(e) -> bool:
    """Is 1.44 times e finite wherever e is, for any values a model can hold?"""
    float_loads = [x for x in sc.loads(e) if not sc.is_int(x)]
    if not float_loads:
        return True
    # ALiBi: slope * (j - i). A slope that overflows times 1.44 overflows by itself at one and a half times the distance. And a
    # captured scale: c0 * s. Other loads may hold finfo.min.
    per_head = all(not x.has(sc.I, sc.J) for x in float_loads)
    return isinstance(e, sc.fmul) and per_head and any(x == sc.S or (sc.is_int(x) and x.has(sc.I, sc.J)) for x in e.args)
