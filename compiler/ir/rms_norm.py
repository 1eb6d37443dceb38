"""``tileweld::rms_norm``: root-mean-square normalisation over the last dim, its definition, its fake and its gradient.

    r = rsqrt(mean(x^2, -1) + eps)          one number a row
    y = x r (offset + weight)               offset 0 (Llama, Mistral, T5) or 1 (Gemma); without a weight y = x r

Computed in float32, in float64 for float64 inputs. ``cast`` says where the result is rounded to x's dtype:

    "before"  weight * (x r).to(x.dtype)    Llama: two roundings; the result has the promotion of x's and weight's dtypes
    "after"   (x r weight).to(x.dtype)      Gemma and aten.rms_norm: one rounding; the result has x's dtype

Gradients, with n = x r, g = dy (offset + weight) and D the width of a row (Zhang and Sennrich, 1910.07467, section 4):

    dx = r (g - n mean(g n, -1))            dweight = sum over rows of dy n

This file is the meaning; kernels are tested against it in float64.
"""
from __future__ import annotations

import torch
from torch import Tensor

CASTS = ("before", "after")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def result_dtype(x: Tensor, weight: Tensor | None, cast: str) -> torch.dtype:
    """The dtype that eager gives: casting before the weight leaves the promotion of both."""
    if weight is None or cast == "after":
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype)


def default_eps(dtype: torch.dtype) -> float:
    """What aten.rms_norm takes for eps=None: the machine epsilon of the dtype it computes in (float32 for half types)."""
    return torch.finfo(compute_dtype(dtype)).eps


def reference(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str) -> Tensor:
    """The definition in torch operations; arguments and result as `rms_norm`."""
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast == "before":
        normed = normed.to(x.dtype)
    scale = weight.to(torch.promote_types(dtype, weight.dtype)) + offset
    return (normed * scale).to(result_dtype(x, weight, cast))


@torch.library.custom_op("tileweld::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str) -> Tensor:
    """RMS normalisation of the rows of x.

    x [..., D] and weight [D], float dtypes, any strides; eps >= 0 added to the mean square; offset added to the weight;
    cast "before" or "after". Returns [..., D] laid out like x, in x's dtype ("after") or the promoted one ("before").
    Width 0 and zero rows give an empty result. A symbolic eps is specialised with a guard: another value recompiles.
    """
    return reference(x, weight, eps, offset, cast)


def _check(x: Tensor, weight: Tensor | None, cast: str) -> None:
    torch._check(x.dim() > 0, lambda: "rms_norm: x has no dims, expected [..., D]")
    torch._check(x.dtype.is_floating_point, lambda: f"rms_norm: x is {x.dtype}, expected a float dtype")
    torch._check(cast in CASTS, lambda: f"rms_norm: cast {cast!r}, expected one of {CASTS}")
    if weight is not None:
        torch._check(weight.dim() == 1, lambda: f"rms_norm: weight has {weight.dim()} dims, expected [D]")
        torch._check(weight.shape[0] == x.shape[-1], lambda: f"rms_norm: weight [{weight.shape[0]}] for rows of {x.shape[-1]}")


@rms_norm.register_fake
def _(x, weight, eps, offset, cast):
    _check(x, weight, cast)
    return torch.empty_like(x, dtype=result_dtype(x, weight, cast))


@torch.library.custom_op("tileweld::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float) -> list[Tensor]:
    """[dx] or [dx, dweight], each in its tensor's shape and dtype; grad [..., D] in the result's dtype.

    The roundings of ``cast`` have no gradient of their own, so it does not appear here.
    """
    dtype = compute_dtype(x.dtype)
    wide, g = x.to(dtype), grad.to(dtype)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    grads = []
    if weight is not None:
        grads.append((g * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype) if x.numel() else torch.zeros_like(weight))
        g = g * (weight.to(dtype) + offset)
    dx = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    return [torch.empty_like(x).copy_(dx), *grads]  # laid out like x, not like grad, whose strides a product would take


@rms_norm_backward.register_fake
def _(grad, x, weight, eps, offset):
    return [torch.empty_like(x)] + ([] if weight is None else [torch.empty_like(weight)])


def _setup_context(ctx, inputs, output):
    x, weight, ctx.eps, ctx.offset, _ = inputs
    ctx.save_for_backward(*([x] if weight is None else [x, weight]))


def _backward(ctx, grad):
    x, *rest = ctx.saved_tensors
    dx, *dweight = torch.ops.tileweld.rms_norm_backward(grad, x, rest[0] if rest else None, ctx.eps, ctx.offset)
    return dx, dweight[0] if dweight else None, None, None, None


rms_norm.register_autograd(_backward, setup_context=_setup_context)
