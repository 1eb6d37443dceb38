"""``tileweld::attention`` as a Triton module: the kernel of kernel.py, a host function, and what ahead-of-time compilation needs.

The module stands alone: `attention(tensors, ints, floats)` launches, `AOT` lists every jit function with signature, constants
and alignment for each configuration, for compiling without a GPU.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch

from ...compiler.errors import UnsupportedError
from ...compiler.ir.attention import Variant, is_widened
from ...compiler.ir.kernel import Kernel
from .decode import combine_parameters, decode_kernels
from .kernel import KEYS, AttentionText
from .source import fill
from .tiles import MAX_WIDTH, chunks, configs

#: dtype -> Triton's name of a pointer to it; booleans are read as bytes
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64", torch.bool: "*i8", torch.int8: "*i8", torch.uint8: "*u8",
            torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 576  # absorbed MLA: a latent of 512 and 64 rotary dims
WIDE = 256  # head dims above: tiles of few rows, heads packed for any number of queries, so that a key is read once for all heads of a block
DECODE_ROWS = 64
SCRATCH = {"acc_ptr": "*fp32", "m_ptr": "*fp32", "l_ptr": "*fp32", "near_ptr": "*i32", "lse_ptr": "*fp32"}

MODULE = '''
"""tileweld::attention   out = softmax(where(mask, score, fill)) v      from the rewrite `attention`

