"""The C++ kernels of tileweld::int8_linear against its definition in float64, and their sums bit for bit. All kernels of a table are built at once."""

import dataclasses
import functools
import math

import pytest
import torch

from tileweld.codegen.cpp import linear
from tileweld.codegen.cpp.int8_linear import emit, few
from tileweld.compiler.errors import UnsupportedError
from tileweld.compiler.ir.int8_linear import dequantized, quantized, reference
from tileweld.compiler.ir.linear import Spec, spec_of, widths
from tileweld.runtime.build import CppUnit, build, compile_cpp
from tileweld.runtime.launch import CppLauncher

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ROWS = (0, 1, 7, 17, 65)  # in place by four, two and one; packed, whole and partial blocks of rows
HALF = "a{0}*c1[i, mod(j, 64)] + where(mod(j, 64) < 32, -p{0}, p{0})*c2[i, mod(j, 64)]"
WAYS = {"this processor": (), "AVX2": ("-march=x86-64-v3",), "narrow vectors": ("-march=x86-64",), "AVX-512 without VNNI": ("-mno-avx512vnni",), "AVX-512 alone": ("-march=x86-64-v3", "-mavx512f")}
_FLAGS = next((line for line in open("/proc/cpuinfo") if line.startswith("flags")), "").split()
_NEEDED = {"AVX2": "avx2", "AVX-512 without VNNI": "avx512bw", "AVX-512 alone": "avx512f"}


def floats(*shape):
    return lambda M, K, N: torch.randn([size if isinstance(size, int) else {"M": M, "K": K, "N": N}[size] for size in shape])


@dataclasses.dataclass(frozen=True)
class Case:
    activation: str
    epilogues: tuple = ("a0",)
    N: tuple = (45,)
    K: int = 67
    captures: tuple = ()  # functions of M, K, N[0]
    norm: str = ""
    prologue: str = "x"
    pairs: tuple = ()
    dtype: torch.dtype = F32
    group: int = 0
    threshold: float = math.inf
    has_columns: bool = False
    way: str = "this processor"
    flags: tuple = ("-O1",)  # half the time; what is compiled as for users says so

    def spec(self):
        return spec_of(self.captured(2), self.norm, self.prologue, self.epilogues, self.pairs or (0, 0) * len(self.epilogues))

    def captured(self, M):
        made = [f(M, self.K, self.N[0]) for f in self.captures]
        return [c.to(self.dtype) if c.dtype == F32 else c for c in made]

    def weights(self):
        both = [quantized(torch.randn(n, self.K) / max(self.K, 1) ** 0.5, self.group) for n in self.N]
        return [q for q, _ in both], [s for _, s in both]

    def columns(self):
        return torch.arange(self.K) % 7 == 2 if self.has_columns else None

    def kernel(self, **known):
        captures, scales = self.captured(2), self.weights()[1]
        return emit(self.spec(), x_dtype=self.dtype, capture_dtypes=[c.dtype for c in captures], capture_ranks=[c.dim() for c in captures], widths=self.N, k=self.K, activation=self.activation,
                    groups=[s.shape[1] for s in scales], has_columns=self.has_columns, **known)


