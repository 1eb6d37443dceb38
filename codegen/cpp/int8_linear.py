"""``tileweld::int8_linear`` as C++: the units of `tileweld::linear` (linear.py) with other products: weights of int8, read where they lie.

What differs is what linear_few.h and linear_many.h ask for:

- activation "float": few rows convert weights to floats in registers (int8_dots.h); many rows dequantise a strip while packing it (int8_many_float.h).
- "int8": y becomes bytes in the pass that makes it, four of which fill a lane of 32 bits (int8_bytes.h). Few rows read the weights in place
  (int8_few.h), many in packed strips (int8_lanes.h), by brgemm of libtorch_cpu where that is asked for (int8_brgemm.h). Sums are exact; step and scale meet them in the cache, before the epilogue.
- "mixed": the same, with the outlier columns set to zero and added as floats (int8_outliers.h): found by a pass over y, or given.

A row with inf or NaN is multiplied as floats. Which instructions multiply bytes is decided where the kernel is compiled, on the processor that it
runs on: AVX512-VNNI or AVX-VNNI, AVX2, or plain vector arithmetic.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch

from ...compiler.errors import UnsupportedError
from ...compiler.ir.int8_linear import ACTIVATIONS, limit_of
from ...compiler.ir.kernel import Kernel
from ...compiler.ir.linear import Spec
from . import linear_parts
from .linear_parts import check, flag, steps_source, text, unit_source, ways_source
from .score import Captures


#: where a row's largest magnitude comes from
KNOWN = "INLINE int32_t known_magnitude(const Call& call, int64_t i) { return call.row_max == nullptr ? -1 : call.row_max[i * call.row_max_stride] & 0x7fffffff; }\n"
FOUND = "INLINE int32_t known_magnitude(const Call&, int64_t) { return -1; }\n"


def emit(spec: Spec, *, x_dtype: torch.dtype, capture_dtypes: Sequence[torch.dtype] = (), capture_ranks: Sequence[int] = (), widths: Sequence[int], k: int, num_sizes: int = 0,
         activation: str, groups: Sequence[int], has_columns: bool = False, rows: int | None = None, unit: Sequence[Sequence[bool]] | None = None,
         maxima: Sequence[int] = (), has_row_max: bool = False, brgemm: bool = False) -> Kernel:
    """The kernel of a spec; keywords as in `linear.emit`, and

    activation: "float", "int8" or "mixed". groups: how many scales a row of each weight has; one but for "float". has_columns: "mixed" is given its outliers.
    maxima, has_row_max: as the op has them; a pass over y less, and one over results that are in the L1 cache. unit has nothing for them.
    brgemm: many rows of bytes may be multiplied by brgemm of libtorch_cpu too. If so the kernel has link_torch, and one more integer behind the others in a call: 1, by brgemm; 0, by its own micro-kernels.
    Tensors of a call: [*outputs, *maxima, x, *weights int8 [N, K], *scales float32 [N, groups], *captures, columns bool [K] if has_columns, row_max if has_row_max], then the
    integers n0, n1, ...; floats: eps, threshold, and with maxima or row_max 1 (0: neither in this call). The elements of a weight's row lie together; all other strides are free.
    Raises UnsupportedError for other dtypes, groups that do not divide K, K too large for sums in int32, and as `linear.emit`.
    """
    check("int8_linear", {"x": x_dtype}, widths, k)
    _check(activation, groups, has_columns, k, unit, len(spec.epilogues), has_row_max, spec)
    kinds = [torch.int8] * len(widths)
    found = linear_parts.groups(spec, widths)
    is_float = activation == "float" or k == 0
    most = few(activation, k)
    is_few, is_many = rows is None or rows <= most, rows is None or rows > most
    brgemm = brgemm and is_many and not is_float
    variant = (f"constexpr bool MIXED = {flag(activation == 'mixed' and not is_float)};  // outlier columns are floats\n"
               f"constexpr bool BRGEMM = {flag(brgemm)};  // may make the products of many rows\n"
               f"constexpr int64_t GROUP[] = {{{', '.join(str(k // n) for n in groups)}}};  // columns of a scale, by weights\n" + text("int8_bytes.h"))
    few_texts = [*([text("linear_few_rows.h"), text("int8_few_float.h")] if is_float else [text("int8_few.h")]), text("linear_few.h")]
    many_texts = (["constexpr bool BFLOAT16 = false;\n", text("linear_lanes.h"), text("linear_lane_rows.h"), text("int8_many_float.h"), text("linear_settled.h")] if is_float else [text("int8_lanes.h")])
    many_texts += ["#define LINKAGE static\n", text("linear_panels.h"), text("linear_kernels.h"), text("int8_brgemm.h" if brgemm else "linear_own_products.h"), text("linear_many.h")]
    shared = [] if is_float and not is_few else [steps_source(rows if is_few else 1, one=True), text("linear_dots.h"), text("int8_dots.h"), *([] if is_float else [KNOWN if has_row_max else FOUND, text("int8_outliers.h")])]
    ways = [*shared, *ways_source(is_few, is_many, few_texts, many_texts, most, "int8_linear", may_be_apart=False, maxima=maxima)]
    source, detail = unit_source(spec, found, title="tileweld int8_linear: out_o[i, j] = epilogue_o(a0, a1, ...), a_w = prologue(x) (q_w scale_w)^T", x_dtype=x_dtype, weight_dtypes=kinds,
                                 captures=Captures(tuple(capture_dtypes), tuple(capture_ranks)), widths=widths, k=k, num_sizes=num_sizes, unit=unit, lies={"rows"}, ways=ways, variant=variant,
                                 scales=True, has_columns=has_columns, maxima=maxima, has_row_max=has_row_max, brgemm=brgemm)
    return Kernel("int8_linear", "cpp", source, "int8_linear", rewrite="int8", detail=f"{detail}; activation {activation}", link_torch=brgemm, parts=(text("int8_brgemm_part.h"),) if brgemm else ())


def few(activation: str, k: int) -> int:
    """The number of rows of x [M, k] up to which weights are read where they lie. Bytes: sixteen (16 rows of 1024 -> 4096 took 0.66 ms in place, 0.78 packed; 32 rows 1.12 and
    1.14), half of that where outliers are gathered for every row. Floats: as long as four rows of y stay in an L1 cache of 32 KiB (at K = 4096, 8 rows 1.78 against 1.80 ms)."""
    return 8 if activation == "mixed" else 16 if activation == "int8" or 4 * k <= 6144 else 6


def _check(activation, groups, has_columns, k, unit, outputs, has_row_max, spec):
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"activation {activation!r}", cure=f"one of {', '.join(ACTIVATIONS)}")
    if k > limit_of(activation):
        raise UnsupportedError(f"sums of {k} products of int8 overflow int32", cure=f"up to {limit_of(activation)} are exact; use activation 'float'")
    for number, n in enumerate(groups):
        if n < 1 or k % n or (n > 1 and activation != "float"):
            raise UnsupportedError(f"weight {number} has {n} scales for {k} columns{' and activations of int8' if activation != 'float' else ''}", cure="one scale a row, or with float activations one for equal groups")
    if has_columns and activation != "mixed":
        raise UnsupportedError(f"outlier columns are given for activation {activation!r}", cure="they belong to 'mixed'")
    if has_row_max and (activation != "int8" or spec.norm or spec.prologue != "x"):
        raise UnsupportedError(f"row_max is given for activation {activation!r} of {spec.prologue!r}", cure="it belongs to 'int8' of x itself")
    for number in range(len(groups)) if unit is not None and k > 1 else ():
        if not unit[outputs + 1 + number][1]:
            raise UnsupportedError(f"the rows of weight {number} do not lie together", cure="make it contiguous")
