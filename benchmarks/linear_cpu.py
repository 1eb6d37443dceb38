"""The generated C++ kernels of tileweld::linear against torch: python benchmarks/linear_cpu.py [--only decode] [--clock cpu]

Contenders take turns in one process; medians. torch is F.linear with the norm before and the epilogue after it in eager; "mkldnn" is oneDNN's
product alone on a weight that it has packed ahead of time. Few rows: as many weights in turn as leave the caches empty, GB/s of
weights, beside a loop that only reads the same memory. On a machine that others use too, run with OMP_NUM_THREADS=1 and --clock cpu: the
processor time of the calling thread, the least of all rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import time

import torch
import torch.nn.functional as F

from tileweld.codegen.cpp.linear import emit
from tileweld.compiler.ir.linear import spec_of
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher

EPS = 1e-5
SWEEP = 192 << 20  # bytes of weights used in turn
ROTARY = "a{0}*c1[i, mod(j, 64)] + where(mod(j, 64) < 32, -p{0}, p{0})*c2[i, mod(j, 64)]"
READ = """
#include <cstdint>
#include <cstring>
typedef float Vector __attribute__((vector_size(64), aligned(4)));
extern "C" float read_all(const float* data, int64_t count) {
    float total = 0;
#pragma omp parallel for reduction(+ : total) schedule(static)
    for (int64_t block = 0; block < count / 16384; ++block) {
        Vector sums[8] = {};
        for (int k = 0; k < 16384; k += 128)
            for (int n = 0; n < 8; ++n) sums[n] += *reinterpret_cast<const Vector*>(data + block * 16384 + k + n * 16);
        for (int n = 1; n < 8; ++n) sums[0] += sums[n];
        total += sums[0][0];
    }
    return total;
}
"""


@dataclasses.dataclass
class Workload:
    kind: str
    M: int
    K: int
    N: tuple
    dtype: torch.dtype = torch.float32

    def __str__(self):
        return f"{'decode' if self.M <= 8 else 'prefill'}, {self.kind} {self.M} x {self.K} -> {'+'.join(map(str, self.N))}" + (f" {str(self.dtype).removeprefix('torch.')}" if self.dtype != torch.float32 else "")


WORKLOADS = [
    *(Workload("plain", 1, K, (N,)) for K, N in ((1024, 4096), (4096, 1024), (576, 1536), (2048, 2048))),
    Workload("plain", 1, 2048, (2048,), torch.bfloat16),
    Workload("plain", 1, 2048, (2048,), torch.float16),
    *(Workload("transposed", 1, K, (N,)) for K, N in ((768, 2304), (3072, 768))),
    *(Workload("plain", M, 1024, (4096,)) for M in (2, 4, 8)),
    Workload("norm, gated", 1, 1024, (4096, 4096)),
    Workload("norm, q k v, rotary", 1, 576, (576, 192, 192)),
    Workload("residual", 1, 1536, (576,)),
    Workload("plain", 64, 1024, (4096,)),
    Workload("plain", 1024, 768, (4096,)),
    Workload("norm, gated", 1024, 768, (2048, 2048)),
    Workload("norm, gated", 1024, 768, (4096, 4096)),
    Workload("norm, q k v, rotary", 1024, 768, (768, 256, 256)),
    Workload("residual", 1024, 2048, (768,)),
    Workload("norm, gated", 512, 576, (1536, 1536)),
    Workload("residual", 512, 1536, (576,)),
    *(Workload("residual", 512, 1536, (576,), dtype) for dtype in (torch.bfloat16, torch.float16)),
    *(Workload("norm, gated", 512, 1024, (2048, 2048), dtype) for dtype in (torch.bfloat16, torch.float16)),
]


def parts_of(workload: Workload):
    """(spec arguments, captures, the same in eager torch as a function of x and the weights)."""
    M, K, N = workload.M, workload.K, workload.N
    make = lambda *shape: torch.randn(*shape).to(workload.dtype)  # noqa: E731
    if workload.kind == "norm, gated":
        gain = make(K)
        return ("rms", "x*r*c0[j]", ("a0*sigmoid(a0)*a1",), (0, 0)), [gain], lambda x, w: F.silu(F.linear(y := F.rms_norm(x, (K,), gain, EPS), w[0])) * F.linear(y, w[1])
    if workload.kind == "norm, q k v, rotary":
        gain, cosine, sine = make(K), make(M, 64), make(M, 64)

        def rotated(q):
            q = q.view(M, -1, 64)
            return (q * cosine[:, None] + torch.cat([-q[..., 32:], q[..., :32]], -1) * sine[:, None]).view(M, -1)

        def eager(x, w):
            y = F.rms_norm(x, (K,), gain, EPS)
            return rotated(F.linear(y, w[0])), rotated(F.linear(y, w[1])), F.linear(y, w[2])

        return ("rms", "x*r*c0[j]", (ROTARY.format(0), ROTARY.format(1), "a2"), (64, 32, 64, 32, 0, 0)), [gain, cosine, sine], eager
    if workload.kind == "residual":
        residual = make(M, N[0])
        return ("", "x", ("a0 + c0[i, j]",), (0, 0)), [residual], lambda x, w: F.linear(x, w[0]) + residual
    return ("", "x", ("a0",), (0, 0)), [], lambda x, w: F.linear(x, w[0])


def measure(contenders: dict, rounds: int, clock) -> dict:
    times = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = clock()
            contender()
            times[name].append(clock() - start)
    return {name: sorted(taken)[0 if clock is time.thread_time else len(taken) // 2] for name, taken in times.items()}


def run(workload: Workload, rounds: int, clock, read_all) -> str:
    M, K, N, dtype = workload.M, workload.K, workload.N, workload.dtype
    spec_arguments, captures, eager = parts_of(workload)
    size = sum(N) * K * dtype.itemsize
    few = M <= 8
    copies = max(1, SWEEP // size) if few else 1
    memory = torch.randn(copies, sum(N), K).div_(K**0.5).to(dtype)
    weights = [list(one.split(N)) for one in memory]
    if workload.kind == "transposed":
        memory = memory.transpose(1, 2).contiguous()
        weights = [list(one.T.split(N)) for one in memory]
    x = torch.randn(M, K).to(dtype)
    outs = [torch.empty(M, n, dtype=dtype) for n in (N[:1] if "gated" in workload.kind else N)]
    unit = [[stride == 1 for stride in t.stride()] for t in (*outs, x, *weights[0], *captures)]
    kernel = emit(spec_of(captures, *spec_arguments), x_dtype=dtype, weight_dtypes=[dtype] * len(N), capture_dtypes=[c.dtype for c in captures], capture_ranks=[c.dim() for c in captures], widths=N, k=K,
                  rows=M, unit=unit)
    launch = CppLauncher(compile_cpp([CppUnit.of(kernel)])[0], kernel.entry)

    def tileweld():
        for w in weights:
            launch([*outs, x, *w, *captures], (), (EPS,))

    def theirs():
        for w in weights:
            result = eager(x, w)
        return result

    tileweld()
    expected = theirs()
    for out, other in zip(outs, expected if isinstance(expected, tuple) else (expected,)):
        torch.testing.assert_close(out, other, rtol=1e-3 if dtype == torch.float32 else 5e-2, atol=1e-3 if dtype == torch.float32 else 1e-1)
    contenders = {"tileweld": tileweld, "torch": theirs}
    if few:
        contenders["read"] = lambda: read_all(memory.data_ptr(), memory.numel() * dtype.itemsize // 4)
    elif workload.kind == "plain":
        packed = torch.ops.mkldnn._reorder_linear_weight(weights[0][0], M)
        contenders["mkldnn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    taken = measure(contenders, rounds, clock)
    work, unit = (copies * size / 1e9, "GB/s") if few else (2 * M * K * sum(N) / 1e9, "GFLOP/s")
    rates = "  ".join(f"{name} {taken[name] / copies * 1e6:8.0f} us {work / taken[name]:6.1f} {unit}" for name in taken)
    return f"{workload!s:58} {taken['torch'] / taken['tileweld']:5.2f}x   {rates}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    read_all = compile_cpp([CppUnit("read_all", READ)])[0].read_all
    read_all.argtypes, read_all.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_float
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.clock} clock")
    for workload in WORKLOADS:
        if arguments.only in str(workload):
            print(run(workload, arguments.rounds, time.thread_time if arguments.clock == "cpu" else time.perf_counter, read_all), flush=True)


if __name__ == "__main__":
    main()
