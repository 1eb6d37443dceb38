"""Triton kernels that take their rows' largest magnitudes, and int8 kernels that are given them: in the interpreter the same bits as without; compiled ahead of time."""
import functools
import math

import pytest
import torch

pytest.importorskip("triton", reason="the Triton target needs triton")

from tileweld.codegen.triton import int8_linear, linear  # noqa: E402
from tileweld.compiler.errors import UnsupportedError  # noqa: E402
from tileweld.compiler.ir.int8_linear import quantized  # noqa: E402
from tileweld.compiler.ir.linear import Spec  # noqa: E402
from tileweld.compiler.ir.linear import row_max as row_max_of  # noqa: E402
from tileweld.runtime.aot import compile_ahead, family_of  # noqa: E402
from tileweld.runtime.interpret import interpreted_entry, interpreting, load_interpreted  # noqa: E402
from tileweld.runtime.source_module import load_python_source  # noqa: E402

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
K, N = 50, 37
GATED = Spec("rms", "x*r*c0[j]", ("a0*sigmoid(a0)*a1",))
ROTATED = Spec("rms", "x*r*c0[j]", ("a0 - p0", "a1", "a2*2"), ((2, 1), (0, 0), (0, 0)))


def made(spec, dtype, activation, maxima, widths):
    known = dict(x_dtype=dtype, capture_dtypes=[dtype], capture_ranks=[1], k=K, maxima=maxima)
    if activation == "":
        return linear.emit(spec, **known, weight_dtypes=[dtype] * len(widths))
    return int8_linear.emit(spec, **known, activation=activation, groups=[1] * len(widths))


@functools.cache
def consumer(dtype, has_row_max):
    kernel = int8_linear.emit(Spec("", "x", ("a0 + c0[i, j]",)), x_dtype=dtype, capture_dtypes=[dtype], capture_ranks=[2], k=N, activation="int8", has_row_max=has_row_max)
    return interpreted_entry(kernel.name, kernel.source, kernel.entry)


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isinf(), b.isinf())


def tensors(spec, dtype, activation, widths, M):
    x = torch.randn(M, K).to(dtype)
    if M > 3:
        x[0], x[1, 3], x[2, 5] = 0, math.nan, math.inf
    both = [quantized(torch.randn(n, K) / 4) for n in widths]
    matrices = [*(q for q, _ in both), *(s for _, s in both)] if activation else [torch.randn(n, K).to(dtype) for n in widths]
    outs = [torch.full((M, widths[spec.accumulators(o)[0]]), 77.0, dtype=dtype) for o in range(len(spec.epilogues))]
    return outs, [x, *matrices, torch.randn(K).to(dtype)]


@pytest.mark.parametrize(("spec", "widths", "maxima"), [(GATED, (N, N), (0,)), (ROTATED, (36, N, N), (0, 2))])
@pytest.mark.parametrize(("dtype", "activation"), [(F32, "int8"), (F32, ""), (BF16, "int8"), (F16, "float"), (F32, "mixed")])
def test_what_is_taken_are_the_maxima_of_what_is_stored(spec, widths, maxima, dtype, activation):
    kernel = made(spec, dtype, activation, maxima, widths)
    run = interpreted_entry(kernel.name, kernel.source, kernel.entry)
    for M in (0, 3, 20, 70):
        outs, rest = tensors(spec, dtype, activation, widths, M)
        tops = [torch.full((M,), 77.0) for _ in maxima]
        run([*outs, *tops, *rest], [], (1e-5, 2.0) if activation else (1e-5,))
        for top, number in zip(tops, maxima):
            assert not (outs[number] == 77).any() and same(top, row_max_of(outs[number]))