NORMED = dict(norm="rms", prologue="x*r*c0[j]", captures=(floats("K"),))
GATED = dict(epilogues=("a0*sigmoid(a0)*a1",), N=(80, 80))
QKV = dict(epilogues=(HALF.format(0), HALF.format(1), "a2"), N=(192, 64, 64), norm="rms", prologue="x*r*c0[j]", captures=(floats("K"), floats("M", 64), floats("M", 64)), pairs=(64, 32, 64, 32, 0, 0))
CASES = {
    **{f"{activation}, {name}": Case(activation, threshold=2.0, **fields) for activation in ("float", "int8", "mixed") for name, fields in {
        "plain": dict(flags=()), "whole vectors": dict(K=256, N=(64,), flags=()), "a byte over": dict(K=129, N=(17,)), "one column": dict(K=1, N=(1,)), "no K": dict(K=0, epilogues=("a0 + 1",)),
        "norm, gated": NORMED | GATED | dict(flags=()), "q k v": QKV, "residual": dict(epilogues=("a0 + c0[i, j]",), captures=(floats("M", "N"),)),
        "bfloat16": dict(dtype=BF16, epilogues=("a0 + c0[i, j]",), captures=(floats("M", "N"),)), "float16": dict(dtype=F16, **NORMED | GATED),
        **{way: dict(way=way, K=203) for way in WAYS if way != "this processor"}}.items()},
    "layer norm": Case("int8", ("a0 + c2[j]",), norm="layer", prologue="(x - u)*r*c0[j] + c1[j]", captures=(floats("K"), floats("K"), floats("N"))),
    "a prologue of captures": Case("mixed", prologue="x*sigmoid(c0[i, j]) + c1[i]", captures=(floats("M", "K"), floats("M")), threshold=1.5),
    "groups of 64": Case("float", K=320, group=64), "groups of 128": Case("float", K=256, group=128, **GATED), "groups of 24": Case("float", K=72, group=24), "groups of 5": Case("float", K=65, group=5),
    "static columns": Case("mixed", has_columns=True, K=130), "static columns beside a threshold": Case("mixed", has_columns=True, threshold=0.5, **NORMED),
    "many outliers": Case("mixed", threshold=0.3, K=512, N=(300,)), "few outliers": Case("mixed", threshold=3.8, K=512, N=(300,)),
    "strips and a part, gated": Case("int8", K=70, **GATED | dict(N=(300, 300))), "heads of 96": Case("mixed", K=70, threshold=2.0, **QKV | dict(N=(288, 96, 96), epilogues=tuple(e.replace("64", "96").replace("32", "48") for e in QKV["epilogues"]), pairs=(96, 48, 96, 48, 0, 0), captures=(floats("K"), floats("M", 96), floats("M", 96)))),
    "a residual of one row, of steps": Case("int8", ("a0 + c0[i, j]*c1[i, j]",), N=(300,), captures=(lambda M, K, N: torch.randn(1, N).expand(M, N), lambda M, K, N: torch.randn(M, 2 * N)[:, ::2])),
    "long, int8": Case("int8", K=20000, N=(40,)), "long, mixed": Case("mixed", K=20000, N=(40,), threshold=4.0), "long, float": Case("float", K=20000, N=(40,)),
}


def can_run(case):
    return _NEEDED.get(case.way, "mmx") in _FLAGS


@functools.cache
def launches():
    cases = {name: case for name, case in CASES.items() if can_run(case)}
    kernels = [case.kernel() for case in cases.values()]
    libraries = compile_cpp([CppUnit.of(k, WAYS[case.way] + case.flags) for k, case in zip(kernels, cases.values())])
    return {name: CppLauncher(library, "int8_linear") for name, library in zip(cases, libraries)}


def outputs(launch, spec, x, weights, scales, captures, threshold=math.inf, columns=None, eps=1e-5):
    outs = [torch.full((x.shape[0], n), 77.0, dtype=x.dtype) for n in widths(spec, weights)]
    launch([*outs, x, *weights, *scales, *captures, *([columns] if columns is not None else [])], (), (eps, threshold))
    return outs


def compare(name, x, weights, scales, captures, launch=None):
    """Bytes are rounded from float32: where y is computed, one in ten thousand lands on the other side of a half, which moves a sum by a step."""
    case = CASES[name]
    spec, columns = case.spec(), case.columns()
    actual = outputs(launch or launches()[name], spec, x, weights, scales, captures, case.threshold, columns)
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    exact = reference(x.double(), weights, scales, wide, (), 1e-5, spec, case.activation, case.threshold, columns)
    for a, e in zip(actual, exact):
        assert a.dtype == x.dtype and a.shape == e.shape
        tolerance = 2e-5 if case.dtype == F32 else 2e-2
        if case.activation != "float" and a.numel():
            far = ((a.double() - e).abs() > tolerance * (1 + e.abs())) & e.isfinite()
            assert far.sum() <= 0.1 * a.numel(), f"{far.sum()} of {a.numel()}"
            tolerance = max(tolerance, 0.05)
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name):
    case = CASES[name]
    if not can_run(case):
        pytest.skip(f"this processor has no {_NEEDED[case.way]}")
    weights, scales = case.weights()
    for M in ROWS if case.K < 1000 else (2, 30):
        compare(name, torch.randn(M, case.K).to(case.dtype), weights, scales, case.captured(M))


@pytest.mark.parametrize("way", WAYS)
def test_sums_are_bitwise_those_of_int64(way):
    """x holds integers with 127 in every row, so that its step is 1; scales are 1. Extremes too: nothing saturates, not even at -128."""
    if _NEEDED.get(way, "mmx") not in _FLAGS:
        pytest.skip(f"this processor has no {_NEEDED[way]}")
    shapes = ((1, 1), (45, 67), (16, 64), (20, 1027))
    kernels = [emit(Spec(), x_dtype=F32, widths=[N], k=K, activation="int8", groups=[1]) for N, K in shapes]
    libraries = compile_cpp([CppUnit.of(k, WAYS[way] + ("-O1",) * bool(WAYS[way])) for k in kernels])
    for (N, K), library in zip(shapes, libraries):
        launch, ones = CppLauncher(library, "int8_linear"), torch.ones(N, 1)
        for M in (0, 1, 2, 6, 40):
            random = torch.randint(-127, 128, (M, K))
            random[:, 0] = 127
            signs = torch.randint(0, 2, (M, K)) * 2 - 1
            for t in (random, signs * 127, torch.full((M, K), -127)):
                for q in (torch.randint(-127, 128, (N, K)), torch.full((N, K), -127), torch.full((N, K), 127), torch.randint(0, 2, (N, K)) * 255 - 128):
                    q = q.to(torch.int8)
                    exact = t.long() @ q.long().T
                    assert torch.equal(outputs(launch, Spec(), t.float(), [q], [ones], [])[0], exact.float()), (M, N, K)


