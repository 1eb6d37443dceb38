"""C++ kernels that take their rows' largest magnitudes, and int8 kernels that are given them: the same bits as without, on every way of the kernels."""
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tileweld.codegen.cpp import int8_linear, linear
from tileweld.compiler.errors import UnsupportedError
from tileweld.compiler.ir.int8_linear import quantized, reference
from tileweld.compiler.ir.linear import Spec
from tileweld.compiler.ir.linear import row_max as row_max_of
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
K, N = 70, 45
ROWS = (0, 1, 7, 17, 65)  # in place by four, two and one; packed, whole and partial blocks of rows
GATED = Spec("rms", "x*r*c0[j]", ("a0*sigmoid(a0)*a1",))
PAIRS = Spec("", "x", ("a0*0.5 - p0", "a1", "a2 + 1"), ((10, 5), (0, 0), (0, 0)))  # pairs that lie further apart than a chunk of few rows do not exist in 45 columns: see LONG
LONG = Spec("", "x", ("a0 + p0", "a1"), ((200, 100), (0, 0)))
_FLAGS = next((line for line in open("/proc/cpuinfo") if line.startswith("flags")), "").split()
NARROW = {"AVX2": ("-march=x86-64-v3",), "narrow vectors": ("-march=x86-64",)}
#: name -> (spec, widths, dtype, of int8 weights, maxima, flags)
PRODUCERS = {
    **{f"gated {dtype}, {'int8' if is_int8 else 'float'}": (GATED, (N, N), dtype, is_int8, (0,), ()) for dtype in (F32, F16, BF16) for is_int8 in (True, False) if is_int8 or dtype != F16},
    **{f"gated, {way}": (GATED, (N, N), F32, True, (0,), flags) for way, flags in NARROW.items()},
    "some of three outputs": (PAIRS, (50, N, N), F32, True, (2, 0), ()), "long pairs": (LONG, (400, 300), F32, True, (0, 1), ()), "two strips": (Spec(), (300,), BF16, True, (0,), ()),
}
#: of a product [M, N] of int8: name -> (dtype, flags)
CONSUMERS = {"float32": (F32, ()), "bfloat16": (BF16, ()), **{way: (F32, flags) for way, flags in NARROW.items()}}


@functools.cache
def launches():
    kernels = []
    for spec, widths, dtype, is_int8, maxima, flags in PRODUCERS.values():
        known = dict(x_dtype=dtype, widths=widths, k=K, capture_dtypes=[dtype] * (spec is GATED), capture_ranks=[1] * (spec is GATED), maxima=maxima)
        kernels.append((int8_linear.emit(spec, **known, activation="int8", groups=[1] * len(widths)) if is_int8 else linear.emit(spec, **known, weight_dtypes=[dtype] * len(widths)), flags))
    for dtype, flags in CONSUMERS.values():
        for has_row_max in (True, False):
            kernels.append((int8_linear.emit(Spec("", "x", ("a0 + c0[i, j]",)), x_dtype=dtype, widths=[16], k=N, capture_dtypes=[dtype], capture_ranks=[2], activation="int8", groups=[1], has_row_max=has_row_max), flags))
    libraries = compile_cpp([CppUnit.of(k, ("-O1", *flags)) for k, flags in kernels])
    made = [CppLauncher(library, kernel.entry) for (kernel, _), library in zip(kernels, libraries)]
    pairs = made[len(PRODUCERS):]
    return dict(zip(PRODUCERS, made)), dict(zip(CONSUMERS, zip(pairs[::2], pairs[1::2])))


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isinf(), b.isinf())


def can_run(name):
    if "AVX2" in name and "avx2" not in _FLAGS:
        pytest.skip("this processor has no avx2")


@pytest.mark.parametrize("name", PRODUCERS)
def test_what_is_taken_are_the_maxima_of_what_is_stored(name):
    can_run(name)
    spec, widths, dtype, is_int8, numbers, _ = PRODUCERS[name]
    launch = launches()[0][name]
    for M in ROWS:
        x = torch.randn(M, K).to(dtype)
        if M > 5:
            x[1], x[2, 3], x[3, 5], x[4] = 0, math.nan, math.inf, -1.5
            x[5] *= 1e4  # beyond float16 behind two products without a norm
        both = [quantized(torch.randn(n, K)) for n in widths]
        matrices = [*(q for q, _ in both), *(s for _, s in both)] if is_int8 else [torch.randn(n, K).to(dtype) for n in widths]
        captures = [torch.randn(K).to(dtype)] if spec is GATED else []
        floats = (1e-5, math.inf) if is_int8 else (1e-5,)
        for stretch in (1, 2):
            outs = [torch.full((M, stretch * widths[spec.accumulators(o)[0]]), 77.0, dtype=dtype)[:, ::stretch] for o in range(len(spec.epilogues))]
            tops = [torch.full((stretch * M,), 77.0)[::stretch] for _ in numbers]
            launch([*outs, *tops, x, *matrices, *captures], (), (*floats, 1.0))
            plain = [torch.full_like(out, 77.0) for out in outs]
            untouched = [torch.full((M,), 77.0) for _ in numbers]
            launch([*plain, *untouched, x, *matrices, *captures], (), (*floats, 0.0))
            assert all(same(out, p) for out, p in zip(outs, plain)) and all((t == 77).all() for t in untouched)
            for top, number in zip(tops, numbers):
                assert same(top, row_max_of(outs[number])), (M, stretch)


