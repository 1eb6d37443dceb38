"""The text ``key`` of an attention kernel: what rows of keys are taken for where they are read into fp32.

Two ways. A sum or product of elements and captures that run along the channels is written as vectors: for all positions of a group, whose scales are found once, straight from what is stored. Any other
text changes the rows [D] that were read before, in a cache: one loop over channels a row. A condition of positions alone (are these keys still floats elsewhere?) is a branch around the loop, so that a
row reads what it needs.
"""
from __future__ import annotations

import math

import sympy
import torch

from ...compiler.ir import scalar as sc
from .score import Captures, Placement, definitions, locals_of

_ALONG = (sc.D, sc.K)
_VECTOR_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)  # of load_vector

_STAGE = """
// `count` rows of the keys [first, first + count) of the head h of keys, from `from`, of which `stored` are in memory: the others are 0
static __attribute__((noinline)) void take_keys(const Call& call, const KeyElement* from, int stored, float* rows, int64_t distance, int64_t b, int64_t h, int64_t first, int count) {
    const int64_t* stride = call.k_stride[0];
%s    for (int n = 0; n < count; ++n)
        for (int d = 0; d < round_up(D, VL); d += VL) store_vector(rows + n * distance + d, n < stored ? gather_vector(from + n * stride[2] + d * stride[3], stride[3], D - d) : Vector{});
%s
}
"""


_FOLD = "static bool fold_keys(const Call& call, const float* q, int rows, int64_t batch, int64_t head, int64_t first, int count, float* folded, float* added) {"
_NO_FOLD = "INLINE bool fold_keys(const Call&, const float*, int, int64_t, int64_t, int64_t, int, float*, float*) { return false; }\n"


def key_source(captures: Captures, key: sympy.Expr | None) -> str:
    """``take_keys``: rows of keys by their text, read and changed."""
    if key is None:
        return "\n".join(["constexpr bool KEY_TEXT = false;  // keys are what is stored", "INLINE void take_keys(const Call&, const KeyElement*, int, float*, int64_t, int64_t, int64_t, int64_t, int) {}", _NO_FOLD])
    placement = Placement(key, moving=_ALONG)
    (key,) = placement.exprs
    units = captures.units(placement, sc.D)
    ways = [("int32_t, true", ["call.is_narrow", *units])] * bool(units) + [("int32_t, false", ["call.is_narrow"]), ("int64_t, false", [])]
    vectors = _vector_source(captures, placement, key)
    narrow = " && ".join(["D % VL == 0", "stored == count", "stride[3] == 1", "call.is_narrow", *units])
    return "\n".join([
        "constexpr bool KEY_TEXT = true;", *vectors, *_fold_source(captures, placement, key, bool(vectors), units), *_row_source(captures, placement, key),
        _STAGE % (f"    if ({narrow}) return take_vectors(call, from, stride[2], rows, distance, b, h, first, count);\n" if vectors else "",
                  "\n".join(f"    {'if (' + ' && '.join(conditions) + ') ' if conditions else ''}return take_rows<{flags}>(call, rows, distance, b, h, first, count);" for flags, conditions in ways)), ""])


def _row_source(captures, placement, key) -> list[str]:
    """``take_rows``: rows in fp32, in place, by a loop over channels that the compiler may vectorise."""
    printer = captures.printer(along=sc.D)

    def taken(e, indent) -> list[str]:
        space = " " * indent
        if _is_choice(e, placement):
            return [f"{space}if ({printer(e.args[0])}) {{", *taken(e.args[1], indent + 4), f"{space}}} else {{", *taken(e.args[2], indent + 4), f"{space}}}"]
        needed = _needed(e, placement.key)
        runs = _runs(captures, needed)
        rest = [(symbol, value) for symbol, value in needed if symbol not in runs]
        body = [f"{space}    const auto {symbol.name} = element({symbol.name}_row[n * {_step(value)}]);" for symbol, value in runs.items()] + definitions(rest, printer, indent + 4)
        return [*_pointers(captures, printer, runs, space), "#pragma GCC ivdep", f"{space}for (int n = 0; n < D; ++n) {{", *([f"{space}    const Int d = n;"] if any(x.has(sc.D) for x in (e, *(value for _, value in rest))) else []),
                *([f"{space}    const float k = key[n];"] if e.has(sc.K) or any(value.has(sc.K) for _, value in rest) else []), *body, f"{space}    key[n] = {printer.real(e)};", f"{space}}}"]

    return ["template <class Int, bool unit>",
            "static void take_rows(const Call& call, float* __restrict rows, int64_t distance, int64_t batch, int64_t head, int64_t first, int count) {",
            *locals_of([*placement.values, key], "Int", {"b": "batch", "h": "head"}), "    for (int row = 0; row < count; ++row) {", "        float* __restrict key = rows + row * distance;",
            *_position(placement, key), *definitions(placement.row, captures.printer(), 8), *taken(key, 8), "    }", "}"]


