"""C++ kernels of tileweld::int8_linear whose products of many rows brgemm of libtorch_cpu makes: bit for bit those of int64, and of the kernel's own micro-kernels.

brgemm runs on AMX, and as well on AVX512-VNNI; on other processors it refuses, and these tests are of the micro-kernels that stand in for it."""
import contextlib
import ctypes
import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tileweld.codegen.cpp import linear_parts
from tileweld.codegen.cpp.int8_linear import emit, few
from tileweld.compiler.ir.int8_linear import quantized
from tileweld.compiler.ir.linear import Spec
from tileweld.runtime.brgemm import has_brgemm
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher

from .test_int8_linear import _FLAGS, CASES, F32, WAYS, can_run, compare, outputs

THEIRS, OWN = 1, 0  # the last integer of a call
ROWS = (0, 1, 17, 33, 65, 130)  # a block of 32 and its part; of 64, whole and partial
NAMES = [name for name, case in CASES.items() if case.activation != "float" and case.K > 0]
PART = linear_parts.text("int8_brgemm_part.h")
#: in the place of PART: the same products by a plain loop, counted
COUNTING = """
#include <cstdint>
static int64_t counted = 0;
extern "C" int64_t count() { return counted; }
__attribute__((visibility("hidden"))) bool multiply_by_brgemm(int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t a_row, const void* b, void* c, int64_t c_row, bool first) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            int32_t* to = static_cast<int32_t*>(c) + i * c_row + j;
            uint32_t sum = first ? 0 : uint32_t(*to);
            for (int64_t k = 0; k < depth; ++k) sum += uint32_t(static_cast<const uint8_t*>(a)[i * a_row + k] * static_cast<const int8_t*>(b)[(k / 4 * columns + j) * 4 + k % 4]);
            *to = int32_t(sum);
        }
#pragma omp atomic
    ++counted;
    return true;
}
__attribute__((visibility("hidden"))) void release_brgemm() {}
"""
PROBE = """
#include <cstdint>
bool multiply_by_brgemm(int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t a_row, const void* b, void* c, int64_t c_row, bool first);
void release_brgemm();
extern "C" bool probe(const uint8_t* a, const int8_t* b, int32_t* c, bool first) {
    const bool done = multiply_by_brgemm(32, 32, 64, a, 64, b, c, 32, first);
    if (done) release_brgemm();
    return done;
}
"""


@contextlib.contextmanager
def without_onednn():
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True


def by(launch, products):
    return lambda tensors, ints, floats: launch(tensors, (*ints, products), floats)


def same(a, b):
    return all(torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))


@functools.cache
def launches():
    cases = {name: CASES[name] for name in NAMES if can_run(CASES[name])}
    kernels = [case.kernel(rows=65, brgemm=True) for case in cases.values()]
    assert all(k.link_torch and "few_rows(call)" not in k.source for k in kernels)
    libraries = compile_cpp([CppUnit.of(k, WAYS[case.way] + ("-O1",)) for k, case in zip(kernels, cases.values())])
    return {name: CppLauncher(library, "int8_linear") for name, library in zip(cases, libraries)}


def launch_of(name):
    if name not in launches():
        pytest.skip("this processor lacks the instructions")
    return launches()[name]


@pytest.mark.parametrize("name", NAMES)
def test_against_the_definition_and_the_kernels_own_products(name):
    case, launch = CASES[name], launch_of(name)
    spec, (weights, scales), columns = case.spec(), case.weights(), case.columns()
    for M in ROWS if case.K < 1000 else (2, 70):
        x, captures = torch.randn(M, case.K).to(case.dtype), case.captured(M)
        compare(name, x, weights, scales, captures, by(launch, THEIRS))
        theirs, own = (outputs(by(launch, products), spec, x, weights, scales, captures, case.threshold, columns) for products in (THEIRS, OWN))
        assert same(theirs, own), M


@pytest.mark.parametrize("name", ["int8, plain", "mixed, plain", "int8, norm, gated", "static columns"])
def test_rows_that_are_not_finite_keep_to_themselves(name):
    case, launch = CASES[name], launch_of(name)
    (weights, scales), captures = case.weights(), case.captured(70)
    x = torch.randn(70, case.K)
    x[0, 3], x[1, 66], x[2], x[3, 0], x[69, 1] = math.nan, math.inf, 0.0, -math.inf, math.nan
    compare(name, x, weights, scales, captures, by(launch, THEIRS))
    assert same(*(outputs(by(launch, products), case.spec(), x, weights, scales, captures, case.threshold, case.columns()) for products in (THEIRS, OWN)))