def test_the_way_of_avx_vnni_is_compiled():
    """Processors with VNNI and without AVX-512; few machines of ours are one, so this holds the assembler's part."""
    kernel = emit(Spec(), x_dtype=F32, widths=[45], k=67, activation="mixed", groups=[1])
    (library,) = build([CppUnit("int8", kernel.source, extra_flags=("-march=x86-64-v3", "-mavxvnni"))])
    assert library.exists()


def test_the_longest_sums_fit():
    K = 133_144
    launch = CppLauncher(compile_cpp([CppUnit("int8", emit(Spec(), x_dtype=F32, widths=[2], k=K, activation="int8", groups=[1]).source)])[0], "int8_linear")
    for M in (1, 9):
        x, q = torch.full((M, K), -127.0), torch.full((2, K), 127, dtype=torch.int8)
        assert torch.equal(outputs(launch, Spec(), x, [q], [torch.ones(2, 1)], [])[0], torch.full((M, 2), -127 * 127 * K).float())


@pytest.mark.parametrize("M", [1, 6, 20])
def test_thresholds_at_the_ends_are_the_other_activations(M):
    K, N = 203, 45
    kernels = {activation: emit(Spec(), x_dtype=F32, widths=[N], k=K, activation=activation, groups=[1]) for activation in ("float", "int8", "mixed")}
    made = dict(zip(kernels, (CppLauncher(library, "int8_linear") for library in compile_cpp([CppUnit.of(k) for k in kernels.values()]))))
    x, (q, s) = torch.randn(M, K), quantized(torch.randn(N, K))
    x[0] = 0
    run = lambda activation, threshold: outputs(made[activation], Spec(), x, [q], [s], [], threshold)[0]  # noqa: E731
    assert torch.equal(run("mixed", math.inf), run("int8", math.inf))
    torch.testing.assert_close(run("mixed", 0.0), run("float", 0.0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(run("float", 0.0).double(), x.double() @ dequantized(q, s, torch.float64).T, rtol=1e-5, atol=1e-4)
    assert (run("int8", 0.0)[0] == 0).all() and (run("mixed", 1.0)[0] == 0).all()


HOSTILE = ("float, plain", "int8, plain", "mixed, plain", "int8, norm, gated", "mixed, q k v", "float, whole vectors", "int8, whole vectors", "mixed, AVX2", "int8, narrow vectors", "static columns", "many outliers")


@pytest.mark.parametrize("M", [5, 40])
@pytest.mark.parametrize("name", HOSTILE)
def test_rows_that_are_not_finite_keep_to_themselves(name, M):
    case = CASES[name]
    if not can_run(case):
        pytest.skip(f"this processor has no {_NEEDED[case.way]}")
    x = torch.randn(M, case.K)
    x[0, 3], x[1, 66], x[2], x[3, 0], x[3, 1] = math.nan, math.inf, 0.0, -math.inf, math.nan
    weights, scales = case.weights()
    compare(name, x, weights, scales, case.captured(M))
    x = torch.randn(M, case.K) * torch.logspace(-38, 30, M)[:, None]  # steps near both ends of float32; the sums stay inside
    if not case.norm and case.activation == "int8":
        actual, exact = outputs(launches()[name], case.spec(), x, weights, scales, [])[0], reference(x.double(), weights, scales, [], (), 1e-5, case.spec(), case.activation)[0]
        assert ((actual.double() - exact).abs() <= 1e-2 * exact.abs().amax(1, keepdim=True) + 1e-36).all()


@pytest.mark.parametrize("M", [3, 30])
@pytest.mark.parametrize("name", ["float, residual", "int8, residual", "mixed, residual", "int8, bfloat16", "groups of 64", "static columns"])
def test_any_strides(name, M):
    case = CASES[name]
    weights, scales = case.weights()
    x = torch.randn(M, 2 * case.K + 5).to(case.dtype)
    sliced = [torch.cat([w, w], 1)[:, case.K:] for w in weights]
    apart = [torch.stack([s, s], -1)[..., 0] for s in scales]
    captures = [c.T.contiguous().T if c.dim() == 2 else c for c in case.captured(M)]
    for view in (x[:, 3:3 + case.K], x[:, : 2 * case.K : 2], torch.randn(case.K, M).to(case.dtype).T):
        compare(name, view, weights, scales, captures)
        compare(name, view, sliced, apart, captures)
    n = case.N[0]
    memory = torch.full((M, 2 * n), 77.0, dtype=case.dtype)
    launches()[name]([memory[:, ::2], x[:, : case.K], *weights, *scales, *captures, *([case.columns()] if case.has_columns else [])], (), (1e-5, case.threshold))
    expected = outputs(launches()[name], case.spec(), x[:, : case.K], weights, scales, captures, case.threshold, case.columns())[0]
    assert torch.equal(memory[:, ::2], expected) and (memory[:, 1::2] == 77).all()


@pytest.mark.parametrize("name", ["int8, norm, gated", "mixed, q k v", "groups of 64", "int8, one column"])
def test_kernels_for_known_rows_and_strides(name):
    case = CASES[name]
    weights, scales = case.weights()
    most = few(case.activation, case.K)
    sizes = (1, 7, most + 1)
    kernels = []
    for M in sizes:
        tensors = [*(torch.empty(M, n) for n in widths(case.spec(), weights)), torch.empty(M, case.K), *weights, *scales, *case.captured(M)]
        kernels.append(case.kernel(rows=M, unit=[[stride == 1 for stride in t.stride()] for t in tensors]))
    for M, kernel, library in zip(sizes, kernels, compile_cpp([CppUnit.of(k, ("-O1",)) for k in kernels])):
        assert ("few_rows(call);" in kernel.source, "many_rows(call);" in kernel.source) == (M <= most, M > most)
        x = torch.randn(M, case.K)
        if M > 1 and case.K > 1:
            x[1, 1] = math.nan
        compare(name, x, weights, scales, case.captured(M), CppLauncher(library, "int8_linear"))


def test_float_activations_are_as_exact_as_the_kernel_of_floats():
    """The error of weight_only against float64, within twice that of tileweld::linear on dequantised float32 weights; rows with massive activations too."""
    K, N = 4096, 64
    kernels = [emit(Spec(), x_dtype=F32, widths=[N], k=K, activation="float", groups=[1]), linear.emit(Spec(), x_dtype=F32, weight_dtypes=[F32], widths=[N], k=K)]
    ours, floats = [CppLauncher(library, kernel.entry) for library, kernel in zip(compile_cpp([CppUnit.of(k) for k in kernels]), kernels)]
    q, s = quantized(torch.randn(N, K) / K**0.5)
    for M in (1, 4, 30):
        x, out = torch.randn(M, K), torch.empty(M, N)
        for outlier in (1.0, 1e3):
            x[:, 7] = outlier
            exact = x.double() @ dequantized(q, s, torch.float64).T
            floats([out, x, dequantized(q, s, F32)], (), (1e-5,))
            error = (outputs(ours, Spec(), x, [q], [s], [])[0].double() - exact).norm()
            assert error <= 2 * (out.double() - exact).norm() + 1e-7 * exact.norm() and error <= 3e-6 * exact.norm()


def test_threads_and_rows_give_the_same_numbers():
    for name in ("int8, q k v", "mixed, q k v"):
        case = CASES[name]
        spec, (weights, scales), x = case.spec(), case.weights(), torch.randn(200, case.K)
        for M in (few(case.activation, case.K), few(case.activation, case.K) + 1, 200):
            captures = case.captured(M)
            first = outputs(launches()[name], spec, x[:M], weights, scales, captures, case.threshold)
            torch.set_num_threads(1)
            try:
                second = outputs(launches()[name], spec, x[:M], weights, scales, captures, case.threshold)
            finally:
                torch.set_num_threads(2)
            assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(("fields", "reason"), [
    (dict(activation="int4"), "activation 'int4'"),
    (dict(x_dtype=torch.float64), "x of torch.float64"),
    (dict(activation="int8", groups=[2]), "2 scales for 64"),
    (dict(groups=[3]), "3 scales for 64"),
    (dict(activation="int8", k=133_145), "overflow int32"),
    (dict(has_columns=True), "outlier columns are given"),
    (dict(unit=[[False, True], [False, True], [True, False], [True, True]]), "weight 0 do not lie together"),
])
def test_what_no_kernel_can_do_is_refused(fields, reason):
    with pytest.raises(UnsupportedError, match=reason):
        emit(Spec(), **dict(x_dtype=F32, widths=[8], k=64, activation="float", groups=[1]) | fields)
