"""The part of an attention kernel that its variant decides: the captures, the score and mask of a row, the factor of its weights, the tests of a tile, the sink."""
from __future__ import annotations

import collections
import dataclasses
import math
import types

import sympy
import torch

from ...compiler.errors import UnsupportedError
from ...compiler.ir import interval as iv
from ...compiler.ir import scalar as sc
from ...compiler.ir.attention import Variant
from .printer import CppPrinter

ELEMENTS = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16", torch.float64: "double", torch.int64: "int64_t", torch.int32: "int32_t",
            torch.int16: "int16_t", torch.int8: "int8_t", torch.uint8: "uint8_t", torch.bool: "uint8_t"}
#: largest magnitude of an element
_BOUNDS = {torch.int64: 1 << 63, torch.int32: 1 << 31, torch.int16: 1 << 15, torch.int8: 1 << 7, torch.uint8: 255, torch.bool: 1}
#: a masked score above this is part of the score, not a mask: exp(fill - maximum) would rarely be zero
_LOWEST_ORDINARY_FILL = -1e3
_PLAIN = (sc.B, sc.H, sc.I, sc.J, sc.D, iv.I_LO, iv.I_HI, iv.J_LO, iv.J_HI)  # indices that are positions: in range wherever the definition reads


@dataclasses.dataclass(frozen=True)
class Captures:
    """dtypes and ranks of c0, c1, ..."""

    dtypes: tuple[torch.dtype, ...]
    ranks: tuple[int, ...]

    def __post_init__(self):
        for k, dtype in enumerate(self.dtypes):
            if dtype not in ELEMENTS:
                raise UnsupportedError(f"a C++ kernel cannot read c{k} of dtype {dtype}", cure="cast the captured tensor to a float or integer dtype")

    def printer(self, checked: set = frozenset(), along=None) -> CppPrinter:
        """checked: index expressions for which the flag `inside` vouches; along: a loop's symbol, for which the flag `unit` tells whether elements of neighbours (keys, or channels of one) are neighbours."""

        def load_text(k, indices):
            return f"element({self.place(printer, k, indices, checked, along)})"

        printer = CppPrinter(load_text, {k: _BOUNDS[dtype] for k, dtype in enumerate(self.dtypes) if dtype in _BOUNDS})
        return printer

    def place(self, printer, k, indices, checked=frozenset(), along=None) -> str:
        """Where an element of c{k} is stored."""
        if k >= len(self.ranks) or len(indices) != self.ranks[k]:
            raise UnsupportedError(f"c{k} is read with {len(indices)} indices and has {self.ranks[k] if k < len(self.ranks) else 'no'} dimensions")
        strides = [f"(unit ? 1 : call.c{k}_stride[{d}])" if along is not None and self.runs(indices, d, along) else f"call.c{k}_stride[{d}]" for d in range(len(indices))]
        offsets = [f"{self.index(printer, index, f'call.c{k}_size[{d}]', checked)} * {strides[d]}" for d, index in enumerate(indices)]
        return f"call.c{k}[{' + '.join(offsets) or '0'}]"

    def call_parts(self, first: int, num_sizes: int, limit: int) -> tuple[list[str], list[str], str]:
        """(fields of ``struct Call``, what reads them, whether every size is below `limit`) of the captures, tensors `first`, ... of a call, and of n0, n1, ..."""
        fields, reads, sizes = [], [], [f"n{k}" for k in range(num_sizes)]
        for k, (dtype, rank) in enumerate(zip(self.dtypes, self.ranks)):
            fields += [f"    const {ELEMENTS[dtype]}* c{k};", f"    const int64_t *c{k}_size, *c{k}_stride;  // rank {rank}"]
            reads.append(f"    call.c{k} = static_cast<const {ELEMENTS[dtype]}*>(data[{k + first}]);\n    call.c{k}_size = ints;\n    call.c{k}_stride = ints + {rank};\n    ints += {2 * rank};")
        if sizes:
            fields.append(f"    int64_t {', '.join(sizes)};")
        reads += [f"    call.{name} = *ints++;" for name in sizes]
        return fields, reads, " && ".join([f"call.{name} < {limit}" for name in ("B", "H", "Tq", "Tk")] + [f"call.{name} < {limit} && call.{name} > -{limit}" for name in sizes])

    @staticmethod
    def runs(indices, d, along) -> bool:
        """Is dim d that of the loop, and its symbol in no other?"""
        return indices[d] == along and not any(e.has(along) for n, e in enumerate(indices) if n != d)

    def units(self, placement, along=sc.J) -> list[str]:
        """Tests that are true where the loads of a key run along memory with the keys, or those of ``along``: the loop then becomes vector instructions."""
        found = [f"call.{e.args[0].name}_stride[{d}] == 1" for _, value in placement.key for e in sc.loads(value) for d in range(len(e.args) - 1) if self.runs(e.args[1:], d, along)]
        return list(dict.fromkeys(found))

    @staticmethod
    def index(printer, index, size, checked=frozenset()):
        """Text of an index that is in range."""
        if index in _PLAIN:
            return f"int64_t({printer(index)})"
        if index.is_Integer:
            return str(int(index)) if index >= 0 else f"({size} - {-int(index)})"
        return f"at{'<inside>' if index in checked else ''}({printer(index)}, {size})"


