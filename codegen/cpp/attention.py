"""``tileweld::attention`` as C++: tiled online softmax (FlashAttention-2, 2307.08691) in fp32.

The source is one translation unit without torch headers: constants and the variant's own functions (score.py), and the
fixed parts beside this file. Two ways through it, chosen by the number of query positions; where that is known, the unit has one of them:

- many query rows (attention_packed.h): keys and values are packed once per KV head; tiles of 96 rows, in parallel over
  (batch, head, tile); scores stay in the L1 cache; tiles that the mask empties are skipped, full ones evaluate no mask;
- few rows, decoding (attention_streamed.h): keys and values are read once, in place, for the whole group of query heads.

Masked keys add nothing unless ``fill`` is finite and a row's maximum comes within 104 of it (exp is 0 in fp32 beyond): such
rows are found afterwards and done again over all keys with the score ``fill``. Keys that the mask hides are not read, so a NaN
among their values does not reach the row, where 0 * NaN would in the definition.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import sympy
import torch

from ...compiler.errors import UnsupportedError
from ...compiler.ir import scalar as sc
from ...compiler.ir.attention import Variant, is_widened
from ...compiler.ir.kernel import Kernel
from .key_text import key_source
from .printer import SIZE_LIMIT, CppPrinter
from .score import ELEMENTS, Captures, keys_source, linear_scale, row_source, simplify, sink_source, tile_source, value_source

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 1024  # a tile of queries and sums of 48 rows is then 384 KiB, beside a block of keys and values of 512 in an L2 cache of 1 MiB
STREAMED = 8  # query positions at most; from 9 on the packed tiles are faster, even with their packing (measured, 12 heads x 1024 keys x 64)
_FOLDER = Path(__file__).parent


def emit(variant: Variant, *, q_dtype: torch.dtype, capture_dtypes: Sequence[torch.dtype] = (), capture_ranks: Sequence[int] = (), head_dim: int, value_dim: int,
         num_sizes: int = 0, queries: int | None = None, key_dims: Sequence[int] = (), k_dtype: torch.dtype | None = None,
         v_dtype: torch.dtype | None = None, lse: bool = False) -> Kernel:
    """The kernel of a variant, for every B, H, Hk, Hv, Tq, Tk and all strides.

    queries: Tq, to which calls must keep, or None for any; all above `STREAMED` give the same kernel, all up to it another one.
    q_dtype: of q, k, v and the output: float32, float16 or bfloat16. k_dtype, v_dtype: what `is_widened` to q_dtype, int8 or with float32 a half type (a cache), None for q_dtype. head_dim, value_dim: 1 to `MAX_HEAD_DIM`.
    key_dims: head dims of the parts of the keys, which add up to head_dim, where they are several tensors [B, Hk, Tk, D] with an Hk each.
    lse: is the logarithm of every row's denominator a second output, [B, H, Tq] in float32?
    Tensors of a call: [out, q, *parts of k, v, *captures], [out, lse, q, ...] with lse, then the integers n0, n1, ...; no floats.
    Raises UnsupportedError for other dtypes and sizes.
    """
    if q_dtype not in DTYPES:
        raise UnsupportedError(f"no C++ attention kernel for {q_dtype}", cure="use float32, float16 or bfloat16, or the reference target")
    for name, width in (("head", head_dim), ("value", value_dim)):
        if not 1 <= width <= MAX_HEAD_DIM:
            raise UnsupportedError(f"no C++ attention kernel for {name} dim {width}", cure=f"1 to {MAX_HEAD_DIM} are supported")
    key_dims = tuple(key_dims) or (head_dim,)
    if sum(key_dims) != head_dim or min(key_dims) < 1:
        raise UnsupportedError(f"keys of head dim {head_dim} in parts of {list(key_dims)}", cure="parts of at least 1 that add up to the head dim")
    k_dtype, v_dtype = k_dtype or q_dtype, v_dtype or q_dtype
    for name, dtype in (("k", k_dtype), ("v", v_dtype)):
        if dtype != q_dtype and not is_widened(dtype, q_dtype):
            raise UnsupportedError(f"no C++ attention kernel for q of {q_dtype} and {name} of {dtype}", cure="give them one dtype, int8 keys and values, or with q of float32 half types")
    if variant.key and len(key_dims) > 1:
        raise UnsupportedError("no C++ attention kernel for a text of keys in parts", cure="give it keys in one tensor")
    captures = Captures(tuple(capture_dtypes), tuple(capture_ranks))
    score, mask, fill = simplify(variant)
    scale = linear_scale(score)
    number = CppPrinter().float
    detail = f"score={variant.score} mask={variant.mask} {str(q_dtype).removeprefix('torch.')} head dim {head_dim}" + (f"/{value_dim}" if value_dim != head_dim else "")
    detail += (f" k {_name(k_dtype)} v {_name(v_dtype)}" if {k_dtype, v_dtype} != {q_dtype} else "") + (f" value={variant.value}" if variant.value else "") + (f" key={variant.key}" if variant.key else "")
    parts = [
        f"// tileweld attention: out = softmax(where(mask, score, {variant.fill})) v, over tiles; from the rewrite `attention`\n"
        f"//   score  {variant.score}\n//   mask   {variant.mask}\n" + (f"//   sink   {variant.sink}\n" if variant.sink else "") +
        (f"//   value  {variant.value}{'' if variant.offset_expr is not None else ', a factor of the weights that the denominator does not see'}\n" if variant.value else "") + (f"//   key    {variant.key}, of the rows of keys that were just read\n" if variant.key else "") +
        f"//   dtypes {_dtypes(q_dtype, k_dtype, v_dtype, captures.dtypes)}; head dim {head_dim}, value dim {value_dim}\n#include <omp.h>\n",
        _text("vector.h"),
        _text("scalar_math.h"),
        "// ---- this variant\n",
        f"using Element = {ELEMENTS[q_dtype]};  // of the queries and the output\nusing KeyElement = {ELEMENTS[k_dtype]};\nusing ValueElement = {ELEMENTS[v_dtype]};\n"
        f"constexpr int D = {head_dim}, DV = {value_dim};\nconstexpr bool LSE = {str(lse).lower()};  // is the logarithm of the denominator stored?\n"
        f"constexpr int PARTS = {len(key_dims)}, PART_SIZE[PARTS] = {{{', '.join(map(str, key_dims))}}};  // tensors that make up a key\n"
        f"constexpr float SCALE = {number(scale if scale is not None else 1.0)};  // of the dot product\n"
        f"constexpr float FILL = {number(fill)};  // the score of a masked key\n"
        f"constexpr bool FINITE_FILL = {str(math.isfinite(fill) and mask is not sympy.true).lower()}, EMPTY_IS_ZERO = {str(variant.empty == 'zero').lower()}, MASK_USES_HEAD = {str(mask.has(sc.H)).lower()};\n",
        f"constexpr int ANY_QUERIES = 0, FEW_QUERIES = 1, MANY_QUERIES = 2, WAYS = {0 if queries is None else 1 if queries <= STREAMED else 2}, MOST_STREAMED = {STREAMED};\n",
        _call_source(captures, num_sizes, len(key_dims)),
        key_source(captures, variant.key_expr),
        row_source(captures, score, mask),
        value_source(captures, variant.value_expr, variant.offset_expr),
        tile_source(captures, mask),
        keys_source(captures, mask),
        sink_source(captures, variant.sink_expr),
        _text("attention_tiles.h"),
        _text("attention_packed.h"),
        _text("attention_stream_tiles.h"),
        _text("attention_streamed.h"),
        _text("attention_entry.h"),
    ]
    detail += " with log-sum-exp" if lse else ""
    return Kernel("attention", "cpp", "\n".join(parts), "attention", rewrite="attention", detail=detail)


def _text(name: str) -> str:
    return (_FOLDER / name).read_text()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(q_dtype, k_dtype, v_dtype, capture_dtypes):
    operands = [f"q k v {_name(q_dtype)}"] if {k_dtype, v_dtype} == {q_dtype} else [f"{name} {_name(dtype)}" for name, dtype in zip("qkv", (q_dtype, k_dtype, v_dtype))]
    return ", ".join(operands + [f"c{k} {_name(dtype)}" for k, dtype in enumerate(capture_dtypes)])


def _call_source(captures: Captures, num_sizes: int, parts: int) -> str:
    """``struct Call``: the arguments by name, and how they are read from the launcher's arrays."""
    fields, reads, narrow = captures.call_parts(3 + parts, num_sizes, SIZE_LIMIT)
    return "\n".join([
        "struct Call {", "    Element* out;", "    float* lse;", "    const int64_t* lse_stride;", "    const Element* q;", "    const KeyElement* k[PARTS];", "    const ValueElement* v;", "    int64_t B, H, Hk[PARTS], Hv, Tq, Tk, stored_keys;  // the positions of k: fewer than Tk where the text of the keys reads the others elsewhere",
        "    const int64_t *out_stride, *q_stride, *k_stride[PARTS], *v_stride;  // [B, H, T, D], in elements",
        "    bool is_narrow;  // every size is small enough for positions in int32", *fields, "};", "",
        "static Call read_call(void* const* data, const int64_t* ints) {", "    Call call;",
        "    call.out = static_cast<Element*>(data[0]), call.out_stride = ints + 4, call.lse = nullptr, call.lse_stride = nullptr;",
        "    if (LSE) {", "        call.lse = static_cast<float*>(data[1]), call.lse_stride = ints + 11;", "        ++data, ints += 6;  // three sizes and three strides", "    }",
        "    call.q = static_cast<const Element*>(data[1]);",
        "    call.v = static_cast<const ValueElement*>(data[PARTS + 2]);",
        "    // sizes and strides of out, q, the parts of k, v: four and four each",
        "    call.B = ints[8], call.H = ints[9], call.Tq = ints[10], call.Tk = ints[18 + 8 * PARTS], call.stored_keys = ints[18], call.Hv = ints[17 + 8 * PARTS];",
        "    call.q_stride = ints + 12, call.v_stride = ints + 20 + 8 * PARTS;",
        "    for (int part = 0; part < PARTS; ++part) {",
        "        call.k[part] = static_cast<const KeyElement*>(data[2 + part]);",
        "        call.Hk[part] = ints[17 + 8 * part], call.k_stride[part] = ints + 20 + 8 * part;",
        "    }",
        "    ints += 24 + 8 * PARTS;", *reads, f"    call.is_narrow = {narrow};", "    return call;", "}", ""])
