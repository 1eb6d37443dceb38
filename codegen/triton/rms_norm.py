"""``tileweld::rms_norm`` as a Triton module.

A row stays in registers: one read, one write. A program takes several short rows, so that it has at least PROGRAM_ELEMENTS
elements to hide the memory's latency with; a row above MAX_REGISTERS_ROW columns is read twice, in steps. The module stands alone:
`rms_norm(tensors, ints, floats)` launches, `AOT` lists what to compile ahead of time.
"""
from __future__ import annotations

import torch

from ...compiler.errors import UnsupportedError
from ...compiler.ir.kernel import Kernel
from ...compiler.ir.rms_norm import CASTS
from .source import fill

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
ARITHMETIC = {torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.float32: "tl.float32"}

MODULE = '''
"""tileweld::rms_norm   out = x rsqrt(mean(x^2) + eps)$scale over the last dim      from the rewrite `rms_norm`

$detail
"""
import torch
import triton
import triton.language as tl

PROGRAM_ELEMENTS = 2048  # at least so many a program: 16 bytes a thread of 4 warps, 2 to 4 times
MAX_REGISTERS_ROW = 32768  # a wider row does not fit into the registers of 16 warps (64 floats a thread at 512 threads)


@triton.jit(do_not_specialize=["eps", "offset"])
def rms_norm_kernel($parameters):
    """A block of whole rows. rows = outer * inner; the strides of the last dim are constants, usually 1."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    outer = tl.cast(row // inner, tl.int64)
    index = tl.cast(row % inner, tl.int64)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    x = tl.load(x_ptr + (outer * stride_xo + index * stride_xi)[:, None] + (col * stride_xd)[None, :], mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / width + eps)
    y = x * rstd[:, None]
    $weight
    tl.store(out_ptr + (outer * stride_oo + index * stride_oi)[:, None] + (col * stride_od)[None, :], y.to($out), mask=inside)


@triton.jit(do_not_specialize=["eps", "offset"])
def wide_rms_norm_kernel($parameters):
    """One row of any width: once for the sum of squares, once for the result. ROWS is 1."""
    row = tl.program_id(0)
    outer = tl.cast(row // inner, tl.int64)
    index = tl.cast(row % inner, tl.int64)
    x_ptr += outer * stride_xo + index * stride_xi
    out_ptr += outer * stride_oo + index * stride_oi
    squares = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + tl.cast(col, tl.int64) * stride_xd, mask=col < width, other=0.0).to(tl.float32)
        squares += x * x
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / width + eps)
    for start in tl.range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + tl.cast(col, tl.int64) * stride_xd, mask=col < width, other=0.0).to(tl.float32)
        y = x * rstd
        $wide_weight
        tl.store(out_ptr + tl.cast(col, tl.int64) * stride_od, y.to($out), mask=col < width)


def two_dims(x):
    """x's leading dims as (outer, inner): (sizes, strides), or None if they have no such form."""
    merged = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return None if len(merged) > 2 else [(1, 0)] * (2 - len(merged)) + merged


def layout(out, x):
    """inner, and (outer, inner) strides of out and x; None where one of them has no two-dim form common to both."""
    forms = two_dims(out), two_dims(x)
    if None in forms:
        return None
    inners = {form[1][0] for form in forms if form[0][0] != 1}
    if len(inners) > 1:
        return None
    inner = inners.pop() if inners else max(form[1][0] for form in forms)

    def strides(form):  # one merged dim is split at inner
        return (form[0][1], form[1][1]) if form[0][0] != 1 or form[1][0] == inner else (form[1][1] * inner, form[1][1])

    return inner, *strides(forms[0]), *strides(forms[1])


def rms_norm(tensors, ints, floats):
    """tensors: out [..., D], x [..., D]$weight_shape; floats: eps, offset. Fills out."""
    out, x, *weights = tensors
    if out.numel() == 0:
        return
    if x.device.type == "cpu" and torch.bfloat16 in [t.dtype for t in tensors]:  # the interpreter computes bf16 on raw bits
        raise TypeError("rms_norm: Triton's interpreter cannot compute bfloat16; use float32 or float16 to check on a CPU")
    form = layout(out, x)
    if form is None:
        x, target = x.contiguous(), torch.empty(out.shape, dtype=out.dtype, device=out.device)
        rms_norm([target, x, *weights], ints, floats)
        out.copy_(target)
        return
    inner, *strides = form
    width = x.shape[-1]
    rows = out.numel() // width
    wide = width > MAX_REGISTERS_ROW
    block = 4096 if wide else triton.next_power_of_2(width)
    group = 1 if wide else max(1, min(PROGRAM_ELEMENTS // block, triton.next_power_of_2(rows)))
    warps = 8 if wide else min(16, max(4, block // 1024))
    kernel = wide_rms_norm_kernel if wide else rms_norm_kernel
    kernel[(triton.cdiv(rows, group),)](out, x, *weights, rows, inner, width, *strides, out.stride(-1), x.stride(-1)$weight_stride, float(floats[0]), float(floats[1]),
                                        ROWS=group, BLOCK=block, num_warps=warps, enable_fp_fusion=True)


# For compilation without a GPU: (kernel, ROWS, BLOCK, num_warps) as the host function chooses them for these widths
AOT = []
for backend in ("cuda", "ampere", "hip"):
    for kernel, rows, block, warps in (("rms_norm_kernel", 16, 128, 4), ("rms_norm_kernel", 1, 4096, 4), ("wide_rms_norm_kernel", 1, 4096, 8)):
        AOT.append(dict(
            kernel=kernel, backend=backend, config=(rows, block, warps, 1),
            signature=$signature,
            divisible_by_16=$divisible,
            constants=dict($constants, ROWS=rows, BLOCK=block)))
'''