def simplify(variant: Variant) -> tuple:
    """(score, mask, fill): fill in float32; a fill that is no large negative number becomes part of the score."""
    score, mask = variant.score_expr, variant.mask_expr
    fill = float(torch.tensor(variant.fill, dtype=torch.float64).to(torch.float32))
    if mask is not sympy.true and not fill < _LOWEST_ORDINARY_FILL:
        return sc.select(mask, score, sc.number(fill)), sympy.true, -math.inf
    return score, mask, fill


def linear_scale(score) -> float | None:
    """c where the score is c*s with an ordinary c: it is then multiplied into the queries."""
    if score == sc.S:
        return 1.0
    if isinstance(score, sc.fmul) and sc.is_const(score.args[0]) and score.args[1] == sc.S:
        scale = float(score.args[0])
        return scale if math.isfinite(scale) and scale != 0 else None
    return None


class Placement:
    """Gives every part of the expressions its place: once a row where no key position occurs in it, else once a key. moving: what changes along the row."""

    def __init__(self, *exprs, moving=(sc.J, sc.S)):
        self.moving = moving
        self.row, self.key, self.memo = [], [], {}
        self.uses = collections.Counter(node for e in exprs for node in sympy.preorder_traversal(e) if isinstance(node, sc.call))
        self.exprs = [self.place(e) for e in exprs]

    @property
    def values(self):
        return [e for _, e in self.row + self.key]

    def place(self, e):
        if not e.args:
            return e
        if e not in self.memo:
            self.memo[e] = self._place(e)
        return self.memo[e]

    def _place(self, e):
        if not e.has(*self.moving) and e.has(sc.load, sc.call):
            return self._bind(self.row, e, e, "_row")
        placed = e.func(*map(self.place, e.args))
        if isinstance(e, sc.load) or (isinstance(e, sc.call) and self.uses[e] > 1):
            return self._bind(self.key, e, placed, "_key")
        return placed

    def _bind(self, place, e, value, suffix):
        stem = e.args[0].name if isinstance(e, (sc.load, sc.call)) else "value"
        taken = {symbol.name for symbol, _ in self.row + self.key}
        name, count = stem + suffix, 1
        while name in taken:
            count += 1
            name = f"{stem}{suffix}{count}"
        symbol = sympy.Symbol(name, integer=True) if sc.is_int(e) else sympy.Symbol(name)
        place.append((symbol, value))
        return symbol


