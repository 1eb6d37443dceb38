"""A region's loop nests as C++ (compiler/ir/region.py says what a nest computes).

Rows run in parallel. The innermost loop runs along the unit stride and is cut where a condition on its index changes (rotary's
halves), so that no piece has a branch on the index and each vectorises. What occurs twice is computed once; what does not
depend on the column is computed before its loop. Static sizes and strides are part of the source: equal layers share it.
"""
from __future__ import annotations

import hashlib
from pathlib import Path

import sympy
import torch
from sympy import Integer
from sympy.core.relational import Relational

from ...compiler.errors import UnsupportedError
from ...compiler.ir import scalar as sc
from ...compiler.ir.interval import tighten
from ...compiler.ir.kernel import Kernel
from ...compiler.ir.printer import OR, text
from ...compiler.ir.region import Body, Nest
from .printer import CppPrinter
from .score import ELEMENTS

_FOLDER = Path(__file__).parent
PARALLEL_FROM = 32768  # elements; below, waking the second thread costs more than it saves (about 5 us)
CHUNK = 2048  # floats summed in float32 vectors before they are added in double: 16 lanes x 128 terms lose 1e-6 at most
LANES = 64  # rows summed side by side where the reduction runs down the columns of memory


def emit(body: Body) -> Kernel:
    """The kernel of a region. Tensors of a call: [outputs.., status if it has checks, inputs..]; integers: body.sizes; no floats.

    status: int32 [1], zero before the call, one after it if an index that was read from data is out of range.
    """
    for t in (*body.inputs, *body.outputs):
        if t.dtype not in ELEMENTS or t.dtype == torch.float64:
            raise UnsupportedError(f"no C++ region kernel for {t.dtype}", cure="the ops run as ATen calls")
    first_input = len(body.outputs) + bool(body.checks)
    ranks = [len(t.sizes) for t in body.outputs] + [1] * bool(body.checks) + [len(t.sizes) for t in body.inputs]
    first_int = 2 * sum(ranks)
    lines = [f"    {ELEMENTS[t.dtype]}* __restrict out{k} = static_cast<{ELEMENTS[t.dtype]}*>(data[{k}]);" for k, t in enumerate(body.outputs)]
    if body.checks:
        lines.append(f"    int32_t* const status = static_cast<int32_t*>(data[{len(body.outputs)}]);")
    lines += [f"    const {ELEMENTS[t.dtype]}* __restrict c{k} = static_cast<const {ELEMENTS[t.dtype]}*>(data[{first_input + k}]);" for k, t in enumerate(body.inputs)]
    lines += [f"    const int64_t {s} = ints[{first_int + k}];" for k, s in enumerate(body.sizes)]
    for number, nest in enumerate(body.nests):
        lines += ["    {", *("    " + line for line in _Nest(body, nest, number).lines()), "    }"]
    code = "\n".join(['extern "C" void region(void* const* data, const int64_t* ints, const double*) {', *lines, "}", ""])
    detail = describe(body)
    source = "\n".join(["// tileweld region\n" + "\n".join("//   " + line for line in detail.split("\n")) + "\n", (_FOLDER / "vector.h").read_text(), (_FOLDER / "scalar_math.h").read_text(), "// ---- this region\n", code])
    return Kernel("region_" + hashlib.sha256(code.encode()).hexdigest()[:8], "cpp", source, "region", rewrite="region", detail=detail)


def describe(body: Body) -> str:
    """The region in the scalar language, a line a value."""
    lines = []
    for nest in body.nests:
        lines += [f"{r.symbol} = {r.kind} over {', '.join(str(x) for x, _ in nest.columns)} of {text(r.expr)}" for r in nest.reductions]
        lines += [f"out{o.number}[{', '.join(map(str, o.index))}] = {text(o.expr)}" for o in nest.outputs]
    return "\n".join(lines)