SHAPES = ((1, 1), (45, 67), (300, 66), (20, 1027), (40, 20001))  # N, K: a strip and a part; weights whose K is packed in parts


@functools.cache
def bare():
    kernels = [emit(Spec(), x_dtype=F32, widths=[N], k=K, activation="int8", groups=[1], rows=40, brgemm=True) for N, K in SHAPES]
    return {shape: CppLauncher(library, "int8_linear") for shape, library in zip(SHAPES, compile_cpp([CppUnit.of(k, ("-O1",)) for k in kernels]))}


def test_sums_are_bitwise_those_of_int64_also_at_the_ends():
    """x holds integers with 127 in every row, so that its step is 1; scales are 1."""
    for (N, K), launch in bare().items():
        ones = torch.ones(N, 1)
        for M in (1, 40, 66):
            t = torch.randint(-127, 128, (M, K))
            t[:, 0] = 127
            for t in (t, torch.full((M, K), -127), (torch.randint(0, 2, (M, K)) * 2 - 1) * 127):
                for q in (torch.randint(-128, 128, (N, K)), torch.full((N, K), -128), torch.full((N, K), 127)):
                    exact = (t.double() @ q.double().T).float()  # sums of up to 2^29 are exact in float64; int64 products of matrices are slow
                    assert torch.equal(outputs(by(launch, THEIRS), Spec(), t.float(), [q.to(torch.int8)], [ones], [])[0], exact), (M, N, K)


@settings(max_examples=80, deadline=None)
@given(shape=st.sampled_from(SHAPES[:4]), M=st.integers(0, 150), products=st.sampled_from((THEIRS, OWN)), span=st.sampled_from((1, 3, 127)), stretch=st.sampled_from((1, 2)), seed=st.integers(0, 2**31))
def test_sums_are_those_of_int64(shape, M, products, span, stretch, seed):
    N, K = shape
    random = torch.Generator().manual_seed(seed)
    t, q = torch.randint(-span, span + 1, (M, K * stretch), generator=random)[:, ::stretch], torch.randint(-128, 128, (N, K), generator=random)
    t[:, seed % K] = 127
    assert torch.equal(outputs(by(bare()[shape], products), Spec(), t.float(), [q.to(torch.int8)], [torch.ones(N, 1)], [])[0], (t @ q.T).float())


def test_the_longest_sums_fit():
    K = 133_144
    kernel = emit(Spec(), x_dtype=F32, widths=[2], k=K, activation="int8", groups=[1], rows=17, brgemm=True)
    launch, x = CppLauncher(compile_cpp([CppUnit.of(kernel, ("-O1",))])[0], "int8_linear"), torch.full((17, K), -127.0)
    for q in (127, -127):
        assert torch.equal(outputs(by(launch, THEIRS), Spec(), x, [torch.full((2, K), q, dtype=torch.int8)], [torch.ones(2, 1)], [])[0], torch.full((17, 2), -127.0 * q * K))


def test_row_maxima_pass_through():
    M, K, N = 70, 70, 45
    first = emit(Spec("", "x", ("a0*sigmoid(a0)*a1",)), x_dtype=F32, widths=[N, N], k=K, activation="int8", groups=[1, 1], rows=M, maxima=[0], brgemm=True)
    second = emit(Spec(), x_dtype=F32, widths=[16], k=N, activation="int8", groups=[1], rows=M, has_row_max=True, brgemm=True)
    launched = [CppLauncher(library, "int8_linear") for library in compile_cpp([CppUnit.of(k, ("-O1",)) for k in (first, second)])]
    x, (gate, up, down) = torch.randn(M, K), (quantized(torch.randn(n, k) / k**0.5) for n, k in ((N, K), (N, K), (16, N)))
    x[5, 5] = math.inf
    made = []
    for products in (THEIRS, OWN):
        h, top, out = torch.empty(M, N), torch.empty(M), torch.empty(M, 16)
        by(launched[0], products)([h, top, x, gate[0], up[0], gate[1], up[1]], (), (1e-5, 0.0, 1.0))
        by(launched[1], products)([out, h, *down, top], (), (1e-5, 0.0, 1.0))
        made.append([h, top, out])
    assert same(*made) and torch.equal(made[0][1][6:], made[0][0][6:].abs().amax(1)) and not made[0][1][5].isfinite()