def row_source(captures: Captures, score, mask) -> str:
    """``score_row``: raw dot products to scores, in place, with `masked` where the mask does not hold."""
    plain = linear_scale(score) is not None
    if plain and mask is sympy.true:
        return ("// the scale is in the queries and every key is visible: nothing to do\n"
                "INLINE void score_row(const Call&, float*, int64_t, int64_t, int64_t, int64_t, int64_t, bool, float) {}\n")
    placement = Placement(sc.S if plain else score, mask)
    score, mask = placement.exprs
    checks, units = _index_checks(placement), captures.units(placement)
    printer = captures.printer({index for index, *_ in checks}, along=sc.J)
    body = [f"        const float score = {printer.real(score)};", f"        scores[n] = !masks || ({printer(mask)}) ? score : masked;"]
    loop = _loop("score_keys", captures, placement, [score, mask], ["        const float s = scores[n];"], body, printer, "bool masks, ", ", float masked")
    choose = ["INLINE void score_row(const Call& call, float* scores, int64_t b, int64_t h, int64_t i, int64_t j_lo, int64_t width, bool full, float masked) {"]
    if plain:
        choose.append("    if (full) return;  // the scale is in the queries")
    arguments = "(call, scores, b, h, i, j_lo, int(width), masked)"
    if checks:
        choose.append("    const bool inside = indices_inside(call, b, h, i, j_lo, j_lo + width - 1);")
    for masks, when in ((False, ["full"]), (True, [])) if not plain and mask is not sympy.true else ((plain, []),):
        for kind, flags, conditions in _ways(checks, units):
            choose.append(f"    {_when([*when, *conditions])}return score_keys<{kind}, {str(masks).lower()}, {flags}>{arguments};")
    return "\n".join([*_inside_source("indices_inside", placement, captures, checks), *loop, *choose, "}"]) + "\n"


def row_loop(name: str, captures: Captures, exprs, body, start, rest: str = "") -> str:
    """``{name}_row(call, scores, b, h, i, j_lo, width, rest)``: a loop over the scores of a row; body(printer, *placed) gives the lines for one of them, start stands before them."""
    placement = Placement(*exprs)
    checks, units = _index_checks(placement), captures.units(placement)
    printer = captures.printer({index for index, *_ in checks}, along=sc.J)
    loop = _loop(f"{name}_keys", captures, placement, placement.exprs, start, body(printer, *placement.exprs), printer, rest=f", {rest}" if rest else "")
    choose = [f"INLINE void {name}_row(const Call& call, float* scores, int64_t b, int64_t h, int64_t i, int64_t j_lo, int64_t width{', ' + rest if rest else ''}) {{"]
    if checks:
        choose.append(f"    const bool inside = {name}_inside(call, b, h, i, j_lo, j_lo + width - 1);")
    for kind, flags, conditions in _ways(checks, units):
        choose.append(f"    {_when(conditions)}return {name}_keys<{kind}, {flags}>(call, scores, b, h, i, j_lo, int(width){', ' + rest.split()[-1] if rest else ''});")
    return "\n".join([*_inside_source(f"{name}_inside", placement, captures, checks), *loop, *choose, "}"]) + "\n"


def value_source(captures: Captures, value, offset=None) -> str:
    """``value_row``: the weights of a row times their factor, in place; returns what their offsets add to every dim, 0 without one."""
    if value is None and offset is None:
        return "INLINE float value_row(const Call&, float*, int64_t, int64_t, int64_t, int64_t, int64_t) { return 0.0f; }\n"
    placement = Placement(*(e for e in (value, offset) if e is not None))
    placed = iter(placement.exprs)
    value, offset = (next(placed) if e is not None else None for e in (value, offset))
    checks, units = _index_checks(placement), captures.units(placement)
    printer = captures.printer({index for index, *_ in checks}, along=sc.J)
    body = ([f"        added += scores[n] * {printer.real(offset)};"] if offset is not None else []) + ([f"        scores[n] *= {printer.real(value)};"] if value is not None else [])
    loop = _loop("value_keys", captures, placement, [e for e in (value, offset) if e is not None], [], body, printer, total="added")
    choose = ["INLINE float value_row(const Call& call, float* weights, int64_t b, int64_t h, int64_t i, int64_t j_lo, int64_t width) {"]
    if checks:
        choose.append("    const bool inside = values_inside(call, b, h, i, j_lo, j_lo + width - 1);")
    for kind, flags, conditions in _ways(checks, units):
        choose.append(f"    {_when(conditions)}return value_keys<{kind}, {flags}>(call, weights, b, h, i, j_lo, int(width));")
    return "\n".join([*_inside_source("values_inside", placement, captures, checks), *loop, *choose, "}"]) + "\n"


