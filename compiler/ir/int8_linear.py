"""``tileweld::int8_linear``: `tileweld::linear` with weights of int8 and, if asked for, activations of int8. Texts, norms, captures and
outputs are those of ir/linear.py; only the accumulators differ. With y = prologue(x) in float32 and w = q scale[.., k // group]:

    "float"  a[i, j] = sum_k y[i, k] q[j, k] scale[j, k // group]                                            weight_only
    "int8"   s_i = max_k |y[i, k]| / 127,  t = clamp(round(y / s_i), -127, 127), half to even                dynamic, W8A8
             a[i, j] = s_i scale_j sum_k t[i, k] q[j, k]           the sum exact in int32: K <= 133,144
    "mixed"  column k is an outlier if some finite |y[i, k]| >= threshold, or, where `columns` is given, if it says so
             a[i, j] = sum over outliers y q scale + the others as in "int8", the row's maximum taken over those        LLM.int8()

`row_max` gives max_k |x[i, k]| where whoever made x knows it (`maxima` of this op and of `linear`): y = x then, the maximum is not looked for,
and the scales of the tokens are values of the graph. It is the same number, so nothing else changes.

    quantize_rows    scale[j, g] = max |w[j, k]| / 127 over the group,  q = clamp(round(w / scale), -127, 127)
    dequantize_rows  q scale, as a weight that a module holds in int8 is written in a graph

So threshold inf is "int8" and threshold 0 is "float". A zero row gives 0. A row with inf or NaN is computed as in "float", so that they
propagate as without int8. The columns of "mixed" without `columns` depend on all rows of a call: a row's result is not batch-invariant.
Sources: Dettmers et al. 2022 (LLM.int8), Xiao et al. 2022 (per-token, per-channel).

Without int8 activations the value is that of `linear` with dequantised weights. Gradients, where asked for, are those of the
dequantised weights (straight through the rounding of activations); weights and scales have none.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from ..errors import RefusalError
from .linear import NORMS, Spec, _library, _normalised, _outputs, compute_dtype, expanded, fake_maxima, spec_of, widths, with_maxima

ACTIVATIONS = ("float", "int8", "mixed")
MOST_K = 133_144  # 127 * 127 * K < 2^31


def limit_of(activation: str) -> float:
    """The largest K that a product may have."""
    return math.inf if activation == "float" else MOST_K


def dequantized(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q [N, K] int8 times scale [N, K / group], computed in float32 (float64 for float64) and rounded once to dtype."""
    wide, groups = compute_dtype(dtype), scale.shape[1]
    if groups == 1:
        return (q.to(wide) * scale.to(wide)).to(dtype)
    return (q.to(wide).view(q.shape[0], groups, -1) * scale.to(wide)[..., None]).view(q.shape).to(dtype)


def quantized(x: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """(q int8 [N, K], scale float32 [N, K / group]) of x [N, K]; group 0: the row. Computed in float32, float64 for float64."""
    wide = x.to(compute_dtype(x.dtype)).contiguous()
    if x.shape[1] == 0:
        return torch.zeros(x.shape, dtype=torch.int8, device=x.device), torch.zeros((x.shape[0], 1), device=x.device)
    parts = wide.reshape(x.shape[0], x.shape[1] // (group or x.shape[1]), -1)
    scale = (parts.abs().amax(-1) / 127).float()
    steps = scale.to(wide.dtype)[..., None]
    q = torch.where(steps > 0, parts / steps, 0).round().clamp(-127, 127)
    return q.view(x.shape).to(torch.int8), scale


def accumulators(y: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], activation: str, threshold: float = math.inf, columns: Tensor | None = None,
                 row_max: Tensor | None = None) -> list[Tensor]:
    """The sums a_w [M, N_w] of y [M, K] float32 or float64, in y's dtype."""
    wide = [dequantized(q, s, y.dtype) for q, s in zip(weights, scales)]
    if activation == "float" or y.shape[1] == 0:
        return [y @ w.T for w in wide]
    finite = (y.isfinite().all(1) if row_max is None else row_max.isfinite())[:, None]
    inner, outer = y.masked_fill(~finite, 0), None
    if activation == "mixed":
        outlier = columns if columns is not None else ((y.abs() >= threshold) & y.isfinite()).any(0)
        inner, outer = inner.masked_fill(outlier, 0), inner.masked_fill(~outlier, 0)
    s = (inner.abs().amax(1) if row_max is None else row_max.to(y.dtype).masked_fill(~finite[:, 0], 0))[:, None] / 127
    t = torch.where(s > 0, inner / s, 0).round().clamp(-127, 127)
    found = []
    for q, scale, w in zip(weights, scales, wide):
        a = _exact(t, q).to(y.dtype) * s * scale.to(y.dtype).T
        a = a if outer is None else a + outer @ w.T
        found.append(a if finite.all() else torch.where(finite, a, y @ w.T))
    return found


def _exact(t: Tensor, q: Tensor) -> Tensor:
    """t q^T of integers up to 127, exact: 1024 products are below 2^24, which float32 holds, and has the fast matmul; float64 adds what it takes up to 2^53."""
    blocks = [t[:, k:k + 1024].float() @ q[:, k:k + 1024].float().T for k in range(0, t.shape[1], 1024)]
    return blocks[0] if len(blocks) == 1 else sum(b.double() for b in blocks)


def reference(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], captures: Sequence[Tensor], sizes: Sequence[int], eps: float, spec: Spec, activation: str,
              threshold: float = math.inf, columns: Tensor | None = None, row_max: Tensor | None = None) -> list[Tensor]:
    """The definition in torch operations, all in the compute dtype but the exact sums; arguments and results as `int8_linear`."""
    dtype = compute_dtype(x.dtype)
    y = _normalised(x, captures, sizes, spec, eps, dtype)
    return _outputs(accumulators(y, weights, scales, activation, threshold, columns, row_max), x, captures, sizes, spec, dtype)


