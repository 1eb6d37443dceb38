"""``tileweld::linear`` as C++: matrix products with their prologue, norm and epilogue, from weights as they lie, in float32.

A translation unit without torch headers, and one that all units of many rows share: their micro-kernels (linear_kernels.h). Two ways through it, chosen by the number of rows; where that is known, the unit has one of them:

- few rows, decoding (linear_few.h): each weight is read once, in place, for all rows; threads share the columns of all weights;
- many rows (linear_many.h): threads take strips of columns, pack a strip into the L2 cache, and run it over all rows; the
  epilogue finds its sums in the L1 cache.

Outputs that share weights (gate and up) form a group, whose columns are computed together; so are the columns of a pair, which never leave
their block. y = prologue(x) is computed once (linear_rows.h); where it is x itself, x is read in place.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch

from ...compiler.ir.kernel import Kernel
from ...compiler.ir.linear import Spec
from .linear_parts import check, few, flag, groups, lies_source, steps_source, text, unit_source, ways_source
from .score import ELEMENTS, Captures


def emit(spec: Spec, *, x_dtype: torch.dtype, weight_dtypes: Sequence[torch.dtype], capture_dtypes: Sequence[torch.dtype] = (), capture_ranks: Sequence[int] = (),
         widths: Sequence[int], k: int, num_sizes: int = 0, rows: int | None = None, unit: Sequence[Sequence[bool]] | None = None, maxima: Sequence[int] = ()) -> Kernel:
    """The kernel of a spec.

    maxima: outputs whose rows' largest magnitudes are taken too; their vectors of float32 lie behind the outputs in a call, unit has nothing for them, and floats has 1 (0: not in this call).

    rows: how many x has, None for any. unit: for each tensor of a call, which of its dims have stride 1; None for all strides. A kernel for some rows
    and strides takes half the time to compile; calls must keep to them. More than `few(k)` rows give the same kernel, whatever their number.

    x_dtype: of x and the outputs; with weight_dtypes float32, float16 or bfloat16. widths: the N of every weight [N, K]; k: K.
    Tensors of a call: [*outputs, *maxima, x, *weights, *captures], then the integers n0, n1, ...; floats: eps.
    Raises UnsupportedError for other dtypes, and for outputs of one weight with different pairs.
    """
    check("linear", {"x": x_dtype} | {f"weight {n}": dtype for n, dtype in enumerate(weight_dtypes)}, widths, k)
    found = groups(spec, widths)
    at = len(spec.epilogues) + 1  # of the first weight in a call
    lies = {_lies(unit[at + w] if unit is not None else None) for w in range(len(weight_dtypes))}
    is_few, is_many = (rows is None or rows <= few(k)) and "apart" not in lies, rows is None or rows > few(k) or bool(lies & {"apart", None})
    halves = {x_dtype, *weight_dtypes} == {torch.bfloat16}
    ways = ways_source(is_few, is_many, [steps_source(rows), text("linear_dots.h"), text("linear_few_rows.h"), text("linear_few_columns.h"), text("linear_few.h")],
                       [*_lanes(halves), LINKED, text("linear_panels.h"), text("linear_lane_rows.h"), text("linear_source_of.h"), text("linear_settled.h"), text("linear_own_products.h"), text("linear_many.h")], few(k), "linear", maxima=maxima)
    source, detail = unit_source(spec, found, title="tileweld linear: out_o[i, j] = epilogue_o(a0, a1, ...), a_w = prologue(x) w^T", x_dtype=x_dtype, weight_dtypes=weight_dtypes,
                                 captures=Captures(tuple(capture_dtypes), tuple(capture_ranks)), widths=widths, k=k, num_sizes=num_sizes, unit=unit, lies=lies, ways=ways, maxima=maxima)
    return Kernel("linear", "cpp", source, "linear", rewrite="linear", detail=detail, parts=(micro_kernels(weight_dtypes, halves, lies),) if is_many else ())


LINKED = '#define LINKAGE __attribute__((visibility("hidden")))\n'


def micro_kernels(weight_dtypes: Sequence[torch.dtype], halves: bool, lies: set) -> str:
    """The translation unit that packs weights of these dtypes and multiplies panels of them, for every unit of many rows to link with.

    halves: x and all weights are bfloat16. lies: how weights may lie, as in `linear_parts.unit_source`.
    """
    elements = [ELEMENTS[dtype] for dtype in dict.fromkeys(weight_dtypes)]
    made = [f"template void multiply<{rows}, {vectors}>(const float*, int64_t, const float*, int64_t, float*, int64_t, bool);" for rows in ("BLOCK_ROWS", "BLOCK_ROWS / 3", "1") for vectors in (2, 1)]
    made += [f"template void pack<Source<{e}>>(Source<{e}>, int64_t, int64_t, int64_t, int64_t, int64_t, float* __restrict);" for e in elements]
    return "\n".join([f"// tileweld linear: packs weights of {' and '.join(elements)} and multiplies panels of them", text("vector.h"), lies_source(lies), *_lanes(halves), LINKED, text("linear_panels.h"), text("linear_kernels.h"), *made, ""])


def _lanes(halves: bool) -> list[str]:
    return [f"constexpr bool BFLOAT16 = {flag(halves)};  // x and the weights\n", text("linear_lanes.h"), text("linear_source.h")]


def _lies(unit: Sequence[bool] | None) -> str | None:
    return None if unit is None else "rows" if unit[1] else "columns" if unit[0] else "apart"
