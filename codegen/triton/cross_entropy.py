"""``tileweld::cross_entropy`` and its backward as a Triton module: a program a row, in steps of BLOCK classes.

The forward reads the logits once: a step's maximum rescales the sum so far (Milakov and Gimelshein, 1805.02867). The backward reads them
once and writes the gradient. A target out of bounds sets status, gives NaN, and is never used as an address. The module stands alone:
the entry launches, `AOT` lists what to compile ahead of time.
"""
from __future__ import annotations

import torch

from ...compiler.errors import UnsupportedError
from ...compiler.ir.kernel import Kernel
from .source import fill

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
ARITHMETIC = {torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.float32: "tl.float32"}

HOST = '''
import torch
import triton
import triton.language as tl

BLOCK = 4096  # classes a step: 8 to 16 bytes a thread of 8 warps, 2 to 4 times
WARPS = 8


def rows_of(x):
    """x [..., V]'s leading dims as (outer, inner) sizes and strides; None if they have no such form."""
    merged = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return None if len(merged) > 2 else [(1, 0)] * (2 - len(merged)) + merged


def arranged(logits):
    """(logits or a copy, inner, outer stride, inner stride)"""
    form = rows_of(logits)
    if form is None:
        logits = logits.contiguous()
        form = rows_of(logits)
    return logits, max(form[1][0], 1), form[0][1], form[1][1]


@triton.jit
def capped(x, softcap):
    """softcap tanh(x / softcap), by the exponential of a number that is never positive."""
    z = tl.exp(-2.0 * tl.abs(x / softcap))
    t = (1.0 - z) / (1.0 + z)
    return softcap * tl.where(x < 0, -t, t)
'''

FORWARD = '''
"""tileweld::cross_entropy   loss = log(sum exp(z - top)) - (z[target] - top), a row at a time      from the rewrite `cross_entropy`

$detail
"""
$host


@triton.jit(do_not_specialize=["softcap", "smoothing", "ignored"])
def cross_entropy_kernel($parameters):
    row = tl.cast(tl.program_id(0), tl.int64)
    x_ptr += row // inner * stride_xo + row % inner * stride_xi
    top = -float("inf")
    total = 0.0
    sum_z = 0.0
    for start in tl.range(0, classes, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = tl.load(x_ptr + tl.cast(col, tl.int64) * stride_xv, mask=col < classes, other=-float("inf")).to(tl.float32)
        $cap_block
        here = tl.maximum(top, tl.max(z, 0))
        shift = tl.where(here == -float("inf"), 0.0, here)  # nothing but -inf so far: there may be numbers to come
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)
        top = here
        sum_z += tl.sum(tl.where(col < classes, z, 0.0), 0)
    rest = tl.log(total)
    tl.store(statistics_ptr + 2 * row, top)
    tl.store(statistics_ptr + 2 * row + 1, rest)
    target = tl.load(targets_ptr + row)
    counts = target != ignored
    inside = (target >= 0) & (target < classes)
    z = tl.load(x_ptr + tl.where(inside, target, 0) * stride_xv).to(tl.float32)
    $cap
    loss = rest - (1.0 - smoothing) * (z - top)
    loss = tl.where(smoothing != 0.0, loss - smoothing * (sum_z / classes - top), loss)
    tl.store(losses_ptr + row, tl.where(counts, tl.where(inside, loss, float("nan")), 0.0))
    tl.store(status_ptr, 1, mask=counts & (inside == 0))


def cross_entropy(tensors, ints, floats):
    """tensors: losses [...], statistics [..., 2], status [1], logits [..., V], targets [...]; ints: ignore_index; floats: softcap, smoothing. Fills the first three."""
    losses, statistics, status, logits, targets = tensors
    if losses.numel() == 0:
        return
    if logits.device.type == "cpu" and logits.dtype == torch.bfloat16:  # the interpreter computes bf16 on raw bits
        raise TypeError("cross_entropy: Triton's interpreter cannot compute bfloat16; use float32 or float16 to check on a CPU")
    logits, inner, *strides = arranged(logits)
    cross_entropy_kernel[(losses.numel(),)](losses, statistics, status, logits, targets.contiguous(), inner, logits.shape[-1], *strides, logits.stride(-1), ints[0], float(floats[0]), float(floats[1]),
                                            BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[-1])), num_warps=WARPS, enable_fp_fusion=True)
'''

