"""The rows of the cost model: op -> how many operations. A contributor extends it with one row.

    "aten::mm": Row(matmul=lambda c: product(c["self"], c["mat2"])),

Names are those of the schema, without overload and without the underscore of an in-place op. Ops that torch tags as pointwise need no row.
"""
from __future__ import annotations

import sympy
import torch
from sympy import Integer, Rational

from . import interval
from . import scalar as sc
from .attention import variant_of
from .cost import Call, Row, ZERO, elements, hint
from .evaluate import Evaluator
from .graph import size
from .linear import spec_of

SOFTMAX = 5  # a score: maximum, subtraction, exp, sum, division
RMS = 3  # an element: square, sum, product with 1/rms; the weight is one more
LAYER = 5  # sum, subtraction, square, sum, product; weight and bias are one more each
TILE = 64  # attention kernels skip the tiles of 64 x 64 that a mask empties; what is left is counted whole


def per(argument: str, operations: int = 1):
    """So many operations an element of an argument."""
    return lambda c: operations * elements(c[argument])


def per_output(operations: int = 1):
    """So many operations an element of the (first) output."""
    return lambda c: operations * elements(c.out)


def product(a: torch.Tensor, b: torch.Tensor) -> sympy.Expr:
    """2 M N K of a [..., M, K] @ b [..., K, N] with broadcast batch dims; vectors as in torch.matmul."""
    rows = size(a.shape[-2]) if a.dim() > 1 else Integer(1)
    columns = size(b.shape[-1]) if b.dim() > 1 else Integer(1)
    batch_a, batch_b = ([size(n) for n in x.shape[:-2]] for x in (a, b))
    longer, shorter = (batch_a, batch_b) if len(batch_a) >= len(batch_b) else (batch_b, batch_a)
    aligned = [Integer(1)] * (len(longer) - len(shorter)) + shorter
    return 2 * rows * columns * size(a.shape[-1]) * sympy.Mul(*(m if n == 1 else n for m, n in zip(aligned, longer)))


def _linear(c: Call):
    return 2 * elements(c["input"]) * (size(c["weight"].shape[0]) if c["weight"].dim() == 2 else 1)


def _einsum(c: Call):
    """2 products an element of the space of all letters; a case with ``...`` counts its letters alone."""
    sizes = {}
    for letters, x in zip(c["equation"].replace(" ", "").split("->")[0].split(","), c["tensors"]):
        sizes |= dict(zip(letters.replace("...", ""), map(size, x.shape[x.dim() - len(letters.replace("...", "")):]), strict=True))
    return 2 * sympy.Mul(*sizes.values())


def _convolution(c: Call):
    """2 products an output (transposed: an input) element and weight of its group (flop_counter's conv_flop_count)."""
    x, weight = c["input"], c["weight"]
    anchor = x if c.arguments.get("transposed") else c.out
    return 2 * size(anchor.shape[0]) * sympy.Mul(*(size(n) for n in anchor.shape[2:])) * elements(weight)


def visible(mask, rows, keys, sizes=()) -> sympy.Expr:
    """The share of a [rows, keys] score matrix that lies in tiles where the mask may let something through, at the traced sizes.

    Conditions on captured tensors, batch or head let everything through. 1 where a size is not known.
    """
    known = [hint(n) for n in (rows, keys, *sizes)]
    if mask is sympy.true or None in known or 0 in known[:2]:
        return Integer(1)
    may = _optimistic(interval.tile(mask)[1], True, {interval.I_LO, interval.I_HI, interval.J_LO, interval.J_HI, sc.TQ, sc.TK, *(sc.size_symbol(k) for k in range(len(sizes)))})
    i_lo, j_lo = torch.arange(0, known[0], TILE)[:, None], torch.arange(0, known[1], TILE)[None, :]
    i_hi, j_hi = (i_lo + TILE - 1).clamp(max=known[0] - 1), (j_lo + TILE - 1).clamp(max=known[1] - 1)
    env = {"i_lo": i_lo, "i_hi": i_hi, "j_lo": j_lo, "j_hi": j_hi, "Tq": known[0], "Tk": known[1], **{f"n{k}": n for k, n in enumerate(known[2:])}}
    area = (i_hi - i_lo + 1) * (j_hi - j_lo + 1)
    seen = torch.where(Evaluator(env, [], torch.float64)(may), area, torch.zeros_like(area))
    return Rational(int(seen.sum()), known[0] * known[1])