def _ways(checks, units):
    """(type of positions, "inside, unit", what must hold for it) of the loops over keys, the best first."""
    narrow, inside = ["call.is_narrow"], ["inside"] if checks else []
    ways = [("int32_t", f"{str(bool(checks)).lower()}, true", [*narrow, *inside, *units])] if units else []
    ways += [("int32_t", "true, false", [*narrow, *inside])] if checks else []
    return [*ways, ("int32_t", "false, false", narrow), ("int64_t", "false, false", [])]


def _when(conditions) -> str:
    return f"if ({' && '.join(conditions)}) " if conditions else ""


def _along_keys(captures, placement) -> list[tuple]:
    """(symbol, pointer to the element of the first key, distance of neighbours) of the loads whose last say is the position: GCC makes gathers of them where it has to widen j for the address."""
    moving, found = {symbol for symbol, _ in placement.key}, []
    for symbol, e in placement.key:
        if isinstance(e, sc.load):
            indices = e.args[1:]
            for d in range(len(indices)):
                if captures.runs(indices, d, sc.J) and not any(x.free_symbols & moving for x in indices):
                    step = f"(unit ? 1 : call.{e.args[0].name}_stride[{d}])"
                    found.append((symbol, [sympy.Integer(0) if n == d else x for n, x in enumerate(indices)], step))
    return found


def _loop(name, captures, placement, exprs, start, body, printer, flags="", rest="", total="") -> list[str]:
    """A loop over a row's scores, with what the placement gives to the row in front of it, and to a key in it. total: the name of a sum that it returns."""
    runs = {symbol: (f"&{captures.place(captures.printer(), int(dict(placement.key)[symbol].args[0].name[1:]), at_zero)} + first_key * {step}", step) for symbol, at_zero, step in _along_keys(captures, placement)}
    found = [line for symbol, e in placement.key for line in ([f"        const auto {symbol.name} = element({symbol.name}_at[n * {runs[symbol][1]}]);"] if symbol in runs else definitions([(symbol, e)], printer, 8))]
    return [f"template <class Int, {flags}bool inside, bool unit>",
            f"static {'float' if total else 'void'} {name}(const Call& call, float* __restrict scores, int64_t batch, int64_t head, int64_t row, int64_t first_key, int width{rest}) {{",
            *locals_of([*placement.values, *exprs], "Int", {"b": "batch", "h": "head", "i": "row"}), *definitions(placement.row, captures.printer(), 4),
            *(f"    const auto* const {symbol.name}_at = {place};" for symbol, (place, _) in runs.items()),
            *([f"    float {total} = 0.0f;", f"#pragma omp simd reduction(+ : {total})"] if total else []),
            "    for (int n = 0; n < width; ++n) {", "        const Int j = Int(first_key) + n;", *start, *found, *body, "    }", *([f"    return {total};"] if total else []), "}", ""]


def definitions(bound, printer, indent) -> list[str]:
    text = lambda e: printer(e) if sc.is_bool(e) or sc.is_int(e) else printer.real(e)  # noqa: E731
    return [f"{' ' * indent}const auto {symbol.name} = {text(e)};" for symbol, e in bound]


