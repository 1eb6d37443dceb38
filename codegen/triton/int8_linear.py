"""``tileweld::int8_linear`` as a Triton module: the kernels of int8_text.py, a host function, and what ahead-of-time compilation needs.

    activation   rows     way
    "float"      all      as `linear`: gemv, split K, tiled; the weights are half or a quarter of the bytes
    "int8"       all      quantise_kernel: a program a row; then tiles of int8 products, 16 rows and more, K split where programs are few
    "mixed"      all      mark_kernel finds the outlier columns (not where they are given), then as "int8"; nothing waits for the host

Shares of a split K are int32 where sums are: added they are exact, and are scaled then (combine_kernel).
"""
from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ...compiler.errors import UnsupportedError
from ...compiler.ir.int8_linear import ACTIVATIONS, MOST_K
from ...compiler.ir.kernel import Kernel
from ...compiler.ir.linear import Spec
from .int8_text import Int8Text
from .linear import MODULE, _aot, _call, _check, _entry, _name, _types, maxima_lines, unpacked_maxima
from .linear_configs import FAMILIES, Config, configs
from .source import fill

LAUNCH = '''
def launch_tiled(config, tensors, ints, floats):
    _, BLOCK_M, BLOCK_N, BLOCK_K, _, num_warps, num_stages = config
    $unpack
    t = torch.empty((M, K), dtype=torch.int8, device=x.device)
    step = torch.empty(M, dtype=torch.float32, device=x.device)
    bad = torch.empty(M, dtype=torch.int32, device=x.device)
    $prepare
    BLOCK_M = BLOCK_M or max(16, min(64, triton.next_power_of_2(M)))
    EVEN_K, INDEX = K % BLOCK_K == 0, index_type($indexed, t)
    tiles = triton.cdiv(M, BLOCK_M) * programs(weights, BLOCK_N)
    splits = split_count(tiles, triton.cdiv(K, BLOCK_K), x.device)
    partial = step  # not touched without splits
    SPLIT = splits > 1
    if SPLIT:
        partial = torch.empty(($buffers * splits, M, $total), dtype=torch.int32, device=x.device)
    compiled = tiled_kernel[(tiles, splits)]($tiled_call, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
    if SPLIT:
        BLOCK_M, BLOCK_N = min(4, triton.next_power_of_2(M)), 256
        combine_kernel[(triton.cdiv(M, BLOCK_M) * programs(weights, BLOCK_N),)]($combine_call, num_warps=4, enable_fp_fusion=True)
    return compiled
'''

#: rows -> family -> tiles of int8 products; the first is the default. BLOCK_K of 64 bytes and more: 32 is the least that the matrix units take
_TILES = {
    "few": {"cuda": "t0x64x128w4s4 t0x32x256w4s3 t0x128x128w8s3", "ampere": "t0x64x128w4s3 t0x32x256w4s3 t0x128x128w4s3", "hip": "t0x64x128w4s2 t0x32x128w4s2"},
    "many": {"cuda": "t128x128x128w8s3 t128x256x64w8s3 t64x128x128w4s3", "ampere": "t128x128x64w8s3 t128x64x128w4s3 t64x128x64w4s3", "hip": "t128x128x64w8s2 t64x64x128w4s2"},
}
#: its two loops take registers: on sm_80 four warps spill 16 to 40 bytes with Triton 3.6, 128x128x64 spills 8 with 3.9
_MIXED_AMPERE = {"few": "t0x64x128w8s3 t0x64x128w4s3 t0x32x128w4s3", "many": "t64x128x64w8s3 t128x64x64w8s3 t128x128x64w8s3"}
_GEMV = {"cuda": "g0x8x1024w4s3 g0x16x512w4s2 g0x4x2048w4s2", "hip": "g0x8x1024w4s2 g0x16x512w4s2"}