def test_rows_and_threads_give_the_same_numbers():
    case, launch = CASES["int8, q k v"], launch_of("int8, q k v")
    (weights, scales), x, captures = case.weights(), torch.randn(300, case.K), case.captured(300)
    first = outputs(by(launch, THEIRS), case.spec(), x, weights, scales, captures)
    torch.set_num_threads(1)
    try:
        assert same(first, outputs(by(launch, THEIRS), case.spec(), x, weights, scales, captures))
    finally:
        torch.set_num_threads(2)


def test_where_brgemm_refuses_the_kernel_multiplies_itself():
    """oneDNN can be switched off between two calls; also while its kernels are in use, so that they are asked for again in the next one."""
    for name in ("int8, norm, gated", "mixed, q k v"):
        case, launch = CASES[name], launch_of(name)
        (weights, scales), x, captures = case.weights(), torch.randn(130, case.K), case.captured(130)
        run = lambda: outputs(by(launch, THEIRS), case.spec(), x, weights, scales, captures, case.threshold)  # noqa: B023, E731
        before = run()
        with without_onednn():
            assert same(before, run())
        assert same(before, run())


@pytest.mark.skipif("avx512_vnni" not in _FLAGS, reason="brgemm of bytes asks for AVX512-VNNI")
def test_brgemm_is_there_and_is_what_the_part_calls():
    assert has_brgemm()
    (library,) = compile_cpp([CppUnit("probe", PROBE, link_torch=True, parts=(PART,))])
    library.probe.restype = ctypes.c_bool
    a, b, c = torch.randint(0, 256, (32, 64)).to(torch.uint8), torch.randint(-128, 128, (16, 32, 4)).to(torch.int8), torch.full((32, 32), 5, dtype=torch.int32)
    exact = (a.double() @ b.transpose(0, 1).reshape(32, 64).double().T).int()
    call = lambda first: library.probe(*map(ctypes.c_void_p, (a.data_ptr(), b.data_ptr(), c.data_ptr())), ctypes.c_bool(first))  # noqa: E731
    assert call(True) and torch.equal(c, exact)
    assert call(False) and torch.equal(c, 2 * exact)
    with without_onednn():
        assert not call(True) and torch.equal(c, 2 * exact)


def test_who_multiplies_is_the_last_integers_to_say():
    """The part is one of the test's own, which counts; few rows never ask it."""
    N, K = 300, 66
    kernel = emit(Spec(), x_dtype=F32, widths=[N], k=K, activation="int8", groups=[1], brgemm=True)
    (library,) = compile_cpp([CppUnit.of(dataclasses.replace(kernel, parts=(COUNTING,)), ("-O1",))])
    library.count.restype = ctypes.c_int64
    launch, ones, q = CppLauncher(library, "int8_linear"), torch.ones(N, 1), torch.randint(-128, 128, (N, K))
    for M in (few("int8", K), 70):
        t = torch.randint(-127, 128, (M, K))
        t[:, 0] = 127
        for products in (OWN, THEIRS):
            before = library.count()
            assert torch.equal(outputs(by(launch, products), Spec(), t.float(), [q.to(torch.int8)], [ones], [])[0], (t @ q.T).float())
            assert (library.count() > before) == (products == THEIRS and M == 70)


@pytest.mark.parametrize(("fields", "many"), [(dict(activation="float", rows=70), True), (dict(activation="int8", rows=few("int8", 64)), False), (dict(activation="int8", rows=70, k=0), True)])
def test_what_has_no_products_of_many_bytes_does_not_link_torch(fields, many):
    known = dict(x_dtype=F32, widths=[8], k=64, groups=[1]) | fields
    kernel = emit(Spec(), **known, brgemm=True)
    assert not kernel.link_torch and not kernel.parts and ("many_rows(call)" in kernel.source) == many
    assert kernel == emit(Spec(), **known)