score   $score
mask    $mask
fill    $fill, a row without a key gives $empty
sink    $sink
value   $value
key     $key
dtypes  $dtypes; head dim $head_dim, value dim $value_dim
"""
import torch
import triton
import triton.language as tl

from tileweld.runtime.tune import pick, split_count

# (BLOCK_M, BLOCK_N, num_warps, num_stages), the default first; "cpu" is Triton's interpreter
CONFIGS = {
    $configs
}
DECODE_CONFIGS = {  # BLOCK_M grows to the rows of a group of heads, up to DECODE_BLOCK
    $decode_configs
}
DECODE_ROWS = $decode_rows  # up to so many rows a KV head, decode_kernel reads K and V once for a block of them
DECODE_BLOCK = $decode_block


$functions


$prefill


$decode


def attention(tensors, ints, floats):
    """tensors: $output_tensors, q [B, H, Tq, D], $key_tensors, v [B, Hv, Tk, Dv], $captures; ints: $sizes. Fills out."""
    $outputs, q, $keys, v, *captures = tensors
    if v.shape[2] == 0:
        out.zero_()
        $empty_lse
    if out.numel() == 0 or v.shape[2] == 0:
        return
    if q.device.type == "cpu":
        if $widened:  # the interpreter computes bf16 on raw bits
            result = torch.empty_like(out, dtype=torch.float32)
            attention([result, *(x if x.dtype == torch.int8 else x.float() for x in tensors[1:len(tensors) - len(captures)]), *captures], ints, floats)
            out.copy_(result)
            return
        captures = [x.float() if x.dtype == torch.bfloat16 else x for x in captures]
    captures = [x.view(torch.int8) if x.dtype == torch.bool else x for x in captures]
    if k.shape[1] == v.shape[1]$key_test and q.shape[2] * (q.shape[1] // k.shape[1]) <= DECODE_ROWS:
        launch_decode($outputs, q, $keys, v, captures, ints)
    else:
        launch_prefill($outputs, q, $keys, v, captures, ints)


def index_type(*tensors):
    """tl.int64 where two elements of a tile, at most 1024 rows, may be 2^31 or more apart."""
    return tl.int64 if any(min(t.shape[2], 1024) * t.stride(2) + t.shape[3] * t.stride(3) >= 2**31 for t in tensors) else tl.int32


def launch_prefill($outputs, q, $keys, v, captures, ints):
    B, H, Tq, _ = q.shape
    Tk = v.shape[2]
    arguments, index = ($prefill_call), index_type(out, q, $keys, v)

    def launch(config):
        block_m, block_n, num_warps, num_stages = config
        grid = (triton.cdiv(Tq, block_m) * B * H,)
        return attention_kernel[grid](*arguments, BLOCK_M=block_m, BLOCK_N=block_n, INDEX=index, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)

    launch(pick(attention_kernel, CONFIGS, (B * H, Tq, Tk), q.device, launch))


def launch_decode($outputs, q, $keys, v, captures, ints):
    B, H, Tq, _ = q.shape
    Tk, pairs, width = v.shape[2], B * k.shape[1], v.shape[3]
    rows = Tq * H // k.shape[1]
    block_m = min(max(16, triton.next_power_of_2(rows)), DECODE_BLOCK)
    programs = pairs * triton.cdiv(rows, block_m)

    def launch(config):
        _, block_n, num_warps, num_stages = config
        splits = split_count(programs, triton.cdiv(Tk, block_n), q.device)
        acc = m = l = near = out  # not read without splits
        if splits > 1:
            acc = torch.empty((B * H * Tq, splits, width), dtype=torch.float32, device=q.device)
            m, l = torch.empty((2, B * H * Tq, splits), dtype=torch.float32, device=q.device)
            near = torch.empty(B * H * Tq, dtype=torch.int32, device=q.device)
        arguments = ($decode_call)
        options = dict(BLOCK_M=block_m, BLOCK_N=block_n, INDEX=index_type(out, q, $keys, v), num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
        compiled = decode_kernel[(programs, splits)](*arguments, SPLIT=splits > 1, REDO=False, **options)
        if splits > 1:
            combine_kernel[(B * H * Tq,)](out, acc, m, l, $near, out.stride(0), out.stride(1), out.stride(2), out.stride(3), H, Tq, splits,
                                          SPLITS=triton.next_power_of_2(splits), num_warps=4, enable_fp_fusion=True)
            $redo
        return compiled

    launch(pick(decode_kernel, DECODE_CONFIGS, (pairs, Tq, Tk), q.device, launch))


# For compilation without a GPU: types of the arguments, constants (unit strides) and what is a multiple of 16, as at run time.
AOT = []
for backend in ("cuda", "ampere", "hip"):
    for config in CONFIGS[backend]:
        AOT.append(dict(
            kernel="attention_kernel", backend=backend, config=config,
            $prefill_aot
            constants=dict($prefill_constants, BLOCK_M=config[0], BLOCK_N=config[1], INDEX=tl.int32)))
    for config in DECODE_CONFIGS[backend]:
        AOT.append(dict(
            kernel="decode_kernel", backend=backend, config=config,
            $decode_aot
            constants=dict($decode_constants, BLOCK_M=config[0], BLOCK_N=config[1], SPLIT=True, REDO=False, INDEX=tl.int32)))
    AOT.append(dict(
        kernel="combine_kernel", backend=backend, config=(16, 4, 3),
        $combine_aot
        constants=dict(stride_od=1, SPLITS=16)))
'''

_STRIDES = {"q": ("q", "bhid"), "k": ("k", "bhjd"), "r": ("r", "bhjd"), "v": ("v", "bhjd"), "o": ("out", "bhid")}


def emit(variant: Variant, *, q_dtype: torch.dtype, capture_dtypes: Sequence[torch.dtype] = (), capture_ranks: Sequence[int] = (), head_dim: int, value_dim: int,
         num_sizes: int = 0, key_dims: Sequence[int] = (), k_dtype: torch.dtype | None = None, v_dtype: torch.dtype | None = None, lse: bool = False) -> Kernel:
    """The kernel of a variant, for every B, H, Hk, Hv, Tq, Tk and all strides.

    q_dtype: of q, k, v and the output: float16, bfloat16 or float32. k_dtype, v_dtype: what `is_widened` to q_dtype, int8 or with float32 a half type (a cache), None for q_dtype. head_dim, value_dim: 1 to `MAX_HEAD_DIM`.
    key_dims: head dims of the parts of the keys, which add up to head_dim, where they are two tensors [B, Hk, Tk, D] with an Hk each.
    lse: is the logarithm of every row's denominator a second output, [B, H, Tq] contiguous in float32?
    Tensors of a call: [out, q, *parts of k, v, *captures], [out, lse, q, ...] with lse, then the integers n0, n1, ...; no floats.
    Raises UnsupportedError for other dtypes and sizes.
    """
    k_dtype, v_dtype = k_dtype or q_dtype, v_dtype or q_dtype
    _check(q_dtype, {"k": k_dtype, "v": v_dtype}, capture_dtypes, head_dim, value_dim)
    key_dims = tuple(key_dims) or (head_dim,)
    if len(key_dims) > len(KEYS) or sum(key_dims) != head_dim or min(key_dims) < 1:
        raise UnsupportedError(f"keys of head dim {head_dim} in parts of {list(key_dims)}", cure=f"at most {len(KEYS)} parts of at least 1 that add up to the head dim")
    if (width := sum(chunk.width for dim in key_dims for chunk in chunks(dim))) > MAX_WIDTH:
        raise UnsupportedError(f"keys in parts of {list(key_dims)} take tiles of {width} dims", cure=f"{MAX_WIDTH} are supported: parts that are powers of two need no padding")
    if variant.key and len(key_dims) > 1:
        raise UnsupportedError("no Triton attention kernel for a text of keys in parts", cure="give it keys in one tensor")
    text = AttentionText(variant, key_dims, value_dim, q_dtype, k_dtype != q_dtype, v_dtype != q_dtype, lse)
    letters = ["q", *text.keys, "v", "o"]
    tensors = [f"stride_{letter}{axis}" for letter in letters for axis in _STRIDES[letter][1]]
    pointers = ["out_ptr", *(["lse_ptr"] if lse else []), "q_ptr", *(f"{letter}_ptr" for letter in text.keys), "v_ptr"]
    capture_names = [name for k, rank in enumerate(capture_ranks)
                     for name in (f"c{k}_ptr", *(f"c{k}_s{axis}" for axis in range(rank)), *(f"c{k}_n{axis}" for axis in range(rank)))]
    sizes = ["H", *(f"GROUP_{letter.upper()}" for letter in text.keys), "GROUP_V", "Tq", "Tk", "stored_keys", *(f"n{n}" for n in range(num_sizes))]
    prefill = text.kernel([*pointers, *tensors], capture_names, sizes)
    decode = decode_kernels(text, [*pointers, *tensors], capture_names, sizes)
    units = [f"stride_{letter}d" for letter in letters] + [f"c{k}_s{rank - 1}" for k, rank in enumerate(capture_ranks)]

    def aot(parameters, *constants):
        types = {name: "constexpr" if name in units else _type(name, q_dtype, k_dtype, v_dtype, capture_dtypes) for name in parameters} | dict.fromkeys(constants, "constexpr")
        divisible = [name for name, kind in types.items() if kind[0] == "*" or (name.startswith("stride") and kind != "constexpr")]
        return [f"signature={types!r},", f"divisible_by_16={divisible!r},"], ", ".join(f"{name}=1" for name in parameters if name in units)

    prefill_aot, prefill_constants = aot(text.prefill, "BLOCK_M", "BLOCK_N", "INDEX")
    decode_aot, decode_constants = aot(text.decode, "BLOCK_M", "BLOCK_N", "SPLIT", "REDO", "INDEX")
    combine_aot, _ = aot(combine_parameters(lse), "SPLITS")
    dtype = _name(q_dtype)
    captures = ", ".join(f"c{k} {str(d).removeprefix('torch.')}[{rank}-d]" for k, (d, rank) in enumerate(zip(capture_dtypes, capture_ranks, strict=True)))
    source = fill(
        MODULE, score=variant.score, mask=variant.mask, fill=variant.fill, empty={"nan": "nan", "zero": "0", "added": "the mean"}[variant.empty], sink=variant.sink or "none", value=(variant.value or "1") + ("" if variant.offset_expr is not None else ", a factor of the weights that the denominator does not see"),
        key=variant.key or "k", widened="q.dtype != torch.float32" if text.wide_range else "torch.bfloat16 in (q.dtype, k.dtype, v.dtype)",
        dtypes=dtype + "".join(f", {name} {_name(d)}" for name, d in (("k", k_dtype), ("v", v_dtype)) if d != q_dtype) + (f", {captures}" if captures else ""), head_dim=" + ".join(map(str, key_dims)), value_dim=value_dim, keys=", ".join(text.keys), outputs="out, lse" if lse else "out", near="near, lse" if lse else "near", output_tensors="out [B, H, Tq, Dv]" + (", lse [B, H, Tq]" if lse else ""),
        empty_lse='lse.fill_(float("-inf"))' if lse else [],
        key_tensors=", ".join(f"{x} [B, Hk, Tk, {dim}]" for x, dim in zip(text.keys, key_dims)), key_test="".join(f" and k.shape[1] % {x}.shape[1] == 0" for x in text.keys[1:]), captures=captures or "no captures",
        sizes=", ".join(f"n{n}" for n in range(num_sizes)) or "none", functions=text.functions(), prefill=prefill, decode=decode,
        prefill_call=", ".join(map(_host_argument, text.prefill)), decode_call=", ".join(map(_host_argument, text.decode)),
        redo="decode_kernel[(programs, 1)](*arguments, SPLIT=False, REDO=True, **options)" if text.finite_fill else [],
        decode_rows=DECODE_ROWS if max(head_dim, value_dim) <= WIDE else 1 << 20, decode_block=_decode_block(q_dtype, head_dim, value_dim), configs=[_configs(q_dtype, key_dims, value_dim, backend, text.group, dense=text.dense) for backend in ("cuda", "ampere", "hip", "cpu")],
        decode_configs=[_configs(q_dtype, key_dims, value_dim, backend, text.group, decode=True) for backend in ("cuda", "ampere", "hip", "cpu")],
        prefill_aot=prefill_aot, prefill_constants=prefill_constants, decode_aot=decode_aot, decode_constants=decode_constants, combine_aot=combine_aot)
    detail = f"score={variant.score} mask={variant.mask} {dtype} head dim {head_dim}" + (f"/{value_dim}" if value_dim != head_dim else "")
    detail += "".join(f" {name} {_name(d)}" for name, d in (("k", k_dtype), ("v", v_dtype)) if d != q_dtype) + (f" value={variant.value}" if variant.value else "") + (f" key={variant.key}" if variant.key else "")
    detail += " with log-sum-exp" if lse else ""
    return Kernel(name="attention", language="triton", source=source, entry="attention", rewrite="attention", detail=detail)


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _check(q_dtype, others, capture_dtypes, head_dim, value_dim):
    if q_dtype not in DTYPES:
        raise UnsupportedError(f"no Triton attention kernel for {q_dtype}", cure="use float16, bfloat16 or float32, or the reference target")
    for name, dtype in others.items():
        if dtype != q_dtype and not is_widened(dtype, q_dtype):
            raise UnsupportedError(f"no Triton attention kernel for q of {q_dtype} and {name} of {dtype}", cure="give them one dtype, int8 keys and values, or with q of float32 half types")
    for name, width in (("head", head_dim), ("value", value_dim)):
        if not 1 <= width <= MAX_HEAD_DIM:
            raise UnsupportedError(f"no Triton attention kernel for {name} dim {width}", cure=f"1 to {MAX_HEAD_DIM} are supported")
    for k, dtype in enumerate(capture_dtypes):
        if dtype not in POINTERS:
            raise UnsupportedError(f"no Triton attention kernel for a captured tensor c{k} of {dtype}", cure=f"use one of {', '.join(str(d).removeprefix('torch.') for d in POINTERS)}")


def _decode_block(dtype, head_dim, value_dim) -> int:
    """The largest BLOCK_M of decode_kernel: rows and sums of wider heads do not fit into registers (64 rows of 576/512 spill 300 bytes on sm_90, 32 none)."""
    return 64 if max(head_dim, value_dim) <= WIDE else 16 if dtype == torch.float32 else 32


def _configs(dtype, key_dims, value_dim, backend, group=0, **kind) -> str:
    """group: positions of keys that share scales; a tile of several groups has a tile of scales, a tile inside of one group a vector."""
    most = group if group >= 16 and group.bit_count() == 1 else 1 << 10
    chosen = list(dict.fromkeys((c.block_m, min(c.block_n, most), c.num_warps, c.num_stages) for c in configs(dtype, key_dims, value_dim, backend, **kind)))
    return f'"{backend}": {chosen!r},'


def _type(name, q_dtype, k_dtype, v_dtype, capture_dtypes) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    if name in SCRATCH:
        return SCRATCH[name]
    return POINTERS[capture_dtypes[int(name[1:-4])] if name[0] == "c" else {"k": k_dtype, "r": k_dtype, "v": v_dtype}.get(name[0], q_dtype)]


def _host_argument(name: str) -> str:
    """What the host passes for a parameter of the kernel."""
    if name in ("out_ptr", "q_ptr", "k_ptr", "r_ptr", "v_ptr", *SCRATCH):
        return name[:-4]
    if name.startswith("stride_"):
        tensor, axes = _STRIDES[name[7]]
        return f"{tensor}.stride({axes.index(name[8])})"
    if name.startswith("c") and name.endswith("_ptr"):
        return f"captures[{name[1:-4]}]"
    if name.startswith("c"):
        k, part = name[1:].split("_")
        return f"captures[{k}].{'stride' if part[0] == 's' else 'size'}({part[1:]})"
    return {"GROUP_K": "H // k.shape[1]", "GROUP_R": "H // r.shape[1]", "GROUP_V": "H // v.shape[1]", "stored_keys": "k.shape[2]"}.get(name) or (f"ints[{name[1:]}]" if name[0] == "n" else name)