def emit(spec: Spec, *, x_dtype: torch.dtype, capture_dtypes: Sequence[torch.dtype] = (), capture_ranks: Sequence[int] = (), widths: Sequence[int] = (), k: int | None = None,
         num_sizes: int = 0, activation: str = "float", groups: Sequence[int] = (1,), has_columns: bool = False, maxima: Sequence[int] = (), has_row_max: bool = False) -> Kernel:
    """The kernel of a spec, for every number of rows and all strides.

    x_dtype: of x and the outputs: float16, bfloat16 or float32. groups: columns of each weight's scales, one number a weight; more than one needs k.
    maxima: outputs whose rows' largest magnitudes are taken too, into contiguous float32 [M]; has_row_max: those of x are given, and quantise_kernel has one loop.
    Tensors of a call: [*outputs, *maxima, x, *weights int8, *scales float32, *captures, columns where has_columns, row_max where has_row_max], then the integers n0, n1, ...; floats: eps, threshold.
    Raises UnsupportedError for other dtypes, for scales of several kinds, and for groups that are no multiple of 16 columns.
    """
    _check(x_dtype, [], capture_dtypes)
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"no Triton int8 kernel for activation {activation!r}", cure=f"one of {', '.join(ACTIVATIONS)}")
    if activation != "float" and k is not None and k > MOST_K:
        raise UnsupportedError(f"K = {k} overflows sums in int32", cure=f"at most {MOST_K}")
    if has_row_max and (activation != "int8" or spec.norm or spec.prologue != "x"):
        raise UnsupportedError(f"row_max is given for activation {activation!r} of {spec.prologue!r}", cure="it belongs to 'int8' of x itself")
    count, group = groups[0], _group(groups, k)
    text = Int8Text(spec, weights=len(groups), activation=activation, group=group, groups=count, columns=has_columns, weight_dtypes=[torch.int8] * len(groups), wide=x_dtype == torch.float32,
                    overflows=x_dtype == torch.float16, capture_ranks=capture_ranks, num_sizes=num_sizes, maxima=maxima, row_max=has_row_max)
    made = text.kernels()
    outputs, weights = len(spec.epilogues), len(groups)
    known = {**{f"s{w}_ptr": f"scales[{w}]" for w in range(weights)}, "t_ptr": "t", "step_ptr": "step", "bad_ptr": "bad", "mark_ptr": "mark", "row_max_ptr": "row_max", "stride_ym": "y.stride(0)", "stride_yk": "y.stride(1)",
             "threshold": "float(floats[1])"}
    types = _types(text, x_dtype, [torch.int8] * weights, capture_dtypes, capture_ranks)
    types |= {f"s{w}_ptr": "*fp32" for w in range(weights)} | {"t_ptr": "*i8", "step_ptr": "*fp32", "bad_ptr": "*i32", "mark_ptr": "*i8", "row_max_ptr": "*fp32", **({} if activation == "float" else {"partial_ptr": "*i32"}), "stride_yk": "constexpr", "threshold": "fp32"}
    is_float, at = activation == "float", outputs + len(maxima)  # at: of x among the tensors
    first = at + 1
    after = first + 2 * weights
    unpack = [f"outs, x, weights = tensors[:{outputs}], tensors[{at}], tensors[{first}:{first + weights}]",
              f"scales, captures = [s.contiguous() for s in tensors[{first + weights}:{after}]], tensors[{after}:{'-1' if has_columns or has_row_max else ''}]",
              *(["mark = tensors[-1].contiguous()"] if has_columns else []), *(["row_max = tensors[-1].contiguous()"] if has_row_max else []), "M, K = x.shape", *unpacked_maxima(outputs, at)]
    call = lambda name: _call(text, name, known)  # noqa: E731
    dtype = _name(x_dtype)
    texts = ", ".join(f"weight{w} int8 [N{w}, K]" for w in range(weights)) + ", " + ", ".join(f"scale{w} float32 [N{w}, {n}]" for w, n in enumerate(groups))
    captures = ", ".join(f"c{n} {_name(d)}[{rank}-d]" for n, (d, rank) in enumerate(zip(capture_dtypes, capture_ranks, strict=True)))
    shape = f"; x [M, {k}] to {', '.join(map(str, widths))} columns" if k is not None and widths else ""
    module = _module(is_float)
    source = fill(
        module, norm=spec.norm or "none", prologue=spec.prologue, dtypes=f"{dtype}, activations {activation}, {texts}{', ' + captures if captures else ''}",
        epilogues=[f"out{o}        {e}" + (f"      partners at {spec.pairs[o][1]} in {spec.pairs[o][0]} columns" if spec.partners(o) else "") for o, e in enumerate(spec.epilogues)],
        configs=_configs(text, is_float, 4 if x_dtype == torch.float32 else 2, group), kernels=made, loops="columns, or pairs of them, divided by the accumulators of each",
        slots="".join(f"({loop.slots(f'weights[{g.weights[0]}].shape[0]')}, {loop.spread}), " for loop in text.loops for g in loop.groups),
        tensors=", ".join([*(f"out{o} [M, N]" for o in range(outputs)), *(f"maxima of out{o} float32 [M]" for o in maxima), "x [M, K]", texts, *([captures] if captures else []), *(["columns bool [K]"] if has_columns else []),
                           *(["row_max float32 [M]"] if has_row_max else [])]), **maxima_lines(outputs, at),
        sizes=", ".join(f"n{n}" for n in range(num_sizes)) or "none", x=at, outputs=outputs, weights=weights, unpack=unpack, indexed="*outs, x, *weights",
        prepare=_prepare(text, call, is_float), total=" + ".join(f"weights[{w}].shape[0]" for g in text.groups for w in g.weights), tiled_call=call("tiled_kernel"),
        gemv_call=call("gemv_kernel") if is_float else "", combine_call=call("combine_kernel"), buffers=2 if activation == "mixed" else 1, aot=_aot(text, types) if is_float else _int8_aot(text, types))
    detail = f"int8, activations {activation}, norm={spec.norm or 'none'} {' ; '.join(spec.epilogues)} {dtype}{shape}"
    return Kernel(name="int8_linear", language="triton", source=source, entry="linear", rewrite="int8", detail=detail)