class _Printer(CppPrinter):
    """Knows what has been computed into a name already."""

    def __init__(self, body):
        super().__init__(self._load)
        self.body, self.known = body, {}

    def emit(self, expr, outer=OR):
        name = self.known.get(expr)
        return name if name is not None else super().emit(expr, outer)

    def offset(self, tensor, index):
        """Text of the element offset of an index that has an entry for every dim longer than one."""
        terms = [(e, stride) for e, stride in zip(index, (tensor.strides[d] for d in tensor.kept)) if e != 0 and stride != 0]
        return " + ".join(f"int64_t({self(e)})" + ("" if stride == 1 else f" * INT64_C({stride})" if stride.is_Integer else f" * ({self(stride)})") for e, stride in terms) or "0"

    def _load(self, k, index):
        tensor = self.body.inputs[k]
        element = f"c{k}[{self.offset(tensor, index)}]"
        return element if tensor.dtype in (torch.float32, torch.int32, torch.int64) else f"element({element})"


class _Nest:
    """One nest's text."""

    def __init__(self, body: Body, nest: Nest, number: int):
        self.body, self.printer = body, _Printer(body)
        self.checks = [c for c in body.checks if c.nest == number]
        self.rows, self.columns, self.reductions, self.outputs = list(nest.rows), list(nest.columns), list(nest.reductions), list(nest.outputs)
        if not self.reductions:
            self.rows, self.columns = self._loops()
        self.ranges = nest.ranges
        self.column_symbols = {x for x, _ in self.columns}
        self.temporaries = 0

    def _loops(self):
        """Without reductions: loops in the order of the first output's strides, the smallest innermost."""
        first = self.outputs[0]
        tensor = self.body.outputs[first.number]
        strides = {e: stride for e, stride in zip(first.index, tensor.strides)}
        known = [*self.rows, *self.columns]
        order = sorted(range(len(known)), key=lambda k: (-_rank(strides.get(known[k][0], Integer(0))), k))
        loops = [known[k] for k in order]
        return loops[:-1], loops[-1:]

    # ---- pieces of text

    def lines(self) -> list[str]:
        count, width = (sympy.Mul(*(n for _, n in part)) for part in (self.rows, self.columns))
        if self._runs_down():
            return self._down(count, width)
        if not self.rows and not self.reductions and self.columns:  # one long row
            return self._long_row()
        result = [f"const int64_t rows = {self.printer(count)};", f"#pragma omp parallel for schedule(static) if ({self._parallel(count, width)})", "for (int64_t row = 0; row < rows; ++row) {", *self._row_indices(self.rows, "row")]
        body = self._levels() + self._final()
        return [*result, *("    " + line for line in body), "}"]

    def _parallel(self, count, width):
        work = count * width
        if work.is_Integer:
            return "true" if work >= PARALLEL_FROM else "false"
        return f"{self.printer(work)} >= {PARALLEL_FROM}"

    def _row_indices(self, rows, name):
        if len(rows) == 1:
            return [f"    const int64_t {rows[0][0]} = {name};"]
        result = [f"    int64_t rest = {name};"] if rows else []
        for x, n in reversed(rows):
            result.append(f"    const int64_t {x} = rest % ({self.printer(n)}); rest /= ({self.printer(n)});")
        return result

    def _temporary(self, e) -> str:
        name = f"t{self.temporaries}"
        self.temporaries += 1
        kind = "bool" if sc.is_bool(e) else "int64_t" if sc.is_int(e) else "float"
        return name, f"const {kind} {name} = {self.printer(e) if kind != 'float' else self.printer.real(e)};"

    def _name(self, expressions) -> list[str]:
        """Statements that name these expressions, inner ones first."""
        result = []
        for e in expressions:
            if e not in self.printer.known:
                name, line = self._temporary(e)
                self.printer.known[e] = name
                result.append(line)
        return result

    def _invariant(self, exprs) -> list:
        """Largest subexpressions that the column does not change."""
        found: dict = {}

        def visit(e):
            if not e.args or isinstance(e, sympy.Symbol) or e.is_number or e in found or e in self.printer.known:
                return
            if not e.free_symbols & self.column_symbols and not isinstance(e, Relational | sympy.logic.boolalg.BooleanFunction) and not isinstance(e, (sympy.Add, sympy.Mul)):
                found[e] = None
                return
            for a in e.args[1:] if isinstance(e, sc.load) else e.args:
                if not isinstance(a, sympy.Symbol):
                    visit(a)

        for e in exprs:
            visit(e)
        return list(found)

    def _repeated(self, exprs) -> list:
        """Float subexpressions that occur more than once, inner ones first."""
        count: dict = {}
        order: list = []

        def visit(e):
            if not e.args or e.is_number or e in self.printer.known or isinstance(e, sympy.Symbol):
                return
            seen = e in count
            count[e] = count.get(e, 0) + 1
            if seen:
                return
            for a in e.args[1:] if isinstance(e, (sc.load, sc.call)) else e.args:
                visit(a)
            order.append(e)

        for e in exprs:
            visit(e)
        return [e for e in order if count[e] > 1 and not sc.is_int(e) and not sc.is_bool(e) and (isinstance(e, (sc.FloatOp, sc.load, sc.where)))]

    def _loop(self, exprs, statements, pragma) -> list[str]:
        """Loops over the columns around ``statements(pieces of exprs) -> lines``, the innermost one in pieces without conditions on its index."""
        *outer, (x, n) = self.columns or [(None, Integer(1))]
        lines = [f"for (int64_t {y} = 0; {y} < {self.printer(m)}; ++{y})" + " {" for y, m in outer]
        saved = dict(self.printer.known)
        for low, high, pieces in cuts(exprs, x, n, self.ranges):
            self.printer.known = dict(saved)
            before = self._name(self._invariant(pieces))
            inside = self._name(self._repeated(pieces)) + statements(pieces)
            if x is None:
                lines += ["{", *("    " + line for line in before + inside), "}"]
                continue
            lines += ["{", *("    " + line for line in before), *([f"    {pragma}"] if pragma else []), f"    for (int64_t {x} = {self.printer(low)}; {x} < {self.printer(high)}; ++{x}) {{", *("        " + line for line in inside), "    }", "}"]
        self.printer.known = saved
        return lines + ["}"] * len(outer)

    def _levels(self) -> list[str]:
        lines: list[str] = []
        for level in range(1, max((r.level for r in self.reductions), default=0) + 1):
            now = [r for r in self.reductions if r.level == level]
            sums = [r for r in now if r.kind == "sum"]
            extremes = [r for r in now if r.kind != "sum"]
            chunked = bool(sums) and self._is_long()
            for r in now:
                start = "0.0f" if r.kind == "sum" else "-std::numeric_limits<float>::infinity()" if r.kind == "max" else "std::numeric_limits<float>::infinity()"
                lines.append(f"float {r.symbol} = {start};")
            lines += [f"int32_t nan_{r.symbol} = 0;" for r in extremes]
            clauses = ([f"reduction(+:{', '.join(str(r.symbol) for r in sums)})"] if sums else []) + [f"reduction({r.kind}:{r.symbol})" for r in extremes] + ([f"reduction(|:{', '.join(f'nan_{r.symbol}' for r in extremes)})"] if extremes else [])

            def statements(pieces, now=now):
                result = []
                for r, piece in zip(now, pieces):
                    value = self.printer.real(piece)
                    if r.kind == "sum":
                        result.append(f"{r.symbol} += {value};")
                    else:
                        result += [f"const float v_{r.symbol} = {value};", f"{r.symbol} = v_{r.symbol} {'>' if r.kind == 'max' else '<'} {r.symbol} ? v_{r.symbol} : {r.symbol};", f"nan_{r.symbol} |= v_{r.symbol} != v_{r.symbol};"]
                return result

            if chunked:
                lines += self._chunked(now, sums, statements, f"#pragma omp simd {' '.join(clauses)}")
            else:
                lines += self._loop([r.expr for r in now], statements, f"#pragma omp simd {' '.join(clauses)}")
            lines += [f"if (nan_{r.symbol}) {r.symbol} = std::numeric_limits<float>::quiet_NaN();" for r in extremes]
        return lines

    def _is_long(self):
        n = sympy.Mul(*(n for _, n in self.columns))
        return len(self.columns) >= 1 and not (n.is_Integer and n <= 4 * CHUNK)

    def _chunked(self, now, sums, statements, pragma):
        """A long sum: the innermost loop in chunks, each added in double."""
        *outer, (x, n) = self.columns
        lines = [f"double total_{r.symbol} = 0.0;" for r in sums] + [f"for (int64_t {y} = 0; {y} < {self.printer(m)}; ++{y})" + " {" for y, m in outer]
        saved = dict(self.printer.known)
        pieces = [tighten(r.expr, self.ranges) for r in now]
        before = self._name(self._invariant(pieces))
        inside = self._name(self._repeated(pieces)) + statements(pieces)
        self.printer.known = saved
        lines += [*before, f"for (int64_t chunk = 0; chunk < {self.printer(n)}; chunk += {CHUNK}) {{", f"    const int64_t stop = smaller(chunk + {CHUNK}, {self.printer(n)});", *(f"    {r.symbol} = 0.0f;" for r in sums),
                  f"    {pragma}", f"    for (int64_t {x} = chunk; {x} < stop; ++{x}) {{", *("        " + line for line in inside), "    }", *(f"    total_{r.symbol} += {r.symbol};" for r in sums), "}"]
        return lines + ["}"] * len(outer) + [f"{r.symbol} = float(total_{r.symbol});" for r in sums]

    def _store(self, output, piece) -> str:
        tensor = self.body.outputs[output.number]
        target = f"out{output.number}[{self.printer.offset(tensor, [e for e, n in zip(output.index, tensor.sizes) if n != 1])}]"
        if tensor.dtype.is_floating_point:
            value = self.printer.real(piece)
            return f"{target} = {value};" if tensor.dtype == torch.float32 else f"store_element(&{target}, {value});"
        return f"{target} = {ELEMENTS[tensor.dtype]}({self.printer(piece)});"

    def _check_lines(self, checks) -> list[str]:
        return [f"if (({self.printer(c.index)}) < ({self.printer(c.low)}) || ({self.printer(c.index)}) >= ({self.printer(c.high)})) *status = 1;" for c in checks]

    def _final(self) -> list[str]:
        full, rows = [o for o in self.outputs if not o.is_row], [o for o in self.outputs if o.is_row]
        lines = self._check_lines([c for c in self.checks if not c.index.free_symbols & self.column_symbols])
        moving = [c for c in self.checks if c.index.free_symbols & self.column_symbols]
        if moving:
            lines += self._loop([c.index for c in moving], lambda pieces: self._check_lines(moving), "")
        if rows:
            pieces = [tighten(o.expr, self.ranges) for o in rows]
            lines += ["{", *("    " + line for line in self._name(self._repeated(pieces)) + [self._store(o, p) for o, p in zip(rows, pieces)]), "}"]
            self.printer.known = {}
        if full:
            lines += self._loop([o.expr for o in full], lambda pieces: [self._store(o, p) for o, p in zip(full, pieces)], "#pragma omp simd")
        return lines

    # ---- other shapes of loops

    def _long_row(self):
        x, n = self.columns[-1]
        pieces = [tighten(o.expr, self.ranges) for o in self.outputs]
        before = self._name(self._invariant(pieces))
        inside = self._name(self._repeated(pieces)) + [self._store(o, p) for o, p in zip(self.outputs, pieces)] + self._check_lines(self.checks)
        simd = "" if self.checks else " simd"
        return [*before, f"#pragma omp parallel for{simd} schedule(static) if ({'parallel: ' if simd else ''}{self._parallel(Integer(1), n)})", f"for (int64_t {x} = 0; {x} < {self.printer(n)}; ++{x}) {{", *("    " + line for line in inside), "}"]

    def _runs_down(self) -> bool:
        """Is it a plain sum down the rows of memory: neighbours in memory are neighbouring results, not terms of one? What else is computed of every term (a norm's backward) must not want the sums."""
        if not self.reductions or not self.rows or any(r.level > 1 or r.kind != "sum" for r in self.reductions) or self.checks:
            return False
        if any(o.expr.free_symbols & {r.symbol for r in self.reductions} for o in self.outputs if not o.is_row):
            return False
        x = self.rows[-1][0]
        down = across = 0
        for r in self.reductions:
            for load in sc.loads(r.expr):
                tensor = self.body.inputs[int(load.args[0].name[1:])]
                for e, d in zip(load.args[1:], tensor.kept):
                    if tensor.strides[d] == 1:
                        down += sympy.sympify(e).has(x)
                        across += bool(sympy.sympify(e).free_symbols & self.column_symbols)
        return down > across

    def _down(self, count, width):
        """Blocks of LANES neighbouring rows, each with its own sum in double once a CHUNK of terms."""
        *outer, (x, n) = self.rows
        symbols = [r.symbol for r in self.reductions]
        blocks = f"(({self.printer(n)}) + {LANES - 1}) / {LANES}"
        lines = [f"const int64_t blocks = {blocks}, rows = ({self.printer(sympy.Mul(*(m for _, m in outer)))}) * blocks;", f"#pragma omp parallel for schedule(static) if ({self._parallel(count, width)})", "for (int64_t row = 0; row < rows; ++row) {",
                 f"    const int64_t first = row % blocks * {LANES}, last = smaller(first + {LANES}, {self.printer(n)});", "    const int64_t outer = row / blocks;", *self._row_indices(outer, "outer")]
        lines += [f"    float sum_{s}[{LANES}] = {{}};\n    double total_{s}[{LANES}] = {{}};" for s in symbols] + ["    int64_t terms = 0;"]
        lines += ["    " + f"for (int64_t {y} = 0; {y} < {self.printer(m)}; ++{y})" + " {" for y, m in self.columns]
        full = [o for o in self.outputs if not o.is_row]
        pieces = [tighten(e.expr, self.ranges) for e in (*self.reductions, *full)]
        inside = self._name(self._repeated(pieces)) + [f"sum_{s}[{x} - first] += {self.printer.real(p)};" for s, p in zip(symbols, pieces)]
        inside += [self._store(o, p) for o, p in zip(full, pieces[len(symbols):])]
        lines += ["        #pragma omp simd", f"        for (int64_t {x} = first; {x} < last; ++{x}) {{", *("            " + line for line in inside), "        }", f"        if (++terms % {CHUNK // 16} == 0)", f"            for (int lane = 0; lane < {LANES}; ++lane) {{ {' '.join(f'total_{s}[lane] += sum_{s}[lane]; sum_{s}[lane] = 0.0f;' for s in symbols)} }}"]
        lines += ["    }"] * len(self.columns)
        self.printer.known = {}
        stores = [self._store(o, o.expr) for o in self.outputs if o.is_row]
        lines += [f"    for (int64_t {x} = first; {x} < last; ++{x}) {{", *(f"        const float {s} = float(total_{s}[{x} - first] + sum_{s}[{x} - first]);" for s in symbols), *("        " + line for line in stores), "    }", "}"]
        return lines