def _vector_source(captures, placement, key) -> list[str]:
    """``take_vectors``: from stored elements to rows, as many positions at a time as take the same captures; nothing where the text has more than sums and products of what runs along the channels."""
    printer = captures.printer(along=sc.D)
    leaves = []

    def collect(e, conditions):
        if _is_choice(e, placement):
            collect(e.args[1], [*conditions, e.args[0]])
            collect(e.args[2], [*conditions, e.args[0]])
        else:
            leaves.append((e, conditions))

    collect(key, [])
    for e, _ in leaves:
        needed = _needed(e, placement.key)
        if not _is_sum(e) or len(_runs(captures, needed)) != len(needed) or any(captures.dtypes[int(value.args[0].name[1:])] not in _VECTOR_DTYPES for _, value in needed):
            return []
    row_values = dict(placement.row)

    def taken(e, conditions, indent) -> list[str]:
        space = " " * indent
        if _is_choice(e, placement):
            inner = [*conditions, row_values.get(e.args[0], e.args[0])]
            return [f"{space}if ({printer(e.args[0])}) {{", *taken(e.args[1], inner, indent + 4), f"{space}}} else {{", *taken(e.args[2], inner, indent + 4), f"{space}}}"]
        runs, size = _runs(captures, _needed(e, placement.key)), _group(placement, e, conditions)
        together = []
        if size != 1:  # 0: the same for all positions
            together = [f"{space}together = {f'int(smaller(count - row, {size} - j % {size}))' if size else 'count - row'};"]
            if conditions:
                again = " || ".join(f"({printer(c)}) != ({printer(c.xreplace({sc.J: sc.J + sympy.Symbol('ahead', integer=True)}))})" for c in conditions)
                together += [f"{space}const Int ahead = together - 1;", f"{space}if ({again}) together = 1;  // each condition holds from a position on, or up to one"]
        return [*_pointers(captures, printer, runs, space), *together, f"{space}for (int r = row; r < row + together; ++r) {{",  # rows in the order of memory: by columns of vectors it is 0.1 ms more for 3 MB that are in no cache
                "#pragma GCC unroll 8", f"{space}    for (int n = 0; n < D; n += VL) {{", *(f"{space}        const Vector {symbol.name} = load_vector({symbol.name}_row + n);" for symbol in runs),
                *([f"{space}        const Vector k = load_vector(from + r * step + n);"] if e.has(sc.K) else []), f"{space}        store_vector(rows + r * distance + n, {printer.real(e)} + Vector{{}});", f"{space}    }}", f"{space}}}"]

    return ["static void take_vectors(const Call& call, const KeyElement* from, int64_t step, float* __restrict rows, int64_t distance, int64_t batch, int64_t head, int64_t first, int count) {",
            "    using Int = int32_t;", "    constexpr bool unit = true;", *locals_of([*placement.values, key], "Int", {"b": "batch", "h": "head"}),
            "    for (int row = 0, together; row < count; row += together) {", "        together = 1;", *_position(placement, key), *definitions(placement.row, captures.printer(), 8), *taken(key, [], 8), "    }", "}"]


def _group(placement, e, conditions) -> int:
    """So many neighbours from a multiple on take the same; 1 where that is not known, 0: all."""
    row_values = dict(placement.row)
    read = [e, *(value for _, value in _needed(e, placement.key))]
    read += [row_values[symbol] for x in (*read, *conditions) for symbol in x.free_symbols if symbol in row_values]
    parts = {a for x in read for a in x.atoms(sc.floordiv) if a.args[0] == sc.J and a.args[1].is_Integer and a.args[1] > 0}
    if any(x.xreplace({a: sympy.Integer(0) for a in parts}).has(sc.J) for x in read) or not all(isinstance(c, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)) and (c.lhs - c.rhs).diff(sc.J).is_Integer for c in conditions):
        return 1
    return math.gcd(*(int(a.args[1]) for a in parts))