def _group(groups, k) -> int:
    """Columns of K that share a scale, 0 for all of them."""
    if len(set(groups)) > 1:
        raise UnsupportedError(f"no Triton int8 kernel for scales of {list(groups)} columns", cure="quantise the weights of one product alike")
    if groups[0] == 1:
        return 0
    if k is None or k % groups[0] or k // groups[0] % 16:
        raise UnsupportedError(f"no Triton int8 kernel for {groups[0]} groups of K = {k}", cure="groups of 64 or 128 columns, a multiple of 16")
    return k // groups[0]


def _module(is_float: bool) -> str:
    """The module of `linear`; for activations of int8 with another launch and without gemv."""
    module = MODULE.replace('"""tileweld::linear ', '"""tileweld::int8_linear ').replace("weight_w[j, k], y = prologue(x)      from the rewrite `linear`", "q_w[j, k] scale_w[j], y = prologue(x)      from the rewrite `int8`")
    if is_float:
        return module
    tiled_only = module.replace('rows = "one" if M <= GEMV_ROWS else "few"', 'rows = "few"').replace('launch_gemv(config, tensors, ints, floats) if config[0] == "gemv" else launch_tiled', "launch_tiled")
    start, stop = tiled_only.index("def launch_gemv"), tiled_only.index("# For compilation without a GPU")
    return tiled_only[:start] + LAUNCH.lstrip("\n") + "\n\n" + tiled_only[stop:]


def _prepare(text, call, is_float) -> list[str]:
    if is_float and not text.has_prologue:
        return []
    if is_float:
        return [f"y = {'x if FUSED else ' if text.fusable else ''}torch.empty((M, K), dtype=x.dtype, device=x.device)", *(["if not FUSED:"] if text.fusable else []),
                f"{'    ' if text.fusable else ''}prepare_kernel[(M,)]({call('prepare_kernel')}, num_warps=4, enable_fp_fusion=True)", "x = y"]
    lines = ["y = torch.empty((M, K), dtype=x.dtype, device=x.device)" if text.has_prologue else "y = x"]
    if "mark_kernel" in text.signatures:
        lines += ["mark = torch.zeros(K, dtype=torch.int8, device=x.device)", f"mark_kernel[(M,)]({call('mark_kernel')}, num_warps=4, enable_fp_fusion=True)"]
    return [*lines, f"quantise_kernel[(M,)]({call('quantise_kernel')}, num_warps=4, enable_fp_fusion=True)"]


def _made(text, rows, itemsize, family, is_float, group) -> list[Config]:
    spread = max(loop.spread for loop in text.loops)
    if is_float:
        found = configs(rows, itemsize, spread, family, fusable=text.fusable, partial=any(0 < 2 * loop.half < loop.block for loop in text.loops), gemv=None if family == "cpu" else _GEMV.get(family, _GEMV["cuda"]))
    else:
        tiles = {"few": "t0x32x32w4s1", "many": "t32x64x32w4s1"}[rows] if family == "cpu" else _MIXED_AMPERE[rows] if (text.activation, family) == ("mixed", "ampere") else _TILES[rows][family]
        found = configs(rows, 1, spread, family, fusable=False, table=tiles)
    return list(dict.fromkeys(_within(c, group) for c in found))


def _within(config: Config, group: int) -> Config:
    """A block of K in one group, for tiled; gemv takes the scale of every element."""
    return config if not group or config.kind == "gemv" else Config(*config.tuple()[:3], min(config.block_k, group & -group), *config.tuple()[4:])


def _configs(text, is_float, itemsize, group) -> list[str]:
    lines = []
    for rows in ("one", "few", "many") if is_float else ("few", "many"):
        lines += [f'"{rows}": {{', *(f'    "{family}": {tuple(c.tuple() for c in _made(text, rows, itemsize, family, is_float, group))!r},' for family in FAMILIES), "},"]
    return lines


def _int8_aot(text: Int8Text, types: dict[str, str]) -> list[str]:
    entry = functools.partial(_entry, text, types)
    tiled = {"EVEN_K": "True", "INDEX": "tl.int32", "BLOCK_M": "block_m or rows", "BLOCK_N": "block_n", "BLOCK_K": "block_k", "SPLIT": "split"}
    lines = ['for table, rows, split in (("many", 0, False), ("few", 64, False), ("few", 64, True), ("few", 16, False), ("few", 16, True)):',
             "    for kind, block_m, block_n, block_k, fused, num_warps, num_stages in CONFIGS[table][backend]:"]
    lines += ["        " + line for line in entry("tiled_kernel", "(block_m or rows, block_n, block_k, num_warps, num_stages)", tiled)]
    lines += entry("combine_kernel", "(4, 256, 4, 3)", {"INDEX": "tl.int32", "BLOCK_M": "4", "BLOCK_N": "256"})
    for kernel in ("mark_kernel", "quantise_kernel"):
        if kernel in text.signatures:
            lines += entry(kernel, "(4096, 4, 3)", {"BLOCK": "4096", "INDEX": "tl.int32"})
    return lines
