"""``tileweld::cross_entropy``: the negative log-likelihood of one class a row, from logits of any dtype, without a wide copy of them.

    z = softcap tanh(x / softcap)                                  softcap 0: z = x
    top = max over j of z[j],  rest = log(sum over j of exp(z[j] - top))          their sum, rounded, would lose the digits that count
    loss = rest - (1 - smoothing) (z[target] - top) - smoothing (mean(z) - top)   0 where target == ignore_index

    dx[j] = g (exp(z[j] - top - rest) - smoothing / V - (1 - smoothing) [j == target]) (1 - (z[j] / softcap)^2)   0 where ignored

Computed in float32 (float64 for float64); dx is rounded once, to the logits' dtype. Losses are per row: a sum or mean over them is left
to plain operations of N elements. The forward keeps top and rest, 2 N numbers, where eager keeps the log-softmax, N V.
A target that is neither a class nor ignored raises IndexError, as in eager on a CPU; no implementation may read outside the row.

This file is the meaning; kernels are tested against it in float64.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .rms_norm import compute_dtype

NOTHING_IGNORED = -2**63  # an ignore_index that no target has


def check_targets(targets: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError where a target is neither in [0, classes) nor ignored. Reads N integers; waits for the device."""
    outside = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
    if bool(outside.any()):
        raise IndexError(f"Target {int(targets[outside].flatten()[0])} is out of bounds.")  # torch's own words


def _capped(logits: Tensor, softcap: float) -> Tensor:
    wide = logits.to(compute_dtype(logits.dtype))
    return torch.tanh(wide / softcap) * softcap if softcap else wide


def _kept(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(which rows count, targets with 0 for the others)"""
    counts = targets != ignore_index
    return counts, torch.where(counts, targets, 0)


@torch.library.custom_op("tileweld::cross_entropy", mutates_args=())
def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, softcap: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """(losses, statistics) of every row.

    logits [..., V] of a float dtype, any strides; targets [...] int64 in [0, V) or ignore_index; softcap >= 0, smoothing in [0, 1].
    losses [...] and statistics [..., 2] (top, rest) are contiguous, float32 (float64 for float64 logits); ignored rows have statistics too.
    """
    check_targets(targets, logits.shape[-1], ignore_index)
    z = _capped(logits, softcap)
    top = z.amax(-1, keepdim=True)
    z = z - top
    rest = z.exp().sum(-1, keepdim=True).log()
    counts, safe = _kept(targets, ignore_index)
    losses = (rest - (1 - smoothing) * z.gather(-1, safe[..., None]))[..., 0]
    if smoothing:
        losses = losses - smoothing * z.mean(-1)
    return torch.where(counts, losses, 0.0).contiguous(), torch.cat([top, rest], -1)


@cross_entropy.register_fake
def _(logits, targets, ignore_index, softcap, smoothing):
    torch._check(logits.dim() == targets.dim() + 1, lambda: f"cross_entropy: logits of {logits.dim()} dims for targets of {targets.dim()}, expected one more")
    torch._check(logits.dtype.is_floating_point, lambda: f"cross_entropy: logits are {logits.dtype}, expected a float dtype")
    torch._check(targets.dtype == torch.int64, lambda: f"cross_entropy: targets are {targets.dtype}, expected int64")
    losses = logits.new_empty(logits.shape[:-1], dtype=compute_dtype(logits.dtype))
    return losses, losses.new_empty((*losses.shape, 2))


@torch.library.custom_op("tileweld::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(grad: Tensor, logits: Tensor, targets: Tensor, statistics: Tensor, ignore_index: int, softcap: float, smoothing: float) -> Tensor:
    """The gradient of logits, [..., V] contiguous in their dtype; grad [...] is that of the losses, statistics come from the forward."""
    z = _capped(logits, softcap)
    counts, safe = _kept(targets, ignore_index)
    top, rest = statistics[..., :1], statistics[..., 1:]
    dz = torch.exp(z - top - rest) - smoothing / logits.shape[-1]
    dz = dz.scatter_add(-1, safe[..., None], torch.full_like(top, smoothing - 1))
    dz = dz * grad.to(dz.dtype)[..., None]
    if softcap:
        dz = dz * (1 - (z / softcap) ** 2)
    return torch.where(counts[..., None], dz, 0.0).to(logits.dtype).contiguous()


@cross_entropy_backward.register_fake
def _(grad, logits, targets, statistics, ignore_index, softcap, smoothing):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, targets, *ctx.rest = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    logits, targets, statistics = ctx.saved_tensors
    return torch.ops.tileweld.cross_entropy_backward(grad, logits, targets, statistics, *ctx.rest), None, None, None, None


cross_entropy.register_autograd(_backward, setup_context=_setup_context)