@pytest.mark.parametrize("name", CONSUMERS)
def test_given_maxima_make_the_same_bytes(name):
    can_run(name)
    dtype = CONSUMERS[name][0]
    given_maxima, plain = launches()[1][name]
    (q, s) = quantized(torch.randn(16, N))
    for M in ROWS:
        x, c = (torch.randn(M, N) * torch.logspace(-38, 30, max(M, 1))[:M, None]).to(dtype), torch.randn(M, 16).to(dtype)
        if M > 5:
            x[1], x[2, 3], x[3, 5], x[4] = 0, math.nan, -math.inf, 2.5
        results = []
        for launch, rest, floats in ((given_maxima, [row_max_of(x)], (1.0,)), (given_maxima, [torch.full((M,), 3.0)], (0.0,)), (plain, [], ())):
            out = torch.full((M, 16), 77.0, dtype=dtype)
            launch([out, x, q, s, c, *rest], (), (0.0, math.inf, *floats))
            results.append(out)
        assert same(results[0], results[2]) and same(results[1], results[2]), M
        if dtype == F32 and M == 7:  # the vector of maxima may have gaps, and it is what scales
            apart = torch.stack([row_max_of(x), torch.full((M,), 9.0)], 1)[:, 0]
            out = torch.full((M, 16), 77.0)
            given_maxima([out, x, q, s, c, apart], (), (0.0, math.inf, 1.0))
            assert same(out, results[2])
            given_maxima([out, x, q, s, c, apart * 2], (), (0.0, math.inf, 1.0))
            assert not same(out, results[2])


def test_sums_are_those_of_int64():
    """Rows of integers whose largest is 127 have the step 1: bit by bit the sums in int64, and what the first product takes is what the second reads."""
    launch = launches()[1]["float32"][0]
    for M in ROWS:
        t, q = torch.randint(-127, 128, (M, N)), torch.randint(-127, 128, (16, N)).to(torch.int8)
        t[:, 1] = -127
        out = torch.full((M, 16), 77.0)
        launch([out, t.float(), q, torch.ones(16, 1), torch.zeros(M, 16), torch.full((M,), 127.0)], (), (0.0, math.inf, 1.0))
        assert torch.equal(out, (t @ q.long().T).float())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.sampled_from([n for n in PRODUCERS if n.startswith("gated torch.") and "float32" in n]), st.integers(0, 2**31), st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e-40, 3e38]), max_size=3), st.integers(1, 3))
def test_pairs(M, name, seed, hostile, threads):
    """gate and up, then down: with maxima, without, and the definition of the second on what the first has stored."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=random)
    for n, value in enumerate(hostile if M else ()):
        x[(seed + n) % M, (seed + 7 * n) % K] = value
    is_int8 = PRODUCERS[name][3]
    weights = [torch.randn(N, K, generator=random) / 8 for _ in range(2)]
    both = [quantized(w) for w in weights]
    first, (second, plain) = launches()[0][name], launches()[1]["float32"]
    q, s = quantized(torch.randn(16, N, generator=random))
    h, top, c = torch.empty(M, N), torch.full((M,), 77.0), torch.zeros(M, 16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first([h, top, x, *([*(q for q, _ in both), *(s for _, s in both)] if is_int8 else weights), torch.ones(K)], (), (1e-5, *[math.inf] * is_int8, 1.0))
        out, without = torch.empty(M, 16), torch.empty(M, 16)
        second([out, h, q, s, c, top], (), (0.0, math.inf, 1.0))
        plain([without, h, q, s, c], (), (0.0, math.inf))
    finally:
        torch.set_num_threads(before)
    assert same(top, row_max_of(h)) and same(out, without)
    exact = reference(h, [q], [s], [], (), 0.0, Spec(), "int8", row_max=top)[0]
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5 * float(h.nan_to_num(0, 0, 0).abs().max()) if M else 0, equal_nan=True)


def test_threads_join_their_maxima():
    """A product that is large enough for all threads, at rows for both ways."""
    kernel = int8_linear.emit(Spec(), x_dtype=F32, widths=[1300], k=256, activation="int8", groups=[1], maxima=[0])
    launch = CppLauncher(compile_cpp([CppUnit.of(kernel, ("-O1",))])[0], kernel.entry)
    q, s = quantized(torch.randn(1300, 256))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for M in (1, 3, 200):
                out, top = torch.empty(M, 1300), torch.full((M,), 77.0)
                launch([out, top, torch.randn(M, 256), q, s], (), (0.0, math.inf, 1.0))
                assert torch.equal(top, row_max_of(out)), (threads, M)
    finally:
        torch.set_num_threads(before)


def test_what_has_no_kernel_is_refused():
    known = dict(x_dtype=F32, widths=[8], k=8)
    for wrong in (dict(activation="mixed"), dict(activation="float"), dict(spec=Spec("rms", "x*r")), dict(spec=Spec("", "x*2"))):
        with pytest.raises(UnsupportedError, match="row_max"):
            int8_linear.emit(wrong.get("spec", Spec()), **known, activation=wrong.get("activation", "int8"), groups=[1], has_row_max=True)
    with pytest.raises(UnsupportedError, match="maxima"):
        linear.emit(Spec(), **known, weight_dtypes=[F32], maxima=[1])
    with pytest.raises(UnsupportedError, match="maxima"):
        int8_linear.emit(Spec(), **known, activation="int8", groups=[1], maxima=[-1])
