"""``tileweld::linear`` as a Triton module: the kernels of linear_text.py, a host function, and what ahead-of-time compilation needs.

    rows        way
    1 to 8      gemv: products and sums without matrix units, each weight read once and not kept in the cache; or as below
    to 64       tiled, one block of rows; K is split over programs until every processor has work, the shares are added in order
    more        tiled; the prologue in the loop or, where it cannot be deferred or that is faster, in a pass before

Which of the configurations is measured once for each bucket of sizes (runtime/tune.py). Dot products of fp16 and bf16 rows take
the prologue's result rounded to that dtype, as the separate ops would; all else is fp32. No TF32.
"""
from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from ...compiler.errors import UnsupportedError
from ...compiler.ir.kernel import Kernel
from ...compiler.ir.linear import Spec
from .attention import POINTERS
from .linear_configs import FAMILIES, configs
from .linear_text import LinearText
from .source import fill

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MODULE = '''
"""tileweld::linear   out_o[i, j] = epilogue_o(a_w[i, j]), a_w = sum_k y[i, k] weight_w[j, k], y = prologue(x)      from the rewrite `linear`

norm        $norm
prologue    $prologue
$epilogues
dtypes      $dtypes
"""
import torch
import triton
import triton.language as tl

from tileweld.runtime.tune import pick, split_count

# rows -> backend -> (kind, BLOCK_M, BLOCK_N, BLOCK_K, prologue in the loop, num_warps, num_stages), the default first; "cpu" is Triton's interpreter
CONFIGS = {
    $configs
}
GEMV_ROWS, FEW_ROWS = 8, 64


$kernels


def index_type(*tensors):
    """tl.int64 where an element is 2^31 or more away from the first."""
    return tl.int64 if any(t.numel() and sum((n - 1) * s for n, s in zip(t.shape, t.stride())) >= 2**31 for t in tensors) else tl.int32


def programs(weights, columns):
    """Programs of `columns` columns for one block of rows: $loops."""
    return sum(triton.cdiv(slots, columns // spread) for slots, spread in ($slots))


def linear(tensors, ints, floats):
    """tensors: $tensors; ints: $sizes; floats: eps. Fills the outputs."""
    M, K = tensors[$x].shape
    $clear
    if all(out.numel() == 0 for out in tensors[:$outputs]):
        return
    if tensors[$x].device.type == "cpu" and any(t.dtype == torch.bfloat16 for t in tensors):  # the interpreter computes bf16 on raw bits
        wide = [torch.empty_like(t, dtype=torch.float32) if n < $x else t.float() if t.dtype == torch.bfloat16 else t for n, t in enumerate(tensors)]
        linear(wide, ints, floats)
        for out, result in zip(tensors[:$x], wide):
            out.copy_(result)
        $rounded
        return
    tensors = [t.view(torch.int8) if t.dtype == torch.bool else t for t in tensors]
    weights = tensors[$x + 1:$x + 1 + $weights]
    if len({w.stride(1) for w in weights}) > 1:  # all are read along the same dim
        weights = tensors[$x + 1:$x + 1 + $weights] = [w.contiguous() for w in weights]
    rows = "one" if M <= GEMV_ROWS else "few" if M <= FEW_ROWS else "many"

    def launch(config):
        $clear
        return launch_gemv(config, tensors, ints, floats) if config[0] == "gemv" else launch_tiled(config, tensors, ints, floats)

    launch(pick(tiled_kernel, CONFIGS[rows], (M, K, sum(w.shape[0] for w in weights)), weights[0].device, launch))


def launch_gemv(config, tensors, ints, floats):
    _, _, BLOCK_N, BLOCK_K, _, num_warps, num_stages = config
    $unpack
    ROWS = triton.next_power_of_2(M)
    BLOCK_K = max(64, BLOCK_K // max(1, ROWS // 2))  # ROWS * BLOCK_N * BLOCK_K sums are kept in registers
    EVEN_K, INDEX = K % BLOCK_K == 0, index_type($indexed)
    return gemv_kernel[(programs(weights, BLOCK_N),)]($gemv_call, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


def launch_tiled(config, tensors, ints, floats):
    _, BLOCK_M, BLOCK_N, BLOCK_K, FUSED, num_warps, num_stages = config
    $unpack
    $prepare
    BLOCK_M = BLOCK_M or max(16, min(64, triton.next_power_of_2(M)))
    EVEN_K, INDEX = K % BLOCK_K == 0, index_type($indexed)
    tiles = triton.cdiv(M, BLOCK_M) * programs(weights, BLOCK_N)
    splits = split_count(tiles, triton.cdiv(K, BLOCK_K), x.device)
    partial = squares = x  # not touched without splits
    SPLIT = splits > 1
    if SPLIT:
        partial = torch.empty((splits, M, $total), dtype=torch.float32, device=x.device)
        squares = torch.empty((splits, M), dtype=torch.float32, device=x.device)
    compiled = tiled_kernel[(tiles, splits)]($tiled_call, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
    if SPLIT:
        BLOCK_M, BLOCK_N = min(4, triton.next_power_of_2(M)), 256
        combine_kernel[(triton.cdiv(M, BLOCK_M) * programs(weights, BLOCK_N),)]($combine_call, num_warps=4, enable_fp_fusion=True)
    return compiled


# For compilation without a GPU: types of the arguments, constants (unit strides) and what is a multiple of 16, as at run time.
AOT = []
for backend in ("cuda", "ampere", "hip"):
    $aot
'''

