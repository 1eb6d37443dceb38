"""``tileweld::add_rms_norm`` and ``tileweld::add_layer_norm``: a residual addition and the norm of the sum, with both results.

    s = x + residual           rounded to its dtype, as eager does: the residual stream goes on with this s, and so does the norm
    y = norm(s)                compiler/ir/rms_norm.py; or aten.layer_norm over the last dim

One pass reads x, residual and writes s, y: 4 N elements where addition and norm apart move 5 N (the norm reads s again).
"""
from __future__ import annotations

import torch
from torch import Tensor

from . import rms_norm as rms
from .composite import define


def layer_norm_parts(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dims: int | list[int] = -1) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of aten.native_layer_norm over ``dims`` in plain operations; y in x's dtype, the statistics [..., 1] wide.

    y = (x - mean) rsqrt(mean((x - mean)^2) + eps) weight + bias, in float32 (float64 for float64), rounded once.
    """
    wide = x.to(rms.compute_dtype(x.dtype))
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    y = centred * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), mean, rstd


def expanded_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str) -> tuple[Tensor, Tensor]:
    """(s, y): x and residual [..., D] of one shape; weight, eps, offset and cast as tileweld::rms_norm, applied to s."""
    s = x + residual
    return s, rms.reference(s, weight, eps, offset, cast)


def _differentiable_rms(x, residual, weight, eps, offset, cast):
    s = x + residual
    return s, torch.ops.tileweld.rms_norm(s, weight, eps, offset, cast)  # its own gradient keeps s alone


def expanded_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(s, y): x and residual [..., D] of one shape; weight and bias [D] or none."""
    s = x + residual
    return s, layer_norm_parts(s, weight, bias, eps)[0]


def _differentiable_layer(x, residual, weight, bias, eps):
    s = x + residual
    return s, torch.nn.functional.layer_norm(s, s.shape[-1:], weight, bias, eps)


add_rms_norm = define("add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, str cast) -> (Tensor, Tensor)", expanded_add_rms_norm, _differentiable_rms)
add_layer_norm = define("add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)", expanded_add_layer_norm, _differentiable_layer)
