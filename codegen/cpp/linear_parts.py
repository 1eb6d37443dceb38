"""What the C++ units of `tileweld::linear` and `tileweld::int8_linear` share: their groups of outputs, the call, the epilogues, and the order of the parts."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from ...compiler.errors import UnsupportedError
from ...compiler.ir import scalar as sc
from ...compiler.ir.linear import NORMS, Spec
from .linear_source import Loops
from .printer import SIZE_LIMIT
from .score import ELEMENTS, Captures

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW = 8  # rows up to which weights may be read in place
_FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Group:
    """Outputs that share weights, with those weights, and the pairs of their columns: block 1, half 0 for none."""

    weights: tuple[int, ...]
    outputs: tuple[int, ...]
    width: int
    block: int = 1
    half: int = 0


def check(op: str, dtypes: dict[str, torch.dtype], widths: Sequence[int], k: int) -> None:
    """Raises UnsupportedError for dtypes that no kernel reads, and sizes beyond those of int32 positions."""
    for what, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise UnsupportedError(f"no C++ {op} kernel for {what} of {dtype}", cure="use float32, float16 or bfloat16, or the reference target")
    if max([k, *widths]) >= SIZE_LIMIT:
        raise UnsupportedError(f"no C++ {op} kernel for {k} -> {max(widths)} columns", cure=f"up to {SIZE_LIMIT - 1} are supported")


def few(k: int) -> int:
    """The number of rows of x [M, k] up to which weights are read where they lie: two always; up to eight, four at a time, where those stay in an
    L1 cache of 32 KiB beside the weight (at K = 4096 packing was faster from 4 rows on, at K = 1024 from 12)."""
    return max([2, *(n for n in range(3, FEW + 1) if min(n, 4) * k <= 6144)])


def groups(spec: Spec, widths: Sequence[int]) -> list[Group]:
    """The outputs joined by the weights they share, in order of their first output."""
    joined: list[tuple[set, list]] = []
    for o in range(len(spec.epilogues)):
        weights, outputs = set(spec.accumulators(o)), [o]
        if not weights:
            raise UnsupportedError(f"epilogue {spec.epilogues[o]!r} names no accumulator")
        for other in [g for g in joined if g[0] & weights]:
            joined.remove(other)
            weights, outputs = weights | other[0], other[1] + outputs
        joined.append((weights, outputs))
    found = []
    for weights, outputs in sorted(joined, key=lambda g: min(g[1])):
        pairs = {spec.pairs[o] for o in outputs if spec.partners(o)}
        sizes = {widths[w] for w in weights}
        if len(pairs) > 1 or len(sizes) > 1:
            raise UnsupportedError(f"outputs {sorted(outputs)} share weights and differ in {'pairs' if len(pairs) > 1 else 'width'}", cure="run them as separate ops")
        block, half = pairs.pop() if pairs else (1, 0)
        width = sizes.pop()
        if block < 1 or width % block or 2 * half > block:
            raise UnsupportedError(f"pairs in blocks of {block}, half {half}, for {width} columns", cure="whole blocks are supported")
        found.append(Group(tuple(sorted(weights)), tuple(sorted(outputs)), width, block, half))
    return found


def unit_source(spec: Spec, found: Sequence[Group], *, title: str, x_dtype: torch.dtype, weight_dtypes: Sequence[torch.dtype], captures: Captures, widths: Sequence[int], k: int, num_sizes: int,
                unit: Sequence[Sequence[bool]] | None, lies: set, ways: Sequence[str], variant: str = "", scales: bool = False, has_columns: bool = False,
                maxima: Sequence[int] = (), has_row_max: bool = False, brgemm: bool = False) -> tuple[str, str]:
    """(source, detail) of a unit: this spec's part, then `ways`, the headers that multiply, and the entry.

    title: the first line's, with what a_w is. lies: how weights may lie, among "rows", "columns", "apart", None for any. variant: constants that the
    ways read. scales, has_columns, maxima, has_row_max, brgemm: see `call_source`; unit has nothing for maxima and row_max; the others as in `linear.emit`.
    """
    if any(not 0 <= o < len(spec.epilogues) for o in maxima):
        raise UnsupportedError(f"maxima of the outputs {list(maxima)}, there are {len(spec.epilogues)}")
    outputs, weights = len(spec.epilogues), len(weight_dtypes)
    capture_units = unit[outputs + 1 + weights * (1 + scales):] if unit is not None else None
    loops = Loops(captures, num_sizes, capture_units)
    prologue = loops.function("prologue", "const Call& call, int64_t i, const float* from, float u, float r, float* to, int64_t first, int64_t width", spec.prologue_expr, k, {"x": "from[n]"})
    epilogues = [epilogue(loops, spec, group, o) for group in found for o in group.outputs]
    detail = _detail(spec, x_dtype, widths, k)
    parts = [
        f"// {title}; from the rewrite `linear`\n//   {detail}\n"
        f"//   dtypes x {name_of(x_dtype)}, weights {', '.join(map(name_of, weight_dtypes))}, captures {', '.join(map(name_of, captures.dtypes)) or 'none'}\n#include <omp.h>\n",
        text("vector.h"), text("scalar_math.h"),
        "// ---- this variant\n",
        f"using X = {ELEMENTS[x_dtype]};\nconstexpr int64_t K = {k};\nconstexpr int NORM = {NORMS.index(spec.norm)}, OUTPUTS = {outputs}, WEIGHTS = {weights};\n"
        f"constexpr bool IDENTITY = {flag(spec.prologue_expr == sc.X)};  // the prologue is x\n",
        f"// known of every call\nconstexpr bool X_UNIT = {flag(unit is not None and unit[outputs][1])}, OUT_UNIT = {flag(unit is not None and all(u[1] for u in unit[:outputs]))};  // rows without gaps\n" + lies_source(lies),
        *([variant] if variant else []),
        text("linear_call.h"),
        groups_source(found),
        call_source(captures, num_sizes, outputs, weight_dtypes, loops.unit_source(), scales, has_columns, len(maxima), has_row_max, brgemm),
        prologue,
        *epilogues,
        text("linear_rows.h"),
        *([text("linear_maxima.h")] if maxima else []),
        finish_source(found, spec, maxima),
        *ways,
    ]
    return "\n".join(parts), detail


def lies_source(lies: set) -> str:
    return f"constexpr bool BY_ROWS = {flag(lies & {'rows', None})}, BY_COLUMNS = {flag(lies & {'columns', None})}, APART = {flag(lies & {'apart', None})};  // weights that lie so\n"


def ways_source(is_few: bool, is_many: bool, few_texts: Sequence[str], many_texts: Sequence[str], most: int, entry: str, may_be_apart: bool = True, maxima: Sequence[int] = ()) -> list[str]:
    """The headers of one way or both, and the entry, which takes the first for up to `most` rows."""
    lines = [f'extern "C" void {entry}(void* const* data, const int64_t* ints, const double* floats) {{', *(["    Call call = read_call(data, ints, floats);", "    const Maxima maxima(call);"] if maxima else ["    const Call call = read_call(data, ints, floats);"]), "    if (call.rows == 0 || TOTAL == 0) return;"]
    if is_few and is_many:
        lines.append(f"    bool few = call.rows <= {most};")
        lines += ["    for (const Weight& weight : call.weight) few &= weight.column == 1 || weight.row == 1;"] * may_be_apart
        lines.append("    few ? few_rows(call) : many_rows(call);")
    else:
        lines.append(f"    {'few' if is_few else 'many'}_rows(call);")
    return [*(few_texts if is_few else ()), *(many_texts if is_many else ()), "\n".join([*lines, "}", ""])]


def steps_source(rows: int | None, one: bool = False) -> str:
    """The numbers of rows that few rows are taken at a time, as bits; one: a single row in any case."""
    steps = {4, 2, 1} if rows is None else {n for n in (4, rows % 4) if 0 < n <= rows}
    steps |= {1} if one else set()
    return f"constexpr int STEPS = {sum(1 << n for n in steps)};  // bit R: R rows at a time\n"


def _detail(spec, x_dtype, widths, k):
    norm = f"{spec.norm} norm, " if spec.norm else ""
    prologue = f"{spec.prologue} -> " if spec.prologue != "x" or spec.norm else ""
    return f"{norm}{prologue}{'; '.join(spec.epilogues)}; {name_of(x_dtype)} {k} -> {'+'.join(map(str, widths))}"


def text(file: str) -> str:
    return (_FOLDER / file).read_text()


def flag(x) -> str:
    return str(bool(x)).lower()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def epilogue(loops: Loops, spec: Spec, group: Group, output: int) -> str:
    names = {f"{letter}{w}": f"{letter}[{slot} * {letter}_slot + n]" for slot, w in enumerate(group.weights) for letter in "ap"}
    parameters = "const Call& call, int64_t i, const float* a, int64_t a_slot, const float* p, int64_t p_slot, int64_t first, int64_t width, float* to"
    return loops.function(f"epilogue_{output}", parameters, spec.epilogue_exprs[output], group.width, names)


def groups_source(found: Sequence[Group]) -> str:
    order = [w for group in found for w in group.weights]
    widths = [group.width for group in found for _ in group.weights]
    padded = [(n + 15) // 16 * 16 for n in widths]
    firsts = [sum(len(g.weights) for g in found[:n]) for n in range(len(found))]
    listed = ", ".join
    return "\n".join([
        f"constexpr int ORDERED = {len(order)}, MOST_SLOTS = {max(len(g.weights) for g in found)};",
        f"constexpr int ORDER[] = {{{listed(map(str, order))}}};  // the weights, by groups",
        f"constexpr int64_t WIDTH[] = {{{listed(map(str, widths))}}};",
        f"constexpr int64_t OFFSET[] = {{{listed(str(sum(padded[:n])) for n in range(len(padded)))}}}, TOTAL = {sum(padded)};  // of their columns in a row of sums",
        f"constexpr Group GROUPS[] = {{{listed(f'{{{first}, {len(g.weights)}, {g.width}, {g.block}}}' for first, g in zip(firsts, found))}}};",
        f"constexpr int64_t LONGEST_BLOCK = {max(g.block for g in found)};", ""])


def call_source(captures: Captures, num_sizes: int, outputs: int, weight_dtypes: Sequence[torch.dtype], unit: str, scales: bool = False, has_columns: bool = False, maxima: int = 0,
                has_row_max: bool = False, brgemm: bool = False) -> str:
    """``struct Call``: the arguments by name, and how they are read from the launcher's arrays.

    scales: a matrix of float32 for every weight, behind the weights; floats: eps, threshold. has_columns: a tensor of bool behind the captures.
    maxima: how many outputs' rows have their largest magnitude taken, into vectors of float32 between the outputs and x. has_row_max: a vector of float32, the last, has those of x.
    With either, one more float: 0 for a call that neither takes nor reads them, which is what the other form of the pair does (compiler/row_max.py times both).
    brgemm: one more integer, behind n0, n1, ...: does brgemm make the products of this call (compiler/int8_brgemm.py times that too)?
    """
    fields, reads, weights = [], [], len(weight_dtypes)
    matrices = weights * (1 + scales)
    at, x_at = 4 * (outputs + 1 + matrices) + 2 * maxima, 4 * outputs + 2 * maxima
    tensors = outputs + maxima  # that are written
    with_maxima = f"floats[{2 if scales else 1}] != 0"
    if maxima:
        fields += ["    Maximum maximum[MAXIMA];", "    bool with_maxima;", "    int32_t* own;  // of threads, see linear_maxima.h", "    int64_t own_row;", "    int own_threads;"]
        reads += [f"    call.maximum[{n}] = {{static_cast<int32_t*>(data[{outputs + n}]), ints[{4 * outputs + 2 * n + 1}]}};" for n in range(maxima)] + [f"    call.with_maxima = {with_maxima};"]
    reads += [f"    call.out[{o}] = {{static_cast<X*>(data[{o}]), ints[{4 * o + 2}], ints[{4 * o + 3}]}};" for o in range(outputs)]
    reads += [f"    call.x = static_cast<const X*>(data[{tensors}]);", f"    call.rows = ints[{x_at}], call.x_row = ints[{x_at + 2}], call.x_column = ints[{x_at + 3}];"]
    reads += [f"    call.weight[{w}] = {{data[{tensors + 1 + w}], ints[{x_at + 6 + 4 * w}], ints[{x_at + 7 + 4 * w}]}};" for w in range(weights)]
    if scales:
        fields += ["    Scales scale[WEIGHTS];", "    float threshold;", "    const uint8_t* columns;  // outliers that are known; null for those of the rows", "    int64_t columns_stride;"]
        scales_at = x_at + 4 * (1 + weights)
        reads += [f"    call.scale[{w}] = {{static_cast<const float*>(data[{tensors + 1 + weights + w}]), ints[{scales_at + 4 * w + 2}], ints[{scales_at + 4 * w + 3}]}};" for w in range(weights)]
        reads.append("    call.threshold = float(floats[1]), call.columns = nullptr, call.columns_stride = 0;")
    for k, (dtype, rank) in enumerate(zip(captures.dtypes, captures.ranks)):
        fields += [f"    const {ELEMENTS[dtype]}* c{k};", f"    const int64_t *c{k}_size, *c{k}_stride;  // rank {rank}"]
        reads.append(f"    call.c{k} = static_cast<const {ELEMENTS[dtype]}*>(data[{tensors + 1 + matrices + k}]), call.c{k}_size = ints + {at}, call.c{k}_stride = ints + {at + rank};")
        at += 2 * rank
    if has_columns:
        reads.append(f"    call.columns = static_cast<const uint8_t*>(data[{tensors + 1 + matrices + len(captures.dtypes)}]), call.columns_stride = ints[{at + 1}];")
        at += 2
    if has_row_max:
        fields += ["    const int32_t* row_max;  // bits of floats; null for a call that finds them itself", "    int64_t row_max_stride;"]
        reads.append(f"    call.row_max = {with_maxima} ? static_cast<const int32_t*>(data[{tensors + 1 + matrices + len(captures.dtypes) + has_columns}]) : nullptr, call.row_max_stride = ints[{at + 1}];")
        at += 2
    fields += [f"    int64_t n{k};" for k in range(num_sizes)]
    reads += [f"    call.n{k} = ints[{at + k}];" for k in range(num_sizes)]
    if brgemm:
        fields.append("    bool brgemm;  // makes the products")
        reads.append(f"    call.brgemm = ints[{at + num_sizes}] != 0;")
    kinds = list(dict.fromkeys(weight_dtypes))
    cases = [f"    if ({' || '.join(f'w == {w}' for w, other in enumerate(weight_dtypes) if other == dtype)}) return f(static_cast<const {ELEMENTS[dtype]}*>(call.weight[w].data));" for dtype in kinds[1:]]
    return "\n".join([
        *[f"constexpr int MAXIMA = {maxima};", "struct Maximum {  // of an output's rows, bits of floats", "    int32_t* data;", "    int64_t stride;", "};"] * bool(maxima),
        "struct Call {", "    Out out[OUTPUTS];", "    const X* x;", "    int64_t rows, x_row, x_column;", "    Weight weight[WEIGHTS];", "    float eps;",
        "    bool unit;  // captures lie as the loops over columns read them", *fields, "};", "",
        "static Call read_call(void* const* data, const int64_t* ints, const double* floats) {", "    Call call;", *reads, "    call.eps = float(floats[0]);", f"    call.unit = {unit};", "    return call;", "}", "",
        "// f of weight w's elements by their dtype", "template <class F>", "INLINE void with_elements(const Call& call, int w, F f) {", *cases,
        f"    f(static_cast<const {ELEMENTS[kinds[0]]}*>(call.weight[w].data));", "}", ""])


def finish_source(found: Sequence[Group], spec: Spec, maxima: Sequence[int] = ()) -> str:
    """``finish``: the epilogues of a group's outputs over the columns [first, first + width) of row i; the sums of its weights are `slot` apart. ``expect``: that they will come, for results and the captures read beside them.
    ``raise_maxima``: behind them, of a group's outputs whose rows have their largest magnitude taken."""
    lines = ["static void finish(const Call& call, int group, const float* a, int64_t slot, int64_t i, int64_t first, int64_t width, float* scratch) {",
             "    const int64_t p_slot = round_up(width, GRAIN);", "    float* results = scratch + MOST_SLOTS * p_slot;", "    switch (group) {"]
    for number, group in enumerate(found):
        lines.append(f"        case {number}:")
        partners = {w for o in group.outputs for w in spec.partners(o)}
        lines += [f"            exchange<{group.block}, {group.half}>(scratch + {s} * p_slot, a + {s} * slot, width);" for s, w in enumerate(group.weights) if w in partners]
        for o in group.outputs:
            lines += ["            {", f"                float* const to = results_at(call.out[{o}], i, first, results);",
                      f"                epilogue_{o}(call, i, a, slot, scratch, p_slot, first, width, to);",
                      f"                deliver(call.out[{o}], i, first, width, to);", "            }"]
        lines.append("            break;")
    lines += ["    }", "}", "// Asks for the cache lines of a group's results, and of captures at [i, j], in the columns [first, first + width) of row i.",
              "INLINE void expect(const Call& call, int group, int64_t i, int64_t first, int64_t width) {", "    switch (group) {"]
    for number, group in enumerate(found):
        lines += [f"        case {number}:", *(f"            expect_elements<true>(call.out[{o}].data + i * call.out[{o}].row + first, call.out[{o}].column, width);" for o in group.outputs)]
        beside = dict.fromkeys(e.args[0].name for o in group.outputs for e in sc.loads(spec.epilogue_exprs[o]) if e.args[1:] == (sc.I, sc.J))
        lines += [*(f"            expect_elements<false>(call.{c} + i * call.{c}_stride[0] + first, call.{c}_stride[1], width);" for c in beside), "            break;"]
    lines += ["    }", "}", "INLINE void raise_maxima(const Call& call, int group, int64_t i, int64_t first, int64_t width) {" if maxima else "INLINE void raise_maxima(const Call&, int, int64_t, int64_t, int64_t) {"]
    lines += [f"    if (group == {number}) raise_maximum(call, {n}, call.out[{o}], i, first, width);" for number, group in enumerate(found) for n, o in enumerate(maxima) if o in group.outputs]
    return "\n".join([*lines, "}", ""])