def test_shares_of_k_and_launches_that_follow_each_other():
    """Maxima are taken where the shares are added, and begin at 0 at every launch, also those of the tuner."""
    kernel = made(GATED, F32, "int8", (0,), (N, N))
    module = load_interpreted(kernel.name, kernel.source)
    module.split_count = lambda *sizes: 2
    outs, rest = tensors(GATED, F32, "int8", (N, N), 20)
    top = torch.full((20,), 77.0)
    for scale in (1.0, 0.25):
        with interpreting():
            module.linear([*outs, top, rest[0] * 0, *[t * scale if t.is_floating_point() else t for t in rest[1:]]], [], [1e-5, 2.0])
            module.linear([*outs, top, *[t * scale if t.is_floating_point() else t for t in rest]], [], [1e-5, 2.0])
        assert same(top, row_max_of(outs[0]))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_given_maxima_make_the_same_bytes(dtype):
    q, s = quantized(torch.randn(16, N))
    for M in (0, 3, 20, 70):
        x, c = torch.randn(M, N).to(dtype), torch.randn(M, 16).to(dtype)
        if M > 3:
            x[0], x[1, 3], x[2, 5], x[3] = 0, math.nan, -math.inf, 2.5
        results = []
        for has_row_max in (True, False):
            out = torch.full((M, 16), 77.0, dtype=dtype)
            consumer(dtype, has_row_max)([out, x, q, s, c, *[row_max_of(x)] * has_row_max], [], (0.0, math.inf))
            results.append(out)
        assert same(*results)
    out = torch.empty(70, 16, dtype=dtype)
    consumer(dtype, True)([out, x, q, s, c, row_max_of(x) * 2], [], (0.0, math.inf))
    assert not same(out, results[1])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiled_ahead(arch):
    """Taken with an atomic maximum of integers that returns nothing; with maxima given, the rows are looked through by one loop alone."""
    for kernel in (int8_linear.emit(GATED, x_dtype=BF16, capture_dtypes=[BF16], capture_ranks=[1], k=4096, activation="int8", groups=[1, 1], maxima=[0]),
                   linear.emit(GATED, x_dtype=BF16, weight_dtypes=[BF16, BF16], capture_dtypes=[BF16], capture_ranks=[1], k=4096, maxima=[0])):
        module = load_python_source(kernel.name, kernel.source)
        for name in ("tiled_kernel", "combine_kernel", "gemv_kernel"):
            entry = next((e for e in module.AOT if e["kernel"] == name and e["backend"] == family_of(arch)), None)
            if entry is not None and not entry["constants"].get("SPLIT"):
                result = compile_ahead(module, name, entry["signature"], entry["constants"], arch, divisible_by_16=entry["divisible_by_16"], num_warps=entry["config"][-2], num_stages=entry["config"][-1])
                assert result.spills == 0 and result.fits, result
                assert ("atomic" in result.assembly or "red." in result.assembly) and "max" in result.assembly, result
    loops = []
    for has_row_max in (True, False):
        kernel = int8_linear.emit(Spec(), x_dtype=BF16, k=4096, activation="int8", has_row_max=has_row_max)
        module = load_python_source(kernel.name, kernel.source)
        entry = next(e for e in module.AOT if e["kernel"] == "quantise_kernel" and e["backend"] == family_of(arch))
        result = compile_ahead(module, "quantise_kernel", entry["signature"], entry["constants"], arch, divisible_by_16=entry["divisible_by_16"], num_warps=entry["config"][-2], num_stages=entry["config"][-1])
        assert result.spills == 0 and result.fits, result
        loops.append(kernel.source.count("tl.range(0, K, BLOCK)"))
    assert loops == [1, 2]


def test_what_has_no_kernel_is_refused():
    for wrong in (dict(activation="mixed"), dict(activation="float"), dict(spec=Spec("rms", "x*r")), dict(spec=Spec("", "x*2"))):
        with pytest.raises(UnsupportedError, match="row_max"):
            int8_linear.emit(wrong.get("spec", Spec()), x_dtype=F32, activation=wrong.get("activation", "int8"), has_row_max=True)
    with pytest.raises(UnsupportedError, match="maxima"):
        linear.emit(Spec(), x_dtype=F32, weight_dtypes=[F32], maxima=[1])
