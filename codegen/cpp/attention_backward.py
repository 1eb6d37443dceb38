"""``tileweld::attention_backward`` as C++: gradients of q, k and v by tiles of query rows, in fp32 (FlashAttention-2's backward, 2307.08691, with whole rows of scores at hand: attention_backward.h).

Scores are made again from q and k by the functions of the forward kernel (score.py), and multiplied with the derivative of the score by s, a text of the same language. Tiles that the mask empties are
skipped. Masked keys count where the fill is finite and a row's maximum comes within 104 of it; such rows are done again over all keys, as rows are that see nothing and are NaN.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import sympy
import torch

from ...compiler.errors import UnsupportedError
from ...compiler.ir import scalar as sc
from ...compiler.ir.attention import Variant, derivatives
from ...compiler.ir.kernel import Kernel
from ...compiler.ir.printer import text
from .printer import SIZE_LIMIT, CppPrinter
from .score import ELEMENTS, Captures, keys_source, linear_scale, row_loop, row_source, simplify, sink_source, tile_source, value_source

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 512  # a block of keys, their rows, values and sums is then 2 MiB; beyond, the torch blocks' products are as good
_FOLDER = Path(__file__).parent


def emit(variant: Variant, *, q_dtype: torch.dtype, capture_dtypes: Sequence[torch.dtype] = (), capture_ranks: Sequence[int] = (), head_dim: int, value_dim: int, num_sizes: int = 0) -> Kernel:
    """The kernel of a variant, for every B, H, Hk, Hv, Tq, Tk and all strides.

    q_dtype: of q, k, v, the output's gradient and of dq, dk, dv: float32, float16 or bfloat16. head_dim, value_dim: 1 to `MAX_HEAD_DIM`.
    Tensors of a call: [dq, dk, dv, grad, q, k, v, *captures], then the integers n0, n1, ...; no floats. Gradients of captures are none of its results.
    Raises UnsupportedError for other dtypes and sizes.
    """
    if q_dtype not in DTYPES:
        raise UnsupportedError(f"no C++ attention_backward kernel for {q_dtype}", cure="use float32, float16 or bfloat16, or the reference target")
    for name, width in (("head", head_dim), ("value", value_dim)):
        if not 1 <= width <= MAX_HEAD_DIM:
            raise UnsupportedError(f"no C++ attention_backward kernel for {name} dim {width}", cure=f"1 to {MAX_HEAD_DIM} are supported")
    captures = Captures(tuple(capture_dtypes), tuple(capture_ranks))
    score, mask, fill = simplify(variant)
    hides = variant.mask_expr is not sympy.true and variant.empty != "added"  # no gradient reaches a masked score
    slope = sc.ordered(derivatives(variant)[0])
    if hides and mask is sympy.true:  # the fill is part of the score
        slope = sc.select(variant.mask_expr, slope, sc.number(0))
    scale, constant = linear_scale(score), sc.is_const(slope)
    number, element = CppPrinter().float, ELEMENTS[q_dtype]
    factor = float(slope) if constant else 1.0  # of dQ and dK; a plain score's scale is in the queries, and so in dK
    dtype = str(q_dtype).removeprefix("torch.")
    detail = f"score={variant.score} mask={variant.mask} {dtype} head dim {head_dim}" + (f"/{value_dim}" if value_dim != head_dim else "") + (f" value={variant.value}" if variant.value else "")
    parts = [
        f"// tileweld attention_backward: dq, dk, dv of softmax(where(mask, score, {variant.fill})) v, over tiles; from the rewrite `attention`\n"
        f"//   score  {variant.score}, by s: {text(slope)}\n//   mask   {variant.mask}\n" + (f"//   sink   {variant.sink}\n" if variant.sink else "") + (f"//   value  {variant.value}\n" if variant.value else "") +
        f"//   {dtype}; head dim {head_dim}, value dim {value_dim}\n#include <omp.h>\n",
        _text("vector.h"),
        _text("scalar_math.h"),
        "// ---- this variant\n",
        f"using Element = {element};\nusing KeyElement = Element;\nusing ValueElement = Element;\n"
        f"constexpr int D = {head_dim}, DV = {value_dim};\nconstexpr bool LSE = false;\nconstexpr int PARTS = 1;\n"
        f"constexpr float SCALE = {number(scale if scale is not None else 1.0)};  // of the queries\n"
        f"constexpr float DQ_FACTOR = {number(factor)}, DK_FACTOR = {number(1.0 if scale is not None else factor)};\n"
        f"constexpr float FILL = {number(fill)};  // the score of a masked key\n"
        f"constexpr bool FINITE_FILL = {_word(math.isfinite(fill) and mask is not sympy.true)}, EMPTY_IS_ZERO = {_word(variant.empty == 'zero')};\n"
        f"constexpr bool SLOPES = {_word(not constant)}, HAS_OFFSET = {_word(variant.offset_expr is not None)};\n",
        _call_source(captures, num_sizes),
        row_source(captures, score, mask),
        _slope_source(captures, slope),
        _dvalue_source(captures, variant.value_expr, variant.offset_expr),
        _hide_source(captures, mask if hides else sympy.true),
        value_source(captures, variant.value_expr),
        tile_source(captures, mask),
        keys_source(captures, mask),
        sink_source(captures, variant.sink_expr),
        _text("attention_tiles.h"),
        _text("attention_backward.h"),
    ]
    return Kernel("attention_backward", "cpp", "\n".join(parts), "attention_backward", rewrite="attention", detail=detail)


def _text(name: str) -> str:
    return (_FOLDER / name).read_text()


def _word(x: bool) -> str:
    return str(x).lower()


def _slope_source(captures: Captures, slope) -> str:
    """``slope_row``: the score's derivative by s at a row's raw dot products."""
    if sc.is_const(slope):
        return "INLINE void slope_row(const Call&, float*, int64_t, int64_t, int64_t, int64_t, int64_t, float*) {}\n"
    return row_loop("slope", captures, [slope], lambda printer, slope: [f"        slopes[n] = {printer.real(slope)};"], ["        const float s = scores[n];"], "float* __restrict slopes")


def _dvalue_source(captures: Captures, value, offset) -> str:
    """``dvalue_row``: dP of the values f v + o from dO v^T, in place; total: the sum of dO."""
    if value is None and offset is None:
        return "INLINE void dvalue_row(const Call&, float*, int64_t, int64_t, int64_t, int64_t, int64_t, float) {}\n"

    def body(printer, *placed):
        placed = iter(placed)
        factor = f" * ({printer.real(next(placed))})" if value is not None else ""
        return [f"        scores[n] = scores[n]{factor}{f' + total * ({printer.real(next(placed))})' if offset is not None else ''};"]

    return row_loop("dvalue", captures, [e for e in (value, offset) if e is not None], body, [], "float total")


def _hide_source(captures: Captures, mask) -> str:
    """``hide_row``: no gradient of a score where the mask does not hold."""
    if mask is sympy.true:
        return "INLINE void hide_row(const Call&, float*, int64_t, int64_t, int64_t, int64_t, int64_t) {}\n"
    return row_loop("hide", captures, [mask], lambda printer, mask: [f"        scores[n] = ({printer(mask)}) ? scores[n] : 0.0f;"], [])


def _call_source(captures: Captures, num_sizes: int) -> str:
    """``struct Call``: the arguments by name, and how they are read from the launcher's arrays."""
    fields, reads, narrow = captures.call_parts(7, num_sizes, SIZE_LIMIT)
    names = ("dq", "dk", "dv", "grad", "q", "k", "v")
    take = [f"    call.{name}{'[0]' if name == 'k' else ''} = static_cast<{'' if n < 3 else 'const '}Element*>(data[{n}]), call.{name}_stride{'[0]' if name == 'k' else ''} = ints + {8 * n + 4};" for n, name in enumerate(names)]
    return "\n".join([
        "struct Call {", "    Element *dq, *dk, *dv;", "    const Element *grad, *q, *k[1], *v;", "    int64_t B, H, Hk[1], Hv, Tq, Tk;",
        "    const int64_t *dq_stride, *dk_stride, *dv_stride, *grad_stride, *q_stride, *k_stride[1], *v_stride;  // [B, H, T, D], in elements",
        "    bool is_narrow;  // every size is small enough for positions in int32", *fields, "};", "",
        "static Call read_call(void* const* data, const int64_t* ints) {", "    Call call;", *take,
        "    call.B = ints[32], call.H = ints[33], call.Tq = ints[34], call.Hk[0] = ints[41], call.Tk = ints[42], call.Hv = ints[49];", "    ints += 56;", *reads,
        f"    call.is_narrow = {narrow};", "    return call;", "}", ""])