def _index_checks(placement) -> list[tuple]:
    """(index, lowest, highest, size) of the computed indices that a test of a row's first and last key can vouch for; the others wrap at every key."""
    moving = {symbol for symbol, _ in placement.key}
    checks = {}
    for _, e in placement.key:
        for element in sc.loads(e):
            for d, index in enumerate(element.args[1:]):
                if index not in _PLAIN and not index.is_Integer and not index.has(sc.load, *moving):
                    ends = iv.interval(index, {sc.J: (iv.J_LO, iv.J_HI)})
                    if ends is not None:
                        checks[index, f"call.{element.args[0].name}_size[{d}]"] = ends
    return [(index, lo, hi, size) for (index, size), (lo, hi) in checks.items()]


def _inside_source(name, placement, captures, checks) -> list[str]:
    if not checks:
        return []
    printer = captures.printer()
    return ["// Are the computed indices of the keys [j_lo, j_hi] inside their tensors, so that none counts from the end?",
            f"INLINE bool {name}(const Call& call, int64_t b, int64_t h, int64_t i, int64_t j_lo, int64_t j_hi) {{",
            *locals_of([*(e for _, e in placement.row), *(end for _, lo, hi, _ in checks for end in (lo, hi))], "int64_t", {}),
            *definitions(placement.row, printer, 4),
            f"    return {' & '.join(f'({printer(lo)} >= 0) & ({printer(hi)} < {size})' for _, lo, hi, size in checks)};", "}", ""]


def tile_source(captures: Captures, mask) -> str:
    """``tile_may`` and ``tile_must``: may any, do all keys [j_lo, j_hi] be seen from the rows [i_lo, i_hi]? (iv.tile as code)"""
    must, may = iv.tile(mask)
    printer = captures.printer()
    functions = []
    for name, condition in (("tile_may", may), ("tile_must", must)):
        parameters = ", ".join(f"int64_t {x}" for x in ("b", "h", "i_lo", "i_hi", "j_lo", "j_hi"))
        functions += [f"INLINE bool {name}(const Call& call, {parameters}) {{", *locals_of([condition], "int64_t", {}), f"    return {printer(condition)};", "}"]
    return "\n".join(functions) + "\n"


def keys_source(captures: Captures, mask) -> str:
    """``keys_may``: is any key of [j_lo, j_hi] left by the parts of the mask that a captured tensor gives for keys alone (padding)?

    tile_may cannot know what such a tensor holds; looking costs one read a key and tile, and skips the padding of a batch.
    """
    parts = [x for x in (mask.args if isinstance(mask, sympy.And) else (mask,)) if x.has(sc.J) and x.has(sc.load) and not x.has(sc.I)]
    lines = ["INLINE bool keys_may(const Call& call, int64_t b, int64_t h, int64_t j_lo, int64_t j_hi) {"]
    if parts:
        condition = sympy.And(*parts)
        lines += [*locals_of([condition], "int64_t", {}), "    bool any = false;", f"    for (int64_t j = j_lo; j <= j_hi; ++j) any |= {captures.printer()(condition)};", "    return any;", "}"]
    else:
        lines += ["    return true;", "}"]
    return "\n".join(lines) + "\n"


def sink_source(captures: Captures, sink) -> str:
    """``sink_of``: the extra logit of a row, -inf for none."""
    lines = locals_of([sink] if sink is not None else [], "int64_t", {})
    text = captures.printer().real(sink) if sink is not None else "-std::numeric_limits<float>::infinity()"
    head = "INLINE float sink_of(const Call& call, int64_t b, int64_t h, int64_t i) {"
    return "\n".join([head, *lines, f"    return {text};", "}"]) + "\n"


def locals_of(exprs, kind="int64_t", renamed=types.MappingProxyType({})) -> list[str]:
    """Definitions of the sizes and positions that occur in the expressions; renamed: position -> the argument that holds it."""
    used = {symbol.name for e in exprs for symbol in e.free_symbols}
    lines = [f"    const {kind} {name} = {kind}({source});" for name, source in renamed.items() if name in used]
    for name in sorted(used):
        if name in ("Tq", "Tk") or (name[0] == "n" and name[1:].isdigit()):
            lines.append(f"    const {kind} {name} = {kind}(call.{name});")
    return lines
