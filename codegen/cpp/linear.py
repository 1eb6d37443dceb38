"""``tileweld::linear`` as C++: matrix products with their prologue, norm and epilogue, from weights as they lie, in float32.

One translation unit without torch headers. Two ways through it, chosen by the number of rows; where that is known, the unit has one of them:

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
from .linear_parts import check, few, flag, groups, steps_source, text, unit_source, ways_source
from .score import Captures


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
                       [f"constexpr bool BFLOAT16 = {flag(halves)};  // x and the weights\n", text("linear_lanes.h"), text("linear_source.h"), text("linear_settled.h"), text("linear_many.h")], few(k), "linear", maxima=maxima)
    source, detail = unit_source(spec, found, title="tileweld linear: out_o[i, j] = epilogue_o(a0, a1, ...), a_w = prologue(x) w^T", x_dtype=x_dtype, weight_dtypes=weight_dtypes,
                                 captures=Captures(tuple(capture_dtypes), tuple(capture_ranks)), widths=widths, k=k, num_sizes=num_sizes, unit=unit, lies=lies, ways=ways, maxima=maxima)
    return Kernel("linear", "cpp", source, "linear", rewrite="linear", detail=detail)


def _lies(unit: Sequence[bool] | None) -> str | None:
    return None if unit is None else "rows" if unit[1] else "columns" if unit[0] else "apart"