_library.define("quantize_rows(Tensor weight, int group) -> (Tensor, Tensor)")
_library.define("dequantize_rows(Tensor q, Tensor scale, ScalarType dtype, str activation, float threshold, Tensor? columns) -> Tensor")
_library.define("int8_linear(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] captures, SymInt[] sizes, str norm, float eps, str prologue, str[] epilogues, int[] pairs, "
                "str activation, float threshold, Tensor? columns, Tensor? row_max=None, int[] maxima=[]) -> Tensor[]")


@torch.library.impl("tileweld::quantize_rows", "CompositeExplicitAutograd", lib=_library)
def quantize_rows(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """weight [N, K] of a float dtype, finite -> (q int8 [N, K], scale float32 [N, K / group]), both contiguous; group 0: one scale a row.

    |weight - q scale| <= scale / 2 wherever scale is a normal float; a zero group has scale 0. Symmetric: -128 is never used.
    Raises RefusalError for a weight with inf or NaN.
    """
    _check_group(weight, group)
    if not weight.isfinite().all():
        raise RefusalError(f"a weight {[*weight.shape]} has inf or NaN, which int8 cannot hold", rewrite="int8", cure="leave its module out: options={'int8': {'scheme': ..., 'skip': [name]}}, or a filter_fn")
    return quantized(weight, group)


@torch.library.register_fake("tileweld::quantize_rows", lib=_library)
def _(weight, group):
    _check_group(weight, group)
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty((weight.shape[0], weight.shape[1] // group if group else 1), dtype=torch.float32)


def _check_group(weight, group):
    torch._check(weight.dim() == 2 and weight.dtype.is_floating_point, lambda: f"quantize_rows: a weight of {weight.dtype} {[*weight.shape]}, expected floats [N, K]")
    torch._check(group >= 0 and (not group or weight.shape[1] % group == 0), lambda: f"quantize_rows: groups of {group} do not divide rows of {weight.shape[1]}")


@torch.library.impl("tileweld::dequantize_rows", "CompositeExplicitAutograd", lib=_library)
def dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype, activation: str, threshold: float, columns: Tensor | None) -> Tensor:
    """q [N, K] int8 times scale [N, K / group] float32, rounded to dtype.

    activation, threshold, columns: how products with it are meant, as `int8_linear` has them. They do not change the value: they are
    what the int8 pass reads when it puts an int8_linear in place of a linear whose weight this is.
    """
    return dequantized(q, scale, dtype)


@torch.library.register_fake("tileweld::dequantize_rows", lib=_library)
def _(q, scale, dtype, activation, threshold, columns):
    _check_weight(q, scale, q.shape[1], activation)
    return q.new_empty(q.shape, dtype=dtype)


def _check_weight(q, scale, k, activation):
    torch._check(activation in ACTIVATIONS, lambda: f"int8: activation {activation!r}, expected one of {ACTIVATIONS}")
    torch._check(q.dim() == 2 and q.dtype == torch.int8 and q.shape[1] == k, lambda: f"int8: a weight of {q.dtype} {[*q.shape]} for rows of {k}, expected int8 [N, K]")
    torch._check(scale.dim() == 2 and scale.dtype in (torch.float32, torch.float64) and scale.shape[0] == q.shape[0] and scale.shape[1] > 0 and k % scale.shape[1] == 0,
                 lambda: f"int8: scales of {scale.dtype} {[*scale.shape]} for a weight {[*q.shape]}, expected float32 [N, K / group]")
    torch._check(activation == "float" or scale.shape[1] == 1, lambda: f"int8: {scale.shape[1]} scales a row with activations of int8, expected one")


def arguments(given: Sequence) -> list:
    """All fifteen arguments of a call of `int8_linear`: a graph leaves the last ones out where they are the defaults."""
    return [*given, *(None, ())[len(given) - 13:]]


def _check(x, weights, scales, norm, prologue, epilogues, pairs, activation, columns, row_max):
    torch._check(x.dim() == 2, lambda: f"int8_linear: x has {x.dim()} dims, expected [rows, K]")
    torch._check(norm in NORMS, lambda: f"int8_linear: norm {norm!r}, expected one of {NORMS}")
    torch._check(len(pairs) == 2 * len(epilogues) and len(scales) == len(weights), lambda: f"int8_linear: {len(weights)} weights with {len(scales)} scales, {len(epilogues)} outputs with {len(pairs)} numbers of pairs")
    k = x.shape[1]
    torch._check(k <= limit_of(activation), lambda: f"int8_linear: K = {k} overflows sums in int32, at most {MOST_K}")
    for q, scale in zip(weights, scales):
        _check_weight(q, scale, k, activation)
    torch._check(columns is None or (columns.dtype == torch.bool and columns.dim() == 1 and columns.shape[0] == k), lambda: f"int8_linear: columns for rows of {k}, expected bool [K]")
    torch._check(row_max is None or (activation == "int8" and not norm and prologue == "x" and row_max.dim() == 1 and row_max.shape[0] == x.shape[0] and row_max.dtype == compute_dtype(x.dtype)),
                 lambda: f"int8_linear: row_max {row_max.dtype} {[*row_max.shape]} for activation {activation!r}, norm {norm!r}, prologue {prologue!r}, expected {compute_dtype(x.dtype)} [rows] of x itself as int8")


@torch.library.impl("tileweld::int8_linear", "CompositeExplicitAutograd", lib=_library)
def int8_linear(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], captures: Sequence[Tensor], sizes: Sequence[int], norm: str, eps: float, prologue: str,
                epilogues: Sequence[str], pairs: Sequence[int], activation: str, threshold: float, columns: Tensor | None, row_max: Tensor | None = None,
                maxima: Sequence[int] = ()) -> list[Tensor]:
    """Fused matrix products of the rows of x with int8 weights.

    x [M, K] of a float dtype; weights, each int8 [N_w, K]; scales, for each float32 [N_w, K / group], one column for activation "int8" and
    "mixed"; columns: bool [K] or None; row_max: None, or max_k |x[i, k]| [M] in the compute dtype, for "int8" without norm and prologue; the others as
    in `tileweld::linear`. Returns one contiguous [M, N] in x's dtype for every epilogue, then `maxima`. M = 0 and K = 0 are allowed. Raises RuntimeError for other shapes and dtypes, and for K above `MOST_K` in int32 sums.
    """
    _check(x, weights, scales, norm, prologue, epilogues, pairs, activation, columns, row_max)
    return with_maxima(reference(x, weights, scales, captures, sizes, eps, spec_of(captures, norm, prologue, epilogues, pairs), activation, threshold, columns, row_max), maxima)


@torch.library.register_fake("tileweld::int8_linear", lib=_library)
def _(x, weights, scales, captures, sizes, norm, eps, prologue, epilogues, pairs, activation, threshold, columns, row_max=None, maxima=()):
    _check(x, weights, scales, norm, prologue, epilogues, pairs, activation, columns, row_max)
    return fake_maxima([x.new_empty((x.shape[0], n)) for n in widths(spec_of(captures, norm, prologue, epilogues, pairs), weights)], maxima)


class _StraightThrough(torch.autograd.Function):
    """The op's value, with the gradients of `linear` on dequantised weights."""

    @staticmethod
    def forward(ctx, call, x, *captures):
        ctx.call = call
        ctx.save_for_backward(x, *captures)
        return tuple(call(x, captures))

    @staticmethod
    def backward(ctx, *grads):
        weights, scales, sizes, texts = ctx.call.parts
        again = torch.is_grad_enabled()  # create_graph: the gradient is to be differentiated, in what was given too
        with torch.enable_grad():
            leaves = [t.view_as(t) if again and needed else t.detach().requires_grad_(needed) for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:])]
            outs = expanded(leaves[0], [dequantized(q, s, leaves[0].dtype) for q, s in zip(weights, scales)], leaves[1:], sizes, *texts)
            wanted = [leaf for leaf, needed in zip(leaves, ctx.needs_input_grad[1:]) if needed]
            found = iter(torch.autograd.grad(outs, wanted, grads, allow_unused=True, create_graph=again))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


class _Call:
    def __init__(self, weights, scales, sizes, texts, rest):
        self.parts, self.rest = (weights, scales, sizes, texts), rest

    def __call__(self, x, captures):
        weights, scales, sizes, texts = self.parts
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.tileweld.int8_linear.default(x, weights, scales, list(captures), sizes, *texts, *self.rest)


@torch.library.impl("tileweld::int8_linear", "Autograd", lib=_library)
def _(x, weights, scales, captures, sizes, norm, eps, prologue, epilogues, pairs, activation, threshold, columns, row_max=None, maxima=()):
    texts, how = (norm, eps, prologue, epilogues, pairs), (activation, threshold, columns, row_max)
    if fwAD._current_level >= 0 and any(fwAD.unpack_dual(t).tangent is not None for t in (x, *captures)):
        raise NotImplementedError("tileweld::int8_linear has no forward-mode derivative (jvp): take the reverse mode, or a float model")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *captures)):
        return with_maxima(list(_StraightThrough.apply(_Call(weights, scales, sizes, texts, how), x, *captures)), maxima)
    return _Call(weights, scales, sizes, texts, (*how, maxima))(x, captures)
