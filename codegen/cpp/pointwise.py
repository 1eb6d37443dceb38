"""A region of pointwise ops as one C++ loop nest over its root, written from front to back.

The innermost loop runs along the root's unit stride and is cut where a condition on its index changes (rotary's halves), so that
no piece has a branch on the index and each vectorises. Sizes and strides are part of the kernel: equal layers share it.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import sympy
from sympy import Integer
from sympy.core.relational import Relational

from ...compiler.ir.interval import tighten
from ...compiler.ir.kernel import Kernel
from ...compiler.ir.printer import text
from .printer import CppPrinter
from .score import ELEMENTS

_FOLDER = Path(__file__).parent
PARALLEL_FROM = 32768  # elements; below, waking the second thread costs more than it saves (about 5 us)


def emit(index, expr, *, sizes: Sequence[int], strides: Sequence[int], inputs: Sequence[tuple]) -> Kernel:
    """out[index] = expr. sizes, strides: of the float32 output; inputs: (dtype, strides of the dims that loads index) of c0, c1, ...

    Tensors of a call: [out, c0, c1, ...]; no integers, no floats.
    """
    order = sorted((d for d, n in enumerate(sizes) if n != 1), key=lambda d: strides[d], reverse=True)
    if not order:
        order = [0]
    *outer, inner = order
    ranges = {x: (Integer(0), Integer(n - 1)) for x, n in zip(index, sizes)}
    printer = CppPrinter(lambda k, at: _load(printer, k, at, inputs[k][1]))
    rows = 1
    for d in outer:
        rows *= sizes[d]
    body = [f"    const int64_t rows = {rows};",
            f"#pragma omp parallel for schedule(static) if ({str(rows * sizes[inner] >= PARALLEL_FROM).lower()})",
            "    for (int64_t row = 0; row < rows; ++row) {", "        int64_t rest = row;"]
    for d in reversed(outer):
        body.append(f"        const int64_t {index[d]} = rest % {sizes[d]}; rest /= {sizes[d]};")
    base = " + ".join(f"{index[d]} * {strides[d]}" for d in outer) or "0"
    body.append(f"        float* __restrict target = out + {base};")
    for low, high, piece in _pieces(expr, index[inner], 0, sizes[inner], ranges):
        body += ["        #pragma omp simd", f"        for (int64_t {index[inner]} = {low}; {index[inner]} < {high}; ++{index[inner]})",
                 f"            target[{index[inner]} * {strides[inner]}] = {printer.real(piece)};"]
    body += ["    }"]
    pointers = [f"    const {ELEMENTS[dtype]}* __restrict c{k} = static_cast<const {ELEMENTS[dtype]}*>(data[{k + 1}]);" for k, (dtype, _) in enumerate(inputs)]
    signature = 'extern "C" void pointwise(void* const* data, const int64_t*, const double*) {'
    detail = f"out[{', '.join(map(str, index))}] = {text(expr)}"
    code = "\n".join([signature, "    float* __restrict out = static_cast<float*>(data[0]);", *pointers, *body, "}", ""])
    source = "\n".join([f"// tileweld region of pointwise ops, sizes {list(sizes)}, strides {list(strides)}\n//   {detail}\n", (_FOLDER / "vector.h").read_text(), (_FOLDER / "scalar_math.h").read_text(), "// ---- this region\n", code])
    name = "pointwise_" + hashlib.sha256(code.encode()).hexdigest()[:8]
    return Kernel(name, "cpp", source, "pointwise", rewrite="pointwise", detail=detail)


def _load(printer, k, at, strides):
    terms = [f"({printer(e)}) * INT64_C({stride})" if stride != 1 else f"({printer(e)})" for e, stride in zip(at, strides) if e != 0 and stride != 0]
    return f"c{k}[{' + '.join(terms) or '0'}]"


def _pieces(expr, x, low: int, high: int, ranges: dict) -> list[tuple[int, int, sympy.Expr]]:
    """Stretches of the innermost index on which no condition on it alone changes, each with the expression as it is there."""
    expr = tighten(expr, {**ranges, x: (Integer(low), Integer(high - 1))})
    cuts = sorted(c for relation in expr.atoms(Relational) if relation.free_symbols == {x} for c in _edges(relation, x) if low < c < high)
    if not cuts:
        return [(low, high, expr)]
    middle = cuts[len(cuts) // 2]  # deciding one condition may decide or uncover others: nested cats
    return _pieces(expr, x, low, middle, ranges) + _pieces(expr, x, middle, high, ranges)


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