BACKWARD = '''
"""tileweld::cross_entropy_backward   dx = g (exp(z - top - rest) - [j == target]), a row at a time      from the rewrite `cross_entropy`

$detail
"""
$host


@triton.jit(do_not_specialize=["softcap", "smoothing", "ignored"])
def cross_entropy_backward_kernel($parameters):
    row = tl.cast(tl.program_id(0), tl.int64)
    x_ptr += row // inner * stride_xo + row % inner * stride_xi
    out_ptr += row * classes
    target = tl.load(targets_ptr + row)
    grad = tl.load(grad_ptr + row)
    top = tl.load(statistics_ptr + 2 * row)
    rest = tl.load(statistics_ptr + 2 * row + 1)
    counts = target != ignored
    grad = tl.where((target >= 0) & (target < classes), grad, float("nan"))
    for start in tl.range(0, classes, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = tl.load(x_ptr + tl.cast(col, tl.int64) * stride_xv, mask=col < classes, other=0.0).to(tl.float32)
        $cap
        dz = tl.exp(z - top - rest) - smoothing / classes
        dz = tl.where(col == target, dz - (1.0 - smoothing), dz) * grad
        $slope
        tl.store(out_ptr + col, tl.where(counts, dz, 0.0).to($out), mask=col < classes)


def cross_entropy_backward(tensors, ints, floats):
    """tensors: dlogits [..., V] contiguous, grad [...], logits [..., V], targets [...], statistics [..., 2]; ints: ignore_index; floats: softcap, smoothing. Fills dlogits."""
    out, grad, logits, targets, statistics = tensors
    if out.numel() == 0:
        return
    if logits.device.type == "cpu" and logits.dtype == torch.bfloat16:  # the interpreter computes bf16 on raw bits
        raise TypeError("cross_entropy_backward: Triton's interpreter cannot compute bfloat16; use float32 or float16 to check on a CPU")
    logits, inner, *strides = arranged(logits)
    cross_entropy_backward_kernel[(grad.numel(),)](out, grad.contiguous(), logits, targets.contiguous(), statistics.contiguous(), inner, logits.shape[-1], *strides, logits.stride(-1), ints[0],
                                                   float(floats[0]), float(floats[1]), BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[-1])), num_warps=WARPS, enable_fp_fusion=True)
'''

AOT = '''

# For compilation without a GPU: (BLOCK, num_warps) as the host function chooses them for a vocabulary
AOT = []
for backend in ("cuda", "ampere", "hip"):
    AOT.append(dict(
        kernel="$kernel", backend=backend, config=(4096, 8, 1),
        signature=$signature,
        divisible_by_16=$divisible,
        constants=dict(BLOCK=4096, stride_xv=1)))
'''


def emit(dtype: torch.dtype, rank: int, capped: bool, backward: bool = False) -> Kernel:
    """The kernel for logits of `dtype` and targets of `rank` dims, any sizes and strides; capped: with a softcap.

    Tensors, integers and floats of a call as in codegen/cpp/cross_entropy.py. Raises UnsupportedError for float64 and what is no float dtype.
    """
    if dtype not in POINTERS:
        raise UnsupportedError(f"no Triton cross_entropy kernel for logits of {dtype}", cure="use float32, float16 or bfloat16, or the reference target")
    own = {"out_ptr": POINTERS[dtype], "grad_ptr": "*fp32"} if backward else {"losses_ptr": "*fp32", "statistics_ptr": "*fp32", "status_ptr": "*i32"}
    types = own | {"x_ptr": POINTERS[dtype], "targets_ptr": "*i64"} | ({"statistics_ptr": "*fp32"} if backward else {})
    types |= dict.fromkeys(("inner", "classes"), "i32") | dict.fromkeys(("stride_xo", "stride_xi"), "i64") | {"stride_xv": "constexpr", "ignored": "i64", "softcap": "fp32", "smoothing": "fp32", "BLOCK": "constexpr"}
    name = "cross_entropy_backward" if backward else "cross_entropy"
    detail = f"{str(dtype).removeprefix('torch.')} logits of {rank + 1} dims" + (", softcap" if capped else "")
    parts = dict(
        host=HOST.strip("\n"), detail=detail, out=ARITHMETIC[dtype], cap=["z = capped(z, softcap)"] if capped else [],
        cap_block=['z = tl.where(col < classes, capped(z, softcap), -float("inf"))'] if capped else [],  # capped, what is no class would be -softcap
        slope=["dz *= 1.0 - (z / softcap) * (z / softcap)"] if capped else [],
        parameters=", ".join(f"{n}: tl.constexpr" if n == "BLOCK" else n for n in types), kernel=f"{name}_kernel", signature=repr(types),
        divisible=repr([n for n, kind in types.items() if kind[0] == "*" or n in ("classes", "stride_xo", "stride_xi")]))
    return Kernel(name, "triton", fill((BACKWARD if backward else FORWARD).strip("\n") + "\n" + AOT, **parts), name, rewrite="cross_entropy", detail=detail)