def _rank(stride) -> float:
    """A stride to order by; symbolic ones are larger than any number they multiply."""
    coefficient, rest = stride.as_coeff_Mul()
    return float(coefficient) * 1e6 ** len(rest.free_symbols)


def cuts(exprs, x, n, ranges: dict):
    """Stretches [low, high) of an index on which no condition on it alone changes, each with the expressions as they are there."""
    if x is None:
        return [(Integer(0), Integer(1), [tighten(e, ranges) for e in exprs])]
    if not n.is_Integer:
        return [(Integer(0), n, [tighten(e, ranges) for e in exprs])]
    return _pieces(exprs, x, 0, int(n), ranges)


def _pieces(exprs, x, low: int, high: int, ranges: dict):
    exprs = [tighten(e, {**ranges, x: (Integer(low), Integer(high - 1))}) for e in exprs]
    found = sorted({c for e in exprs for relation in e.atoms(Relational) if relation.free_symbols == {x} for c in _edges(relation, x) if low < c < high})
    if not found:
        return [(Integer(low), Integer(high), exprs)]
    middle = found[len(found) // 2]  # deciding one condition may decide or uncover others: nested cats
    return _pieces(exprs, x, low, middle, ranges) + _pieces(exprs, x, middle, high, ranges)


def _edges(relation, x) -> set[int]:
    """Where a linear condition on x changes; none where it is not linear (a clamp, a division), which stays a select in the loop."""
    slope = sympy.expand(relation.lhs - relation.rhs).coeff(x)
    rest = sympy.expand(relation.lhs - relation.rhs - slope * x)
    if not slope.is_Integer or slope == 0 or not rest.is_Integer:
        return set()
    edge = -rest / slope
    whole = int(sympy.floor(edge))
    if relation.rel_op in ("==", "!="):
        return {whole, whole + 1} if edge == whole else set()
    before = relation.rel_op in ("<", ">=") if slope > 0 else relation.rel_op in ("<=", ">")  # x < 8 changes at 8, x <= 7 too
    return {whole} if before and edge == whole else {whole + 1}
