"""The generated C++ kernels of tileweld::int8_linear against torch's: python benchmarks/int8_cpu.py [CASE] [--clock cpu]

Contenders take turns in one process; medians. Few rows: as many weights in turn as leave the caches empty, GB/s of weights, beside a loop that only reads the same memory
(the floor) and tileweld's kernel of float32 weights. Many rows: GOPS, beside F.linear in float32, tileweld's kernel of it, and the bare int32 product of torch._int_mm, which neither
quantises nor scales. "products alone": tileweld's packing and micro-kernels, and torch's brgemm u8s8 with weights that were packed before, both into a tile that stays in the cache; the
best of brgemm's sizes of blocks. "int8, products by brgemm": tileweld's kernel as it is on processors with AMX. "gated MLP": a norm, gate and up, down with a residual, where gate and up take the row maxima that down rounds by, and where down finds them. torchao where it is installed. On a machine that others use too, run with OMP_NUM_THREADS=1 and --clock cpu: the processor time of the calling thread.
"""
from __future__ import annotations

import argparse
import ctypes
import time

import torch
import torch.nn.functional as F
from harness import machine, show, store
from linear_cpu import EPS, READ, SWEEP, measure

from tileweld.codegen.cpp import int8_linear, linear
from tileweld.compiler.ir.int8_linear import dequantized, quantized, reference
from tileweld.compiler.ir.linear import Spec
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher

F32 = torch.float32
CASES = {**{f"decode {M} x {K} -> {N}": (M, K, N) for M, K, N in ((1, 1024, 4096), (1, 4096, 1024), (1, 576, 1536), (1, 2048, 2048), (4, 1024, 4096), (8, 1024, 4096))},
         **{f"prefill {M} x {K} -> {N}": (M, K, N) for M, K, N in ((32, 1024, 4096), (64, 1024, 4096), (512, 576, 1536), (1024, 768, 4096), (1024, 2048, 768), (1024, 2048, 2048))}}
PAIRS = {f"gated MLP {M} x {K} -> {N} -> {K}": (M, K, N) for M, K, N in ((1, 768, 2048), (16, 768, 2048), (1024, 768, 2048))}
#: behind the source of a kernel for many rows: its packing and products, without what comes before and after. `kept`: sums of all rows and columns; else one tile
PRODUCTS = """
extern "C" void products(const int8_t* q, const int8_t* t, int32_t* sums, int64_t rows, int64_t columns, bool kept) {
#pragma omp parallel
    {
        float* packed = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * STRIP * LANES));
        float own[BLOCK_ROWS * STRIP];
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < columns; n += STRIP) {
            for (int64_t p = 0; p < STRIP; p += PANEL) pack(Source{q + n * K, K}, p, STRIP - p, 0, K, LANES, packed + p * LANES);
            for (int64_t i = 0; i < rows; i += BLOCK_ROWS)
                for (int64_t p = 0; p < STRIP; p += PANEL)
                    multiply_block<2>(int(smaller(BLOCK_ROWS, rows - i)), reinterpret_cast<const float*>(t + i * K), LANES, packed + p * LANES, LANES,
                                      kept ? reinterpret_cast<float*>(sums) + i * columns + n + p : own + p, kept ? columns : STRIP, true);
        }
        std::free(packed);
    }
}
"""
BRGEMM = """
#include <algorithm>
#include <cstdint>
#include <vector>
#include <omp.h>
namespace at::native::cpublas {
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C, const unsigned char* A, const signed char* B, int32_t* C, bool is_vnni);
void brgemm_release(bool is_vnni);
}
// packed: [columns / width][K / 4][width][4]
extern "C" void products(const int8_t* packed, const uint8_t* t, int32_t* sums, int64_t rows, int64_t columns, int64_t K, int64_t height, int64_t width, bool kept) {
#pragma omp parallel
    {
        std::vector<int32_t> own(size_t(height * width));
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < columns; n += width)
            for (int64_t i = 0; i < rows; i += height)
                at::native::cpublas::brgemm(std::min(height, rows - i), width, K, K, width, kept ? columns : width, false, t + i * K, packed + n * K, kept ? sums + i * columns + n : own.data(), true);
        at::native::cpublas::brgemm_release(true);
    }
}
"""
HEIGHTS, WIDTHS = (48, 64, 128, 256), (32, 64, 128)  # of brgemm's blocks
BY_BRGEMM = "int8, products by brgemm"
OUTLIERS = 6  # columns of "mixed", out of K


def launcher(kernel):
    return CppLauncher(compile_cpp([CppUnit.of(kernel)])[0], kernel.entry)


