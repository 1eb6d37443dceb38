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
from .score import ELEMENTS, Captures, keys_source, linear_scale, locals_of, row_loop, row_source, simplify, sink_source, tile_source, value_source

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 512  # a block of keys, their rows, values and sums is then 2 MiB; beyond, the torch blocks' products are as good
_FOLDER = Path(__file__).parent


def emit(variant: Variant, *, q_dtype: torch.dtype, capture_dtypes: Sequence[torch.dtype] = (), capture_ranks: Sequence[int] = (), head_dim: int, value_dim: int, num_sizes: int = 0,
         wanted: Sequence[int] = ()) -> Kernel:
    """The kernel of a variant, for every B, H, Hk, Hv, Tq, Tk and all strides.

    q_dtype: of q, k, v, the output's gradient and of dq, dk, dv: float32, float16 or bfloat16. head_dim, value_dim: 1 to `MAX_HEAD_DIM`.
    wanted: numbers of the captures, of few elements, whose gradients are results too: every part of the work has sums of its own for them.
    Tensors of a call: [dq, dk, dv, *gradients of the wanted captures, contiguous, grad, q, k, v, *captures], then the integers n0, n1, ...; no floats.
    Raises UnsupportedError for other dtypes and sizes, and for a capture whose gradient depends on the dot product (a score's temperature), or that stands in `value`.
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
    by_score, by_sink = _terms(variant, wanted, variant.mask_expr if hides and mask is sympy.true else sympy.true)
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
        f"constexpr bool SLOPES = {_word(not constant)}, HAS_OFFSET = {_word(variant.offset_expr is not None)}, TOTALS = {_word(bool(wanted))};\n",
        _call_source(captures, num_sizes, wanted),
        row_source(captures, score, mask),
        _slope_source(captures, slope),
        _dvalue_source(captures, variant.value_expr, variant.offset_expr),
        _totals_source(captures, by_score, by_sink, wanted),
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


def _terms(variant: Variant, wanted: Sequence[int], mask) -> tuple[list, list]:
    """[(element of a wanted capture, its derivative)] of the score, 0 where ``mask`` does not hold, and of the sink."""
    _, by_score, by_sink, by_value, by_offset = derivatives(variant)
    number = lambda element: int(element.args[0].name[1:])  # noqa: E731
    for element, derivative in by_score:
        if number(element) in wanted and derivative.has(sc.S):
            raise UnsupportedError(f"the gradient of the captured c{number(element)} depends on the dot product", cure="the torch blocks have it")
    for element, _ in (*by_value, *by_offset):
        if number(element) in wanted:
            raise UnsupportedError(f"the gradient of the captured c{number(element)} is one of the values' text", cure="the torch blocks have it")
    return ([(element, sc.select(mask, sc.ordered(derivative), sc.number(0))) for element, derivative in by_score if number(element) in wanted],
            [(element, sc.ordered(derivative)) for element, derivative in by_sink if number(element) in wanted])


def _totals_source(captures: Captures, by_score, by_sink, wanted: Sequence[int]) -> str:
    """``Totals``, sums of the gradients of captures, ``capture_row`` and ``capture_sink``, which add to them, and ``write_totals``."""
    count = lambda k: " * ".join([f"call.c{k}_size[{d}]" for d in range(captures.ranks[k])] or ["1"])  # noqa: E731
    lines = ["// Sums of the gradients of captured tensors, contiguous.", "struct Totals {", *(f"    float* c{k};" for k in wanted), "    Totals(const Call& call, float* at) {",
             *(f"        c{k} = at, at += {count(k)};" for k in wanted), "        (void)call, (void)at;", "    }", "};",
             f"INLINE int64_t totals_of(const Call& call) {{ (void)call; return {' + '.join(map(count, wanted)) or '0'}; }}", ""]

    def added(printer, terms, scale):
        found = []
        for element, derivative, *indices in terms:
            k = int(element.args[0].name[1:])
            places = [" * ".join([captures.index(printer, index, f"call.c{k}_size[{d}]"), *(f"call.c{k}_size[{e}]" for e in range(d + 1, captures.ranks[k]))]) for d, index in enumerate(indices)]
            found.append(f"totals.c{k}[{' + '.join(places) or '0'}] += {scale} * ({printer.real(derivative)});")
        return found

    def body(printer, *placed):
        placed = iter(placed)
        return [f"        {line}" for line in added(printer, [(element, next(placed), *(next(placed) for _ in element.args[1:])) for element, _ in by_score], "scores[n]")]

    exprs = [x for element, derivative in by_score for x in (derivative, *element.args[1:])]
    if exprs:
        lines.append(row_loop("capture", captures, exprs, body, [], "const Totals totals"))
    else:
        lines.append("INLINE void capture_row(const Call&, float*, int64_t, int64_t, int64_t, int64_t, int64_t, const Totals&) {}")
    sinks = [(element, derivative, *element.args[1:]) for element, derivative in by_sink]
    lines += ["INLINE void capture_sink(const Call& call, int64_t b, int64_t h, int64_t i, float gradient, const Totals& totals) {", *locals_of([x for term in sinks for x in term[1:]]),
              *(f"    {line}" for line in added(captures.printer(), sinks, "gradient")), "    (void)call, (void)b, (void)h, (void)i, (void)gradient, (void)totals;", "}",
              "static void write_totals(const Call& call, const float* sums, int64_t size, int64_t parts) {", "    (void)call, (void)sums, (void)size, (void)parts;", "    int64_t at = 0;"]
    for k in wanted:
        lines += [f"    for (int64_t n = 0; n < {count(k)}; ++n, ++at) {{", "        float sum = 0.0f;", "        for (int64_t part = 0; part < parts; ++part) sum += sums[part * size + at];", f"        store_element(call.dc{k} + n, sum);", "    }"]
    return "\n".join([*lines, "    (void)at;", "}", ""])


def _call_source(captures: Captures, num_sizes: int, wanted: Sequence[int]) -> str:
    """``struct Call``: the arguments by name, and how they are read from the launcher's arrays."""
    fields, reads, narrow = captures.call_parts(7 + len(wanted), num_sizes, SIZE_LIMIT)
    ints = 2 * sum(captures.ranks[k] for k in wanted)  # sizes and strides of their gradients, which are contiguous
    fields += [f"    {ELEMENTS[captures.dtypes[k]]}* dc{k};" for k in wanted]
    names = ("dq", "dk", "dv", "grad", "q", "k", "v")
    take = [f"    call.{name}{'[0]' if name == 'k' else ''} = static_cast<{'' if n < 3 else 'const '}Element*>(data[{n + (len(wanted) if n > 2 else 0)}]), call.{name}_stride{'[0]' if name == 'k' else ''} = ints + {8 * n + 4 + (ints if n > 2 else 0)};" for n, name in enumerate(names)]
    take += [f"    call.dc{k} = static_cast<{ELEMENTS[captures.dtypes[k]]}*>(data[{n}]);" for n, k in enumerate(wanted, 3)]
    return "\n".join([
        "struct Call {", "    Element *dq, *dk, *dv;", "    const Element *grad, *q, *k[1], *v;", "    int64_t B, H, Hk[1], Hv, Tq, Tk;",
        "    const int64_t *dq_stride, *dk_stride, *dv_stride, *grad_stride, *q_stride, *k_stride[1], *v_stride;  // [B, H, T, D], in elements",
        "    bool is_narrow;  // every size is small enough for positions in int32", *fields, "};", "",
        "static Call read_call(void* const* data, const int64_t* ints) {", "    Call call;", *take,
        f"    ints += {ints};", "    call.B = ints[32], call.H = ints[33], call.Tq = ints[34], call.Hk[0] = ints[41], call.Tk = ints[42], call.Hv = ints[49];", "    ints += 56;", *reads,
        f"    call.is_narrow = {narrow};", "    return call;", "}", ""])
