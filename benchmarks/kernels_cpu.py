"""The generated C++ attention kernels against torch's scaled_dot_product_attention: python benchmarks/kernels_cpu.py [--only causal]

Contenders take turns in one process; medians. GFLOP/s count what the mask leaves to be computed (4 x visible pairs x head dim),
for both. Inputs are laid out as a model's projections leave them, [B, T, H, D] transposed. "mask" in the column of torch: it has to
be given the mask or bias as a tensor, made before the clock starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import interleaved

from tileweld.codegen.cpp.attention import emit
from tileweld.compiler.ir.attention import Variant, empty_output, integer_captures
from tileweld.compiler.ir.evaluate import Evaluator
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.kv_cache import dequantize_kv, quantize_kv
from tileweld.runtime.launch import CppLauncher


@dataclasses.dataclass
class Workload:
    name: str
    score: str = "s*0.125"
    mask: str = "True"
    shape: tuple = (1, 12, 12, 2048, 2048, 64)  # B, H, Hk, Tq, Tk, D
    captures: Callable = lambda B, H, Tq, Tk: []
    torch_does: str = "mask"  # "plain" | "causal" | "mask" | "none"
    dtype: torch.dtype = torch.float32
    empty: str = "nan"
    int8: bool = False  # keys and values of int8 with a scale for every token and KV head; torch has fp32 ones


WINDOW = "(j <= i) & (i - j < 256)"
LONG = (1, 12, 12, 4096, 4096, 64)


def keep(B, H, Tq, Tk):
    return [torch.arange(Tk).expand(B, Tk) >= Tk // 4]


WORKLOADS = [
    Workload("full", torch_does="plain"),
    Workload("causal", mask="j <= i", torch_does="causal"),
    Workload("causal, 128", mask="j <= i", shape=(1, 12, 12, 128, 128, 64), torch_does="causal"),
    Workload("causal, head dim 128, GQA 16/4", mask="j <= i", shape=(1, 16, 4, 2048, 2048, 128), torch_does="causal"),
    Workload("causal, bfloat16", mask="j <= i", torch_does="causal", dtype=torch.bfloat16),
    Workload("window 256", mask=WINDOW, shape=LONG),
    Workload("window 256 and softcap", score="50*tanh(0.0025*s)", mask=WINDOW, shape=LONG, torch_does="none"),
    Workload("causal and softcap", score="50*tanh(0.0025*s)", mask="j <= i", torch_does="none"),
    Workload("ALiBi", score="s*0.125 + c0[h]*(j - i)", mask="j <= i", captures=lambda B, H, Tq, Tk: [torch.rand(H)]),
    Workload("T5 bias", score="s + c0[c1[j - i + Tq], h]", captures=lambda B, H, Tq, Tk: [torch.randn(32, H), torch.randint(0, 32, (Tq + Tk,))]),
    Workload("dense bias", score="s*0.125 + c0[0, h, i, j]", captures=lambda B, H, Tq, Tk: [torch.randn(1, H, Tq, Tk)]),
    Workload("padding", mask="c0[b, j] != 0", shape=(2, 12, 12, 1024, 1024, 64), captures=keep),
    Workload("causal padding", mask="(j <= i) & (c0[b, j] != 0)", shape=(2, 12, 12, 1024, 1024, 64), captures=keep, empty="zero"),
    Workload("decode", shape=(1, 12, 12, 1, 4096, 64), torch_does="plain"),
    Workload("decode, GQA 32/8, 16384", shape=(1, 32, 8, 1, 16384, 128), torch_does="plain"),
    Workload("decode, GQA 32/8, bfloat16", shape=(1, 32, 8, 1, 16384, 128), torch_does="plain", dtype=torch.bfloat16),
    Workload("decode of 4, GQA 32/8", shape=(1, 32, 8, 4, 4096, 128), torch_does="plain"),
    Workload("decode, fp32 KV, 4096", shape=(1, 12, 12, 1, 4096, 64), torch_does="plain"),
    Workload("decode, int8 KV, 4096", shape=(1, 12, 12, 1, 4096, 64), torch_does="plain", int8=True),
    Workload("decode, GQA 32/8, fp32 KV, 4096", shape=(1, 32, 8, 1, 4096, 128), torch_does="plain"),
    Workload("decode, GQA 32/8, int8 KV, 4096", shape=(1, 32, 8, 1, 4096, 128), torch_does="plain", int8=True),
]


def bias_of(variant, captures, shape):
    """The mask, or the mask and bias, as the tensor that torch wants; and the number of visible pairs."""
    B, H, _, Tq, Tk, _ = shape
    env = {"b": torch.arange(B).view(-1, 1, 1, 1), "h": torch.arange(H).view(1, -1, 1, 1), "i": torch.arange(Tq).view(-1, 1), "j": torch.arange(Tk), "Tq": Tq, "Tk": Tk,
           "s": torch.zeros(())}
    evaluate = Evaluator(env, captures, torch.float32)
    visible = evaluate(variant.mask_expr)
    pairs = int(visible.expand(B, H, Tq, Tk).sum())
    if variant.linear_scale is not None:
        return visible, pairs
    return torch.where(visible, evaluate.float(variant.score_expr), float("-inf")), pairs


def median(times):
    return sorted(times)[len(times) // 2]


def run(workload: Workload, rounds: int) -> str:
    B, H, Hk, Tq, Tk, D = workload.shape
    captures = workload.captures(B, H, Tq, Tk)
    variant = Variant(workload.score, workload.mask, empty=workload.empty, integer_captures=integer_captures(captures))
    q, k, v = (torch.randn(B, length, heads, D).to(workload.dtype).transpose(1, 2) for length, heads in ((Tq, H), (Tk, Hk), (Tk, Hk)))
    read, made, reads, known = [k, v], variant, captures, {}
    if workload.int8:
        (k8, k_scale), (v8, v_scale) = (quantize_kv(x.contiguous()) for x in (k, v))
        k, v = dequantize_kv(k8, k_scale), dequantize_kv(v8, v_scale)
        at = f"[b, floordiv(h, {H // Hk}), j]"
        made, reads, read = Variant(f"0.125*(s*c0{at})", value=f"c1{at}"), [k_scale[..., 0], v_scale[..., 0]], [k8, v8]
        known = {"k_dtype": torch.int8, "v_dtype": torch.int8}
    kernel = emit(made, q_dtype=workload.dtype, capture_dtypes=[c.dtype for c in reads], capture_ranks=[c.dim() for c in reads], head_dim=D, value_dim=D, **known)
    launch = CppLauncher(compile_cpp([CppUnit.of(kernel)])[0], kernel.entry)
    out = empty_output(q, D)
    bias, pairs = bias_of(variant, captures, workload.shape)
    contenders = [lambda: launch([out, q, *read, *reads])]
    scale = variant.linear_scale or (0.125 if workload.score.startswith("s*") else 1.0)
    options = {"plain": {}, "causal": {"is_causal": True}, "mask": {"attn_mask": bias if bias.dtype == torch.bool else bias.to(workload.dtype)}}.get(workload.torch_does)
    if options is not None:
        contenders.append(lambda: F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=Hk != H, **options))
        contenders[0]()
        error = (out.float() - contenders[1]().float()).abs().max().item()
        assert error < (1e-3 if workload.dtype == torch.float32 else 3e-2), f"{workload.name}: kernel and torch differ by {error}"
    times = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, taken in zip(contenders, times):
            start = time.perf_counter()
            contender()
            taken.append(time.perf_counter() - start)
    flop = 4 * pairs * D
    cells = [f"{median(taken) * 1e3:9.2f} ms {flop / median(taken) / 1e9:6.0f} GFLOP/s" for taken in times]
    if options is None:
        return f"{workload.name:32}{cells[0]}   {'torch has none':>28}"
    return f"{workload.name:32}{cells[0]}   {cells[1]} {workload.torch_does:6} {median(times[1]) / median(times[0]):6.2f}x"


#: absorbed multi-head latent attention: B, heads, Tq, Tk, latent, rotary dims, dtype
LATENT = {
    "decode, MLA 16 x 576/512": (1, 16, 1, 2048, 512, 64, torch.float32),
    "decode, MLA 128 x 576/512": (1, 128, 1, 2048, 512, 64, torch.float32),
    "decode of 4, MLA 16 x 576/512": (1, 16, 4, 2048, 512, 64, torch.float32),
    "decode, MLA 16, bfloat16": (1, 16, 1, 2048, 512, 64, torch.bfloat16),
    "prefill 512, MLA 16 x 576/512": (1, 16, 512, 512, 512, 64, torch.float32),
}


def run_latent(name: str, rounds: int) -> list[str]:
    """Keys in two caches, of which the latent is the values too, and keys in one tensor, against torch's two products and a softmax over the joined one (joined before the clock starts)."""
    B, H, Tq, Tk, L, R, dtype = LATENT[name]
    q, latent, rotary = (torch.randn(B, heads, T, width).to(dtype) for heads, T, width in ((H, Tq, L + R), (1, Tk, L), (1, Tk, R)))
    joined, out, scale = torch.cat([latent, rotary], -1), empty_output(q, L), 0.07
    kernels = [emit(Variant(f"s*{scale}"), q_dtype=dtype, head_dim=L + R, value_dim=L, key_dims=dims) for dims in ((L, R), (L + R,))]
    parts, one = (CppLauncher(library, kernel.entry) for library, kernel in zip(compile_cpp([CppUnit.of(k) for k in kernels]), kernels))

    def products():
        rows = q.reshape(B, H * Tq, L + R)
        return (torch.softmax(torch.bmm(rows, joined[:, 0].transpose(1, 2)) * scale, -1) @ latent[:, 0]).view(B, H, Tq, L)

    contenders = {"two caches": lambda: parts([out, q, latent, rotary, latent]), "one cache": lambda: one([out, q, joined, joined[..., :L]]), "torch, bmm": products}
    expected = products().float()
    for launch in (contenders["two caches"], contenders["one cache"]):
        launch()
        error = (out.float() - expected).abs().max().item()
        assert error < (1e-3 if dtype == torch.float32 else 3e-2), f"{name}: kernel and torch differ by {error}"
    times = interleaved(contenders, rounds, warmup=3)
    flop, read = 2 * B * H * Tq * Tk * (2 * L + R), B * Tk * (L + R) * dtype.itemsize
    return [f"{name:32}{t['median_ms']:9.2f} ms {flop / t['median_ms'] / 1e6:6.0f} GFLOP/s {read / t['median_ms'] / 1e6:6.1f} GB/s of the cache   {what}, {times['torch, bmm']['median_ms'] / t['median_ms']:.2f}x"
            for what, t in times.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n{'':32}{'tileweld':>27}   {'torch':>27}")
    for workload in WORKLOADS:
        if arguments.only in workload.name:
            print(run(workload, arguments.rounds), flush=True)
    for name in LATENT:
        if arguments.only in name:
            print("\n".join(run_latent(name, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