def torchao_modules(weights, dynamic: bool) -> list | None:
    """Linear modules of float weights as torchao quantises them; None where it is not installed."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        return None
    modules = []
    for weight in weights:
        module = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        module[0].weight.data.copy_(weight)
        quantize_(module, Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig())
        modules.append(module)
    return modules


def products(source: str, q: torch.Tensor, M: int) -> dict:
    """contender -> call, the products of M rows of bytes with q [N, K] alone. Sums are compared to those of int64 first."""
    N, K = q.shape
    t, sums = torch.randint(-127, 128, (M, K), dtype=torch.int8), torch.empty(M, N, dtype=torch.int32)
    exact = t.double() @ q.double().T
    has_brgemm = torch.cpu._is_vnni_supported()
    ours, *theirs = compile_cpp([CppUnit("products", source + PRODUCTS), *([CppUnit("products_brgemm", BRGEMM, link_torch=True)] if has_brgemm else [])])
    own = lambda kept=False: ours.products(*map(ctypes.c_void_p, (q.data_ptr(), t.data_ptr(), sums.data_ptr())), *map(ctypes.c_int64, (M, N)), ctypes.c_bool(kept))  # noqa: E731
    own(True)
    excess = 128 * t.double().sum(1, keepdim=True) if has_brgemm else 0.0  # see int8_bytes.h
    assert torch.equal(sums.double() - excess, exact)
    calls, raised = {"tileweld, products alone": own}, (t.int() + 128).to(torch.uint8)
    for width in WIDTHS if theirs else ():
        packed = q.view(N // width, width, K // 4, 4).transpose(1, 2).contiguous()
        for height in HEIGHTS:
            def call(kept=False, packed=packed, height=height, width=width):
                theirs[0].products(*map(ctypes.c_void_p, (packed.data_ptr(), raised.data_ptr(), sums.data_ptr())), *map(ctypes.c_int64, (M, N, K, height, width)), ctypes.c_bool(kept))
            call(True)
            assert torch.equal(sums.double(), exact + 128 * q.double().sum(1)), (height, width)
            calls[f"brgemm u8s8, products alone, {height} x {width}"] = call
    return calls


def run(name: str, rounds: int, clock, read_all) -> list[dict]:
    M, K, N = CASES[name]
    is_few = name.startswith("decode")
    copies = max(1, SWEEP // (N * K)) if is_few else 1
    memory, step = torch.empty(copies, N, K, dtype=torch.int8), None
    for q in memory:
        made, step = quantized(torch.randn(N, K) / K**0.5)
        q.copy_(made)
    groups = step.repeat(1, K // 64).contiguous()
    x, out = torch.randn(M, K), torch.empty(M, N)
    x[:, :OUTLIERS] = 7.0
    floats = [dequantized(q, step, F32) for q in memory[: max(1, copies // 4)]]
    contenders = {}
    variants = [("float", "float", step), ("float, groups of 64", "float", groups), ("int8", "int8", step), ("mixed", "mixed", step)]
    variants += [(BY_BRGEMM, "int8", step)] * (not is_few and torch.cpu._is_vnni_supported())
    for label, activation, scales in variants:
        unit = [[stride == 1 for stride in t.stride()] for t in (out, x, memory[0], scales)]
        kernel = int8_linear.emit(Spec(), x_dtype=F32, widths=[N], k=K, activation=activation, groups=[scales.shape[1]], rows=M, unit=unit, brgemm=label == BY_BRGEMM)
        launch, ints = launcher(kernel), (1,) * kernel.link_torch
        launch([out, x, memory[0], scales], ints, (EPS, 6.0))
        if label == "int8" and not is_few:
            contenders |= products(kernel.source, memory[0], M)
        exact = reference(x, [memory[0]], [scales], [], (), EPS, Spec(), activation, 6.0)[0]
        assert (out - exact).abs().max() <= 1e-4 * exact.abs().max(), label
        contenders[f"tileweld {label}"] = lambda launch=launch, scales=scales, ints=ints: [launch([out, x, q, scales], ints, (EPS, 6.0)) for q in memory]
    floating = launcher(linear.emit(Spec(), x_dtype=F32, weight_dtypes=[F32], widths=[N], k=K, rows=M, unit=[[False, True]] * 3))
    contenders["tileweld float32"] = lambda: [floating([out, x, w], (), (EPS,)) for w in floats]
    contenders["torch float32"] = lambda: [F.linear(x, w) for w in floats]
    if is_few:
        contenders["reading"] = lambda: read_all(memory.data_ptr(), memory.numel() // 4)
    else:
        bytes_of_x = torch.randint(-127, 128, (M, K), dtype=torch.int8)
        contenders["torch._int_mm"] = lambda: torch._int_mm(bytes_of_x, memory[0].T)
    for label, dynamic in (("torchao weight-only", False), ("torchao dynamic", True)):
        modules = torchao_modules(floats, dynamic)
        if modules is not None:
            contenders[label] = lambda modules=modules: [module(x) for module in modules]
    taken = measure(contenders, rounds, clock)
    slower = sorted((label for label in taken if label.startswith("brgemm")), key=taken.get)[1:]
    taken = {label: seconds for label, seconds in taken.items() if label not in slower}
    rows = []
    for label, seconds in taken.items():
        count = len(floats) if label in ("tileweld float32", "torch float32") or "torchao" in label else copies
        each = seconds / count
        size = N * K * (4 if "float32" in label else 1)
        rows.append({"case": name, "contender": label, "us": each * 1e6, "GB/s" if is_few else "GOPS": (size if is_few else 2 * M * N * K) / each / 1e9})
    best = min(row["us"] for row in rows if row["contender"] in ("tileweld float32", "torch float32"))
    for row in rows:
        row["x float32"] = best / row["us"]
    return rows


def run_pair(name: str, rounds: int, clock) -> list[dict]:
    """The two products of a gated MLP, the second of which is given its row maxima or finds them: other kernels, the same results."""
    M, K, N = PAIRS[name]
    x, weight, made = torch.randn(M, K), torch.ones(K), {}
    gate, up, down = (quantized(torch.randn(n, k) / k**0.5) for n, k in ((N, K), (N, K), (K, N)))
    h, out, top = torch.empty(M, N), torch.empty(M, K), torch.empty(M)
    known = dict(x_dtype=F32, capture_dtypes=[F32], activation="int8", rows=M)
    for label, taken in (("row maxima passed on", True), ("found by down", False)):
        first = int8_linear.emit(Spec("rms", "x*r*c0[j]", ("a0*sigmoid(a0)*a1",)), capture_ranks=[1], widths=[N, N], k=K, groups=[1, 1], maxima=[0] * taken, unit=[[False, True]] * 4 + [[True, True]] * 2 + [[True]], **known)
        second = int8_linear.emit(Spec("", "x", ("a0 + c0[i, j]",)), capture_ranks=[2], widths=[K], k=N, groups=[1], has_row_max=taken, unit=[[False, True]] * 3 + [[True, True], [False, True]], **known)
        tops, flag = [top] * taken, (1.0,) * taken

        def call(launches=(launcher(first), launcher(second)), tops=tops, flag=flag):
            launches[0]([h, *tops, x, gate[0], up[0], gate[1], up[1], weight], (), (EPS, 6.0, *flag))
            launches[1]([out, h, *down, x, *tops], (), (EPS, 6.0, *flag))

        out.fill_(0)
        call()
        made[label] = call, out.clone()
    assert torch.equal(*(result for _, result in made.values()))
    repeat = max(1, 1024 // M // 8)
    taken = measure({label: lambda call=call: [call() for _ in range(repeat)] for label, (call, _) in made.items()}, rounds, clock)
    rows = [{"case": name, "contender": label, "us": seconds / repeat * 1e6, "GOPS": 6 * M * N * K * repeat / seconds / 1e9} for label, seconds in taken.items()]
    return [row | {"of found by down": row["us"] / rows[-1]["us"]} for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="?", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--store", action="store_true", help="write results/int8_cpu.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    read_all = compile_cpp([CppUnit("read_all", READ)])[0].read_all
    read_all.argtypes, read_all.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_float
    about = machine()
    for name in PAIRS:
        if arguments.case in name:
            rows = run_pair(name, arguments.rounds, time.thread_time if arguments.clock == "cpu" else time.perf_counter)
            show(f"{name}, {torch.get_num_threads()} threads, {arguments.clock} clock", rows, ["contender", "us", "GOPS", "of found by down"])
            if arguments.store:
                store("int8_cpu.json", {name: {"machine": about, "clock": arguments.clock, "rows": rows}})
    for name in CASES:
        if arguments.case in name:
            rows = run(name, arguments.rounds, time.thread_time if arguments.clock == "cpu" else time.perf_counter, read_all)
            show(f"{name}, {torch.get_num_threads()} threads, {arguments.clock} clock", rows, ["contender", "us", "GB/s" if "GB/s" in rows[0] else "GOPS", "x float32"])
            if arguments.store:
                store("int8_cpu.json", {name: {"machine": about, "clock": arguments.clock, "rows": rows}})


if __name__ == "__main__":
    main()