def _fold_source(captures, placement, key, vectors: bool, units) -> list[str]:
    """``fold_keys``: where `count` neighbours are all k*a + b with the same a and b, ``folded`` is q*a and ``added`` q . b, so that q . key is folded . k + added and k is read as it is stored.

    For int8 alone: its elements are at most 128, and the terms, which are added in another order, of the size of the sums that they make. A k of 1e6 with a b of -1e6 would be lost.
    """
    row_values, printer = dict(placement.row), captures.printer(along=sc.D)

    def taken(e, conditions, indent) -> list[str]:
        space = " " * indent
        if _is_choice(e, placement):
            inner = [*conditions, row_values.get(e.args[0], e.args[0])]
            return [f"{space}if ({printer(e.args[0])}) {{", *taken(e.args[1], inner, indent + 4), f"{space}}} else {{", *taken(e.args[2], inner, indent + 4), f"{space}}}"]
        size, parts = _group(placement, e, conditions), _affine(e)
        if size == 1 or parts is None:
            return [f"{space}return false;"]
        runs, (a, b) = _runs(captures, _needed(e, placement.key)), parts
        ahead = sympy.Symbol("ahead", integer=True)
        same = [f"({printer(c)}) == ({printer(c.xreplace({sc.J: sc.J + ahead}))})" for c in conditions] + ([f"count <= {size} - j % {size}"] if size else [])
        return [*([f"{space}const Int ahead = count - 1;"] if conditions else []), *([f"{space}if (!({' && '.join(same)})) return false;"] if same else []), *_pointers(captures, printer, runs, space),
                f"{space}for (int r = 0; r < rows; ++r) {{", f"{space}    Vector total = {{}};", "#pragma GCC unroll 8", f"{space}    for (int n = 0; n < D; n += VL) {{", f"{space}        const Vector x = load_vector(q + r * D + n);",
                *(f"{space}        const Vector {symbol.name} = load_vector({symbol.name}_row + n);" for symbol in runs), f"{space}        store_vector(folded + r * D + n, x * ({printer.real(a)} + Vector{{}}));",
                *([f"{space}        total += x * ({printer.real(b)} + Vector{{}});"] if b != 0 else []), f"{space}    }}", f"{space}    added[r] = sum_of(total);", f"{space}}}", f"{space}return true;"]

    body = taken(key, [], 4) if vectors else []
    if not any("return true" in line for line in body):
        return [_NO_FOLD]
    needed = " && ".join(["std::is_same_v<KeyElement, int8_t>", "D % VL == 0", "call.is_narrow", *units])
    return [_FOLD, f"    if (!({needed})) return false;", "    using Int = int32_t;", "    constexpr bool unit = true;", "    constexpr int row = 0;", *locals_of([*placement.values, key], "Int", {"b": "batch", "h": "head"}), *_position(placement, key),
            *definitions(placement.row, captures.printer(), 4), *body, "}"]


def _affine(e):
    """(a, b) with e = k*a + b, neither with k in it; None where there are none, or no k."""
    def parts(e):
        if not e.has(sc.K):
            return sympy.Integer(0), e
        if e == sc.K:
            return sympy.Integer(1), sympy.Integer(0)
        if isinstance(e, (sc.fadd, sc.fsub)):
            (a, b), (c, d) = map(parts, e.args)
            return tuple((_plus if isinstance(e, sc.fadd) else _minus)(x, y) for x, y in ((a, c), (b, d)))
        if isinstance(e, sc.fmul) and not all(x.has(sc.K) for x in e.args):
            x, y = e.args if e.args[0].has(sc.K) else e.args[::-1]
            return tuple(p if p == 0 else sc.mul(p, y) for p in parts(x))
        if isinstance(e, sc.fdiv) and not e.args[1].has(sc.K):
            return tuple(p if p == 0 else sc.div(p, e.args[1]) for p in parts(e.args[0]))
        raise ValueError(e)

    try:
        return parts(e) if e.has(sc.K) else None
    except ValueError:  # a square of k
        return None


def _plus(x, y):
    return y if x == 0 else x if y == 0 else sc.add(x, y)


def _minus(x, y):
    return x if y == 0 else sc.neg(y) if x == 0 else sc.sub(x, y)


def _is_choice(e, placement) -> bool:
    """where, of a condition that is the same for all channels of a row"""
    return isinstance(e, sc.where) and not e.args[0].has(*_ALONG, *(symbol for symbol, _ in placement.key))


def _is_sum(e) -> bool:
    """Sums, differences, products and quotients of numbers alone: what vectors have operators for."""
    return not e.has(sc.D) and (e.is_Symbol or sc.is_const(e) or isinstance(e, (sc.fadd, sc.fsub, sc.fmul, sc.fdiv)) and all(map(_is_sum, e.args)))


def _position(placement, key) -> list[str]:
    return ["        const Int j = Int(first) + row;"] if any(x.has(sc.J) for x in (key, *placement.values)) else []


def _runs(captures, needed) -> dict:
    """The loads that run along the channels: read at a pointer of the row, whose computation GCC does not move out of the loop by itself."""
    return {symbol: value for symbol, value in needed if isinstance(value, sc.load) and any(captures.runs(value.args[1:], n, sc.D) for n in range(len(value.args) - 1))}


def _pointers(captures, printer, runs, space) -> list[str]:
    at_zero = {symbol: [sympy.Integer(0) if x == sc.D else x for x in value.args[1:]] for symbol, value in runs.items()}
    return [f"{space}const auto* __restrict {symbol.name}_row = &{captures.place(printer, int(value.args[0].name[1:]), at_zero[symbol])};" for symbol, value in runs.items()]


def _step(element) -> str:
    """The distance of a capture's elements along the channels."""
    dim = element.args[1:].index(sc.D)
    return f"(unit ? 1 : call.{element.args[0].name}_stride[{dim}])"


def _needed(e, defined) -> list:
    """Those of the definitions, in their order, that e reads."""
    wanted, found = set(e.free_symbols), []
    for symbol, value in reversed(defined):
        if symbol in wanted:
            found.append((symbol, value))
            wanted |= value.free_symbols
    return found[::-1]