AOT = '''
AOT.append(dict(
    kernel="$kernel", backend=backend, config=$config,
    signature=$signature,
    divisible_by_16=$divisible,
    constants=dict($constants)))
'''


def emit(spec: Spec, *, x_dtype: torch.dtype, weight_dtypes: Sequence[torch.dtype], capture_dtypes: Sequence[torch.dtype] = (), capture_ranks: Sequence[int] = (),
         widths: Sequence[int] = (), k: int | None = None, num_sizes: int = 0, maxima: Sequence[int] = ()) -> Kernel:
    """The kernel of a spec, for every number of rows and all strides.

    x_dtype: of x and the outputs, weight_dtypes: of the weights, float16, bfloat16 or float32; where they differ, products are
    in fp32. widths, k: columns of the outputs and of x, for the kernel's description alone: sizes are run-time values.
    maxima: outputs whose rows' largest magnitudes are taken too, into contiguous float32 [M].
    Tensors of a call: [*outputs, *maxima, x, *weights, *captures], then the integers n0, n1, ...; floats: eps.
    Raises UnsupportedError for other dtypes, and for a weight whose columns have two kinds of partners.
    """
    _check(x_dtype, weight_dtypes, capture_dtypes)
    mixed = any(d != x_dtype for d in weight_dtypes)
    wide = mixed or x_dtype == torch.float32
    text = LinearText(spec, weight_dtypes=weight_dtypes, wide=wide, overflows=x_dtype == torch.float16, capture_ranks=capture_ranks, num_sizes=num_sizes, maxima=maxima)
    kernels = text.kernels()
    outputs, at = len(spec.epilogues), len(spec.epilogues) + len(maxima)  # at: of x among the tensors
    types = _types(text, x_dtype, weight_dtypes, capture_dtypes, capture_ranks)
    prepare = [f"y = {'x if FUSED else ' if text.fusable else ''}torch.empty((M, K), dtype=x.dtype, device=x.device)", *(["if not FUSED:"] if text.fusable else []),
               f"{'    ' if text.fusable else ''}prepare_kernel[(M,)]({_call(text, 'prepare_kernel')}, num_warps=4, enable_fp_fusion=True)",
               "x = y"] if text.has_prologue else []
    dtype = _name(x_dtype)
    weights = ", ".join(f"weight{w} {_name(d)} [N{w}, K]" for w, d in enumerate(weight_dtypes))
    captures = ", ".join(f"c{n} {_name(d)}[{rank}-d]" for n, (d, rank) in enumerate(zip(capture_dtypes, capture_ranks, strict=True)))
    shape = f"; x [M, {k}] to {', '.join(map(str, widths))} columns" if k is not None and widths else ""
    source = fill(
        MODULE, norm=spec.norm or "none", prologue=spec.prologue, dtypes=f"{dtype}, {weights}{', ' + captures if captures else ''}",
        epilogues=[f"out{o}        {e}" + (f"      partners at {spec.pairs[o][1]} in {spec.pairs[o][0]} columns" if spec.partners(o) else "") for o, e in enumerate(spec.epilogues)],
        configs=_configs(text, 4 if wide else 2), kernels=kernels,
        loops="columns, or pairs of them, divided by the accumulators of each",
        slots="".join(f"({loop.slots(f'weights[{g.weights[0]}].shape[0]')}, {loop.spread}), " for loop in text.loops for g in loop.groups),
        tensors=", ".join([*(f"out{o} [M, N]" for o in range(outputs)), *(f"maxima of out{o} float32 [M]" for o in maxima), "x [M, K]", weights, *([captures] if captures else [])]), sizes=", ".join(f"n{n}" for n in range(num_sizes)) or "none",
        x=at, outputs=outputs, weights=len(weight_dtypes), **maxima_lines(outputs, at),
        unpack=[f"outs, x, weights, captures = tensors[:{outputs}], tensors[{at}], tensors[{at + 1}:{at + 1 + len(weight_dtypes)}], tensors[{at + 1 + len(weight_dtypes)}:]", "M, K = x.shape", *unpacked_maxima(outputs, at)],
        indexed="*outs, x, *weights", prepare=prepare, total=" + ".join(f"weights[{w}].shape[0]" for group in text.groups for w in group.weights),
        gemv_call=_call(text, "gemv_kernel"), tiled_call=_call(text, "tiled_kernel"), combine_call=_call(text, "combine_kernel"), aot=_aot(text, types))
    detail = f"norm={spec.norm or 'none'} {' ; '.join(spec.epilogues)} {dtype}{shape}"
    return Kernel(name="linear", language="triton", source=source, entry="linear", rewrite="linear", detail=detail)