def _optimistic(condition, holds: bool, symbols: set):
    """The condition with what other symbols decide taken as it would let most through."""
    if isinstance(condition, (sympy.And, sympy.Or)):
        return condition.func(*(_optimistic(x, holds, symbols) for x in condition.args))
    if isinstance(condition, sympy.Not):
        return sympy.Not(_optimistic(condition.args[0], not holds, symbols))
    return condition if condition.free_symbols <= symbols else sympy.true if holds else sympy.false


def operations(e) -> int:
    """Operations of a scalar expression: its nodes; what is only an index of a capture or a position counts nothing."""
    if not e.args or isinstance(e, sc.load) or sc.is_int(e) or sc.is_bool(e):
        return 0
    return 1 + sum(map(operations, e.args))


def _scores(c: Call):
    """(visible scores over all heads, D, Dv, the variant) of a tileweld::attention, attention_keys, attention_lse or attention_parts."""
    q, k, v = c["q"], c["k"] if "k" in c.arguments else c["parts"][0], c["v"]
    variant = variant_of(c["captures"], c["score"], c["mask"], c["fill"], c["sink"], c["empty"], c["value"])
    share = visible(variant.mask_expr, q.shape[2], v.shape[2], c["sizes"])
    return share * elements(q) / size(q.shape[3]) * size(v.shape[2]), size(q.shape[3]), size(v.shape[3]), variant


def _attention(c: Call):
    scores, width, value_width, _ = _scores(c)
    return 2 * scores * (width + value_width)


def _attention_vector(c: Call):
    scores, *_, variant = _scores(c)
    return scores * (SOFTMAX + operations(variant.score_expr))


def _attention_backward(c: Call):
    """Scores and their gradient, dq and dk over D; dp and dv over Dv: scores are computed again (FlashAttention, 2205.14135)."""
    scores, width, value_width, _ = _scores(c)
    return 2 * scores * (3 * width + 2 * value_width)


def _attention_backward_vector(c: Call):
    scores, *_, variant = _scores(c)
    return scores * (SOFTMAX + 4 + 2 * operations(variant.score_expr))  # delta, dp - delta, its product with p, the chain rule


def _library_scores(c: Call):
    q, k = c["query"], c["key"]
    mask = sc.J <= sc.I if c.arguments.get("is_causal") else sympy.true
    return visible(mask, q.shape[-2], k.shape[-2]) * elements(q) / size(q.shape[-1]) * size(k.shape[-2])


def _library_attention(c: Call):
    return 2 * _library_scores(c) * (size(c["query"].shape[-1]) + size(c["value"].shape[-1]))


def _library_backward(c: Call):
    return 2 * _library_scores(c) * (3 * size(c["query"].shape[-1]) + 2 * size(c["value"].shape[-1]))


def _fused_linear(c: Call):
    return sympy.Add(*(2 * elements(c["x"]) * size(w.shape[0]) for w in c["weights"]))


def _fused_linear_vector(c: Call):
    spec = spec_of(c["captures"], c["norm"], c["prologue"], c["epilogues"], c["pairs"])
    norm = {"": 0, "rms": 2, "layer": 4}[spec.norm] + operations(spec.prologue_expr)  # the prologue's text has the last product
    return norm * elements(c["x"]) + sympy.Add(*(operations(e) * elements(x) for e, x in zip(spec.epilogue_exprs, c.outs)), *(elements(c.outs[o]) for o in c["maxima"]))


