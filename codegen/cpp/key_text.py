"""The text ``key`` of an attention kernel: what the rows of keys that have just been read into fp32 are taken for.

Rows are [D], in a cache: one loop over channels a row, which becomes vector instructions where captures run along with them. A condition of positions alone (are these keys still floats elsewhere?) is
a branch around the loop, so that a row reads what it needs.
"""
from __future__ import annotations

import sympy

from ...compiler.ir import scalar as sc
from .score import Captures, Placement, definitions, locals_of

_ALONG = (sc.D, sc.K)


def key_source(captures: Captures, key: sympy.Expr | None) -> str:
    """``take_keys``: ``count`` rows of the keys [first, first + count) of head h, in place."""
    signature = "const Call& call, float* rows, int64_t distance, int64_t b, int64_t h, int64_t first, int count"
    if key is None:
        return f"constexpr bool KEY_TEXT = false;  // keys are what is stored\nINLINE void take_keys({', '.join(x.rsplit(' ', 1)[0] for x in signature.split(', '))}) {{}}\n"
    placement = Placement(key, moving=_ALONG)
    (key,) = placement.exprs
    units = captures.units(placement, sc.D)
    printer = captures.printer(along=sc.D)

    def taken(e, indent) -> list[str]:
        space = " " * indent
        if isinstance(e, sc.where) and not e.args[0].has(*_ALONG, *(symbol for symbol, _ in placement.key)):
            return [f"{space}if ({printer(e.args[0])}) {{", *taken(e.args[1], indent + 4), f"{space}}} else {{", *taken(e.args[2], indent + 4), f"{space}}}"]
        needed = _needed(e, placement.key)
        runs = {symbol: value for symbol, value in needed if isinstance(value, sc.load) and any(captures.runs(value.args[1:], n, sc.D) for n in range(len(value.args) - 1))}  # elements at a pointer of the row: GCC does not move what computes it out of the loop
        rest = [(symbol, value) for symbol, value in needed if symbol not in runs]
        body = [f"{space}    const auto {symbol.name} = element({symbol.name}_row[n * {_step(value)}]);" for symbol, value in runs.items()] + definitions(rest, printer, indent + 4)
        return [*(f"{space}const auto* __restrict {symbol.name}_row = &{captures.place(printer, int(value.args[0].name[1:]), [sympy.Integer(0) if x == sc.D else x for x in value.args[1:]])};" for symbol, value in runs.items()),
                "#pragma GCC ivdep", f"{space}for (int n = 0; n < D; ++n) {{", *([f"{space}    const Int d = n;"] if any(x.has(sc.D) for x in (e, *(value for _, value in rest))) else []),
                *([f"{space}    const float k = key[n];"] if e.has(sc.K) or any(value.has(sc.K) for _, value in rest) else []), *body, f"{space}    key[n] = {printer.real(e)};", f"{space}}}"]

    ways = [("int32_t, true", ["call.is_narrow", *units])] * bool(units) + [("int32_t, false", ["call.is_narrow"]), ("int64_t, false", [])]
    return "\n".join([
        "constexpr bool KEY_TEXT = true;",
        "template <class Int, bool unit>",
        "static __attribute__((noinline)) void take_rows(const Call& call, float* __restrict rows, int64_t distance, int64_t batch, int64_t head, int64_t first, int count) {",
        *locals_of([*placement.values, key], "Int", {"b": "batch", "h": "head"}),
        "    for (int row = 0; row < count; ++row) {", "        float* __restrict key = rows + row * distance;",
        *(["        const Int j = Int(first) + row;"] if any(x.has(sc.J) for x in (key, *placement.values)) else []),
        *definitions(placement.row, captures.printer(), 8), *taken(key, 8), "    }", "}",
        f"INLINE void take_keys({signature}) {{",
        *(f"    {'if (' + ' && '.join(conditions) + ') ' if conditions else ''}return take_rows<{flags}>(call, rows, distance, b, h, first, count);" for flags, conditions in ways), "}", ""])


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