def maxima_lines(outputs: int, x: int) -> dict[str, list[str]]:
    """The host function's lines for the maxima, which lie between the outputs and x: 0 before every launch, and as the outputs were rounded where the interpreter computes in float32."""
    if x == outputs:
        return {"clear": [], "rounded": []}
    return {"clear": [f"for top in tensors[{outputs}:{x}]:", "    top.zero_()"], "rounded": [f"for top in tensors[{outputs}:{x}]:", "    top.copy_(top.to(tensors[0].dtype))"]}


def unpacked_maxima(outputs: int, x: int) -> list[str]:
    return [f"maxima = [top.view(torch.int32) for top in tensors[{outputs}:{x}]]"] if x > outputs else []


def _check(x_dtype, weight_dtypes, capture_dtypes):
    for name, dtype in (("x", x_dtype), *((f"weight {w}", d) for w, d in enumerate(weight_dtypes))):
        if dtype not in DTYPES:
            raise UnsupportedError(f"no Triton linear kernel for {name} of {dtype}", cure="use float16, bfloat16 or float32, or the reference target")
    for n, dtype in enumerate(capture_dtypes):
        if dtype not in POINTERS:
            raise UnsupportedError(f"no Triton linear kernel for a captured tensor c{n} of {dtype}", cure=f"use one of {', '.join(map(_name, POINTERS))}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _made(text, rows, itemsize, family):
    return configs(rows, itemsize, max(loop.spread for loop in text.loops), family, fusable=text.fusable, partial=any(0 < 2 * loop.half < loop.block for loop in text.loops))


def _configs(text, itemsize) -> list[str]:
    lines = []
    for rows in ("one", "few", "many"):
        lines += [f'"{rows}": {{', *(f'    "{family}": {tuple(c.tuple() for c in _made(text, rows, itemsize, family))!r},' for family in FAMILIES), "},"]
    return lines


def _types(text, x_dtype, weight_dtypes, capture_dtypes, capture_ranks) -> dict[str, str]:
    """Triton's type of every parameter, "constexpr" for the strides that are 1."""
    units = {"stride_xk", *(p for p in text.parameters if p.startswith("stride_o") and p[-1] == "n"), "stride_wk",
             *(f"c{n}_s{rank - 1}" for n, rank in enumerate(capture_ranks) if rank)}

    def kind(name):
        if name in units:
            return "constexpr"
        if name == "eps":
            return "fp32"
        if not name.endswith("_ptr"):
            return "i32"
        if name in ("partial_ptr", "squares_ptr"):
            return "*fp32"
        if name.startswith("top"):
            return "*i32"
        return POINTERS[weight_dtypes[int(name[1:-4])] if name[0] == "w" else capture_dtypes[int(name[1:-4])] if name[0] == "c" else x_dtype]

    return {name: kind(name) for name in text.parameters}


def _call(text: LinearText, kernel: str, known: Mapping[str, str] = {}) -> str:
    """The arguments of a launch, from what the host function has at hand; known: of parameters that `linear` has not."""
    def argument(name):
        if name in known:
            return known[name]
        if name in ("M", "K", "splits"):
            return name
        if name == "eps":
            return "float(floats[0])"
        if name in ("x_ptr", "y_ptr", "partial_ptr", "squares_ptr"):
            return name[:-4]
        if name.startswith("top"):
            return f"maxima[{name[3:-4]}]"
        if name.startswith("stride_"):
            tensor, axis = name[7:-1], name[-1]
            if tensor == "w":
                return "weights[0].stride(1)"
            return f"{_tensor(tensor)}.stride({0 if axis == 'm' or tensor[0] == 'w' else 1})"
        if name[0] == "N":
            return f"weights[{text.groups[int(name[1:])].weights[0]}].shape[0]"
        if name[0] == "n":
            return f"ints[{name[1:]}]"
        if name.endswith("_ptr"):
            return _tensor(name[:-4].replace("out", "o"))
        capture, part = name[1:].split("_")
        return f"captures[{capture}].{'stride' if part[0] == 's' else 'size'}({part[1:]})"

    block = {"BLOCK": "min(4096, max(16, triton.next_power_of_2(K)))"}
    return ", ".join([*map(argument, text.signatures[kernel]), *(f"{c}={block.get(c, c)}" for c in text.constants[kernel])])


def _tensor(short: str) -> str:
    """o0 -> outs[0], w1 -> weights[1], c2 -> captures[2], x -> x"""
    return short if short == "x" else f"{ {'o': 'outs', 'w': 'weights', 'c': 'captures'}[short[0]]}[{short[1:]}]"


def _entry(text, types: dict[str, str], kernel: str, config: str, values: dict[str, str]) -> list[str]:
    """The lines that list one launch ahead of time; values: constant -> its value, as text."""
    names, constants = text.signatures[kernel], text.constants[kernel]
    signature = {n: types[n] for n in names} | dict.fromkeys(constants, "constexpr")
    divisible = [n for n in names if types[n] != "constexpr" and (n.endswith("_ptr") or n == "K" or n[0] == "N" or n.startswith("stride_") or (n[0] == "c" and "_s" in n))]
    listed = ", ".join([*(f"{n}=1" for n in names if types[n] == "constexpr"), *(f"{c}={values[c]}" for c in constants)])
    return fill(AOT, kernel=kernel, config=config, signature=repr(signature), divisible=repr(divisible), constants=listed).splitlines()


def _aot(text: LinearText, types: dict[str, str]) -> list[str]:
    """The loops that list every launch that the host function can make at round sizes."""
    entry = functools.partial(_entry, text, types)
    shared = {"EVEN_K": "True", "INDEX": "tl.int32", "BLOCK_M": "block_m or rows", "BLOCK_N": "block_n", "BLOCK_K": "block_k", "FUSED": "fused", "ROWS": "rows"}
    lines = ['for table, rows in (("many", 0), ("few", 64), ("few", 16), ("one", 1), ("one", 8)):', "    for kind, block_m, block_n, block_k, fused, num_warps, num_stages in CONFIGS[table][backend]:",
             '        if kind == "tiled" and table != "one":']
    lines += ["            " + line for line in entry("tiled_kernel", "(block_m or rows, block_n, block_k, num_warps, num_stages)", shared | {"SPLIT": "table == 'few'"})]
    lines += ['        elif kind == "gemv":', "            block_k = max(64, block_k // max(1, rows // 2))"]
    lines += ["            " + line for line in entry("gemv_kernel", "(rows, block_n, block_k, num_warps, num_stages)", shared)]
    combine = shared | {"BLOCK_M": "4", "BLOCK_N": "256", "FUSED": str(text.fusable), "ROWS": "1"}
    lines += entry("combine_kernel", "(4, 256, 4, 3)", combine)
    if text.has_prologue:
        lines += entry("prepare_kernel", "(4096, 4, 3)", {"BLOCK": "4096", "INDEX": "tl.int32"})
    return lines