def _merge_heads(c: Call):
    """The products and decompositions of compiler/ir/head_merge.py, method "data", leading terms alone: q, k and v times the root of the second moments [E, E]; o^T o of every query head;
    for every group a singular value decomposition of its values [size dv, E] (14 a^2 b for a < b, Golub and Van Loan, 8.6.3), and of its keys where no rotary pairs them."""
    (a, E), (b, _), (v, _) = ([size(n) for n in c[name].shape] for name in "qkv")
    inputs, dv, share, groups = E + 1, v / c["old_heads"], Integer(c["old_heads"] // c["kv_heads"]), c["kv_heads"]
    if share == 1:
        return ZERO
    decomposed = [v, *([] if c["rotary"][0] else [b])]
    return 2 * (a + b + v) * inputs**2 + 2 * elements(c["o"]) * dv + 14 * sum(groups * (rows / groups) ** 2 * inputs for rows in decomposed)


def _norm(operations: int):
    """So many an element of the input, and one more for each of weight and bias."""
    return lambda c: (operations + sum(isinstance(c.arguments.get(name), torch.Tensor) for name in ("weight", "bias"))) * elements(c.inputs()[0][1])


POINTWISE = Row(vector=per_output())
COPY = Row()
FILL = Row(unread=("self",))
FREE = Row(free=True)
REDUCTION = Row(vector=per("self"))
GATHER = Row(gathers="self")
SDPA = Row(matmul=_library_attention, vector=lambda c: (SOFTMAX + 1) * _library_scores(c))
SDPA_BACKWARD = Row(matmul=_library_backward, vector=lambda c: (SOFTMAX + 5) * _library_scores(c))

ROWS: dict[str, Row] = {
    # products
    "aten::mm": Row(matmul=lambda c: product(c["self"], c["mat2"])),
    "aten::bmm": Row(matmul=lambda c: product(c["self"], c["mat2"])),
    "aten::matmul": Row(matmul=lambda c: product(c["self"], c["other"])),
    "aten::mv": Row(matmul=lambda c: product(c["self"], c["vec"])),
    "aten::dot": Row(matmul=per("self", 2)),
    "aten::addmm": Row(matmul=lambda c: product(c["mat1"], c["mat2"]), vector=per_output()),
    "aten::baddbmm": Row(matmul=lambda c: product(c["batch1"], c["batch2"]), vector=per_output()),
    "aten::linear": Row(matmul=_linear, vector=lambda c: elements(c.out) if c["bias"] is not None else ZERO),
    "aten::convolution": Row(matmul=_convolution), "aten::conv1d": Row(matmul=_convolution), "aten::conv2d": Row(matmul=_convolution), "aten::conv3d": Row(matmul=_convolution),
    "aten::einsum": Row(matmul=_einsum),
    "aten::_grouped_mm": Row(matmul=lambda c: 2 * elements(c["self"]) * size(c["mat2"].shape[-1])),
    "transformers::grouped_mm_fallback": Row(matmul=lambda c: 2 * elements(c["input"]) * size(c["weight"].shape[-1])),
    "transformers::grouped_mm_fallback_backward": Row(matmul=lambda c: 4 * elements(c["input"]) * size(c["weight"].shape[-1])),
    # attention
    **dict.fromkeys(("tileweld::attention", "tileweld::attention_keys", "tileweld::attention_lse", "tileweld::attention_parts"), Row(matmul=_attention, vector=_attention_vector)),
    "tileweld::merge_lse": Row(vector=lambda c: 2 * elements(c.out) * len(c["outs"]) + 4 * elements(c.outs[1]) * len(c["lses"])),  # a product and a sum an element; maximum, difference, exp, sum a row
    "tileweld::attention_backward": Row(matmul=_attention_backward, vector=_attention_backward_vector),
    **dict.fromkeys(("aten::scaled_dot_product_attention", "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
                     "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_fused_attention_overrideable"), SDPA),
    **dict.fromkeys(("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "aten::_scaled_dot_product_flash_attention_backward",
                     "aten::_scaled_dot_product_efficient_attention_backward", "aten::_scaled_dot_product_cudnn_attention_backward"), SDPA_BACKWARD),
    # tileweld's other ops
    "tileweld::linear": Row(matmul=_fused_linear, vector=_fused_linear_vector), "tileweld::int8_linear": Row(matmul=_fused_linear, vector=_fused_linear_vector),
    "tileweld::quantize_rows": Row(vector=per("weight", 3)), "tileweld::dequantize_rows": Row(vector=per("q")),  # magnitude, maximum, quotient; a product
    "tileweld::rms_norm": Row(vector=_norm(RMS)),
    "tileweld::rms_norm_backward": Row(vector=lambda c: 8 * elements(c["x"])),  # the norm again (3), two products, a sum, a difference, a product
    "tileweld::add_rms_norm": Row(vector=_norm(RMS + 1)), "tileweld::add_layer_norm": Row(vector=_norm(LAYER + 1)),
    "tileweld::embedding_norm": Row(vector=lambda c: (len(c["tables"]) - 1 + (RMS if c["norm"] == "rms" else LAYER)) * elements(c.out), gathers="tables"),
    "tileweld::rotary": Row(vector=lambda c: 3 * elements(c["x"]) * c["width"] / size(c["x"].shape[-1])),  # two products and a sum
    "tileweld::cross_entropy": Row(vector=lambda c: (SOFTMAX + (3 if c["softcap"] else 0)) * elements(c["logits"])),
    "tileweld::cross_entropy_backward": Row(vector=lambda c: (SOFTMAX + (3 if c["softcap"] else 0)) * elements(c["logits"])),
    "tileweld::table": Row(vector=per_output()), "tileweld::merge_heads": Row(matmul=_merge_heads),
    # norms and softmax
    "aten::rms_norm": Row(vector=_norm(RMS)), "aten::_fused_rms_norm": Row(vector=_norm(RMS)),
    "aten::layer_norm": Row(vector=_norm(LAYER)), "aten::native_layer_norm": Row(vector=_norm(LAYER)),
    "aten::group_norm": Row(vector=_norm(LAYER)), "aten::native_group_norm": Row(vector=_norm(LAYER)),
    "aten::batch_norm": Row(vector=_norm(2)), "aten::native_layer_norm_backward": Row(vector=per("input", 8)),
    **dict.fromkeys(("aten::softmax", "aten::_softmax", "aten::log_softmax", "aten::_log_softmax"), Row(vector=per("self", SOFTMAX))),
    **dict.fromkeys(("aten::_softmax_backward_data", "aten::_log_softmax_backward_data"), Row(vector=per("output", 4))),
    # reductions: one operation an element of the input
    **dict.fromkeys((f"aten::{name}" for name in "sum mean amax amin max min prod any all argmax argmin cumsum cumprod logsumexp count_nonzero".split()), REDUCTION),
    **dict.fromkeys(("aten::var", "aten::std", "aten::var_mean", "aten::std_mean"), Row(vector=per("self", 3))),
    # gathers: the rows that are taken, not the table
    "aten::embedding": Row(gathers="weight"),
    **dict.fromkeys(("aten::index", "aten::index_select", "aten::gather", "aten::take", "aten::take_along_dim"), GATHER),
    # copies and fills
    **dict.fromkeys((f"aten::{name}" for name in "to _to_copy clone contiguous reshape cat stack repeat repeat_interleave roll flip constant_pad_nd pad tril triu _unsafe_view flatten "
                     "copy lift_fresh_copy slice_scatter select_scatter index_copy slice_backward select_backward embedding_dense_backward index_put scatter expand_copy unfold arange linspace full scalar_tensor".split()), COPY),
    **dict.fromkeys((f"aten::{name}" for name in "zeros ones zeros_like ones_like full_like new_zeros new_ones new_full zero fill eye rand randn rand_like randn_like".split()), FILL),
    **dict.fromkeys(("aten::where", "aten::__or__", "aten::__and__", "aten::__xor__", "aten::square", "aten::softplus", "aten::dropout", "aten::native_dropout", "aten::diff"), POINTWISE),  # no tag in torch
    # no kernel
    **dict.fromkeys((f"aten::{name}" for name in "empty empty_like new_empty empty_strided new_empty_strided sym_size sym_stride sym_numel _assert_async _assert_scalar lift_fresh detach".split()), FREE), "tileweld::stop_gradient": FREE,
}