def emit(x_dtype: torch.dtype, weight_dtype: torch.dtype | None, rank: int, cast: str) -> Kernel:
    """The kernel for x of `rank` dims, any sizes and strides; weight_dtype None: no weight.

    Tensors of a call: [out, x] or [out, x, weight], out as compiler/ir/rms_norm.py defines it; no integers; floats: eps, offset.
    Raises UnsupportedError for float64 and what is no float dtype.
    """
    for name, dtype in (("x", x_dtype), ("weight", weight_dtype)):
        if dtype is not None and dtype not in POINTERS:
            raise UnsupportedError(f"no Triton rms_norm kernel for {name} of {dtype}", cure="use float32, float16 or bfloat16, or the reference target")
    if rank < 1 or cast not in CASTS:
        raise UnsupportedError(f"no Triton rms_norm kernel for rank {rank}, cast {cast!r}", cure=f"rank 1 or more, cast one of {CASTS}")
    weighted = weight_dtype is not None
    out_dtype = torch.promote_types(x_dtype, weight_dtype) if weighted and cast == "before" else x_dtype
    types = {"out_ptr": POINTERS[out_dtype], "x_ptr": POINTERS[x_dtype]} | ({"w_ptr": POINTERS[weight_dtype]} if weighted else {})
    types |= dict.fromkeys(("rows", "inner", "width", "stride_oo", "stride_oi", "stride_xo", "stride_xi"), "i32")
    units = ("stride_od", "stride_xd", *(["stride_wd"] if weighted else []))
    types |= dict.fromkeys(units, "constexpr") | {"eps": "fp32", "offset": "fp32", "ROWS": "constexpr", "BLOCK": "constexpr"}
    constant = {"ROWS", "BLOCK"}
    detail = f"{str(x_dtype).removeprefix('torch.')}[{rank}-d]" + (f", weight {str(weight_dtype).removeprefix('torch.')}, rounds {cast} it" if weighted else ", no weight")

    def weight(load: str, shaped: str) -> list[str]:
        lines = [f"y = y.to({ARITHMETIC[x_dtype]}).to(tl.float32)"] if weighted and cast == "before" and x_dtype != torch.float32 else []
        return [*lines, f"w = {load}", f"y *= {shaped}"] if weighted else []

    source = fill(
        MODULE, scale=" (offset + weight)" if weighted else "", detail=detail, out=ARITHMETIC[out_dtype],
        parameters=", ".join(f"{name}: tl.constexpr" if name in constant else name for name in types),
        weight=weight("tl.load(w_ptr + col * stride_wd, mask=col < width, other=0.0).to(tl.float32)", "(w + offset)[None, :]"),
        wide_weight=weight("tl.load(w_ptr + tl.cast(col, tl.int64) * stride_wd, mask=col < width, other=0.0).to(tl.float32)", "w + offset"),
        weight_shape=", weight [D]" if weighted else "", weight_stride=", weights[0].stride(0)" if weighted else "",
        signature=repr(types), divisible=repr([n for n, kind in types.items() if kind[0] == "*" or n in ("width", "stride_oo", "stride_oi", "stride_xo", "stride_xi")]),
        constants=", ".join(f"{name}=1" for name in units))
    return Kernel("rms_norm", "triton", source, "rms_norm", rewrite="rms_norm", detail=detail)
