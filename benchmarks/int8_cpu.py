"""The generated C++ kernels of tileweld::int8_linear against torch's: python benchmarks/int8_cpu.py [CASE] [--clock cpu]

Contenders take turns in one process; medians. Few rows: as many weights in turn as leave the caches empty, GB/s of weights, beside a loop that only reads the same memory
(the floor) and tileweld's kernel of float32 weights. Many rows: GOPS, beside F.linear in float32, tileweld's kernel of it, and the bare int32 product of torch._int_mm, which neither
quantises nor scales. torchao where it is installed. On a machine that others use too, run with OMP_NUM_THREADS=1 and --clock cpu: the processor time of the calling thread.
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
OUTLIERS = 6  # columns of "mixed", out of K


def launcher(kernel):
    return CppLauncher(compile_cpp([CppUnit(kernel.name, kernel.source)])[0], kernel.entry)


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
    for label, activation, scales in (("float", "float", step), ("float, groups of 64", "float", groups), ("int8", "int8", step), ("mixed", "mixed", step)):
        unit = [[stride == 1 for stride in t.stride()] for t in (out, x, memory[0], scales)]
        launch = launcher(int8_linear.emit(Spec(), x_dtype=F32, widths=[N], k=K, activation=activation, groups=[scales.shape[1]], rows=M, unit=unit))
        launch([out, x, memory[0], scales], (), (EPS, 6.0))
        exact = reference(x, [memory[0]], [scales], [], (), EPS, Spec(), activation, 6.0)[0]
        assert (out - exact).abs().max() <= 1e-4 * exact.abs().max(), label
        contenders[f"tileweld {label}"] = lambda launch=launch, scales=scales: [launch([out, x, q, scales], (), (EPS, 6.0)) for q in memory]
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
    for name in CASES:
        if arguments.case in name:
            rows = run(name, arguments.rounds, time.thread_time if arguments.clock == "cpu" else time.perf_counter, read_all)
            show(f"{name}, {torch.get_num_threads()} threads, {arguments.clock} clock", rows, ["contender", "us", "GB/s" if "GB/s" in rows[0] else "GOPS", "x float32"])
            if arguments.store:
                store("int8_cpu.json", {name: {"machine": about, "clock": arguments.clock, "rows": rows}})


if __name__ == "__main__":
    main()
