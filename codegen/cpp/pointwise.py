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
    for low, high in _pieces(expr, index[inner], sizes[inner]):
        piece = tighten(expr, {**ranges, index[inner]: (Integer(low), Integer(high - 1))})
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


def _pieces(expr, x, n) -> list[tuple[int, int]]:
    """Stretches of the innermost index on which no condition on it alone changes."""
    cuts = {0, n}
    for relation in expr.atoms(Relational):
        if relation.free_symbols == {x}:
            for edge in sympy.solve(relation.lhs - relation.rhs, x):
                whole = int(sympy.floor(edge))
                strict = relation.rel_op in ("<", ">=") and edge == whole  # x < 8 changes at 8, x <= 7 too
                cuts |= {whole} if strict else {whole + 1} if relation.rel_op in ("<", "<=", ">", ">=") else {whole, whole + 1}
    cuts = {c for c in cuts if 0 <= c <= n}
    if len(cuts) > 9:
        return [(0, n)]
    ordered = sorted(cuts)
    return list(zip(ordered, ordered[1:]))
