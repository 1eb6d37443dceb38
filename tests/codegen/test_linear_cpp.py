"""The C++ kernels of tileweld::linear against its definition in float64. All kernels of the file are built at once, in parallel."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tileweld.codegen.cpp.linear import emit
from tileweld.codegen.cpp.linear_parts import FEW, few, groups
from tileweld.codegen.cpp.linear_source import STEP, cut
from tileweld.compiler.errors import UnsupportedError
from tileweld.compiler.ir import scalar as sc
from tileweld.compiler.ir.linear import Spec, expanded, reference, spec_of, widths
from tileweld.compiler.ir.parser import parse
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ROWS = (1, 3, 7, 13, 65, 130)  # in place, several passes in place, packed; whole and partial blocks of rows
HALF = "a{0}*c1[i, mod(j, 64)] + where(mod(j, 64) < 32, -p{0}, p{0})*c2[i, mod(j, 64)]"
INTERLEAVED = "a0*c0[i, mod(j, 16)//2] + where(mod(j, 2) == 0, -p0, p0)*c1[i, mod(j, 16)//2]"
PARTIAL = "where(mod(j, 20) < 12, a0*c0[i + n0, mod(j, 20)] + where(mod(j, 20) < 6, -p0, p0)*c1[i + n0, mod(j, 20)], a0)"


def floats(*shape):
    return lambda M, K, N: torch.randn([size if isinstance(size, int) else {"M": M, "K": K, "N": N}[size] for size in shape])


@dataclasses.dataclass(frozen=True)
class Case:
    epilogues: tuple = ("a0",)
    N: tuple = (45,)
    K: int = 67
    captures: tuple = ()  # functions of M, K, N[0]
    norm: str = ""
    prologue: str = "x"
    pairs: tuple = ()
    sizes: tuple = ()
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype | None = None
    flags: tuple = ()

    def spec(self):
        return spec_of(self.captured(2), self.norm, self.prologue, self.epilogues, self.pairs or (0, 0) * len(self.epilogues))

    def captured(self, M):
        made = [f(M, self.K, self.N[0]) for f in self.captures]
        return [c.to(self.dtype) if c.dtype == F32 else c for c in made]

    def weights(self):
        return [(torch.randn(n, self.K) / max(self.K, 1) ** 0.5).to(self.weight_dtype or self.dtype) for n in self.N]

    def kernel(self, **known):
        captures = self.captured(2)
        return emit(self.spec(), x_dtype=self.dtype, weight_dtypes=[self.weight_dtype or self.dtype] * len(self.N), capture_dtypes=[c.dtype for c in captures],
                    capture_ranks=[c.dim() for c in captures], widths=self.N, k=self.K, num_sizes=len(self.sizes), **known)


CASES = {
    "plain": Case(),
    "plain, narrow vectors": Case(flags=("-march=x86-64",)),
    "plain, AVX2": Case(flags=("-march=x86-64-v3",), dtype=F16),
    "bfloat16, AVX2": Case(flags=("-march=x86-64-v3",), dtype=BF16),  # without products of pairs
    "bias": Case(("a0 + c0[j]",), captures=(floats("N"),)),
    "whole vectors": Case(("a0 + c0[j]",), N=(64,), K=64, captures=(floats("N"),)),
    "rms norm": Case(norm="rms", prologue="x*r*c0[j]", captures=(floats("K"),)),
    "layer norm": Case(("a0 + c2[j]",), norm="layer", prologue="(x - u)*r*c0[j] + c1[j]", captures=(floats("K"), floats("K"), floats("N"))),
    "gated": Case(("a0*sigmoid(a0)*a1",), N=(45, 45)),
    "gated after a norm": Case(("a0*sigmoid(a0)*a1",), N=(80, 80), norm="rms", prologue="x*r*(1 + c0[j])", captures=(floats("K"),)),
    "q k v": Case((HALF.format(0), HALF.format(1), "a2"), N=(192, 64, 64), norm="rms", prologue="x*r*c0[j]", captures=(floats("K"), floats("M", 64), floats("M", 64)), pairs=(64, 32, 64, 32, 0, 0)),
    "interleaved": Case((INTERLEAVED,), N=(48,), captures=(floats("M", 8), floats("M", 8)), pairs=(2, 1)),
    "partial": Case((PARTIAL,), N=(60,), captures=(lambda M, K, N: torch.randn(M + 2, 20), lambda M, K, N: torch.randn(M + 2, 20)), pairs=(20, 6), sizes=(2,)),
    "residual": Case(("a0 + c0[i, j]",), captures=(floats("M", "N"),)),
    "softcap": Case(("30*tanh(a0*(1/30))",)),
    "two outputs of one weight": Case(("relu(a0)", "a0*a1"), N=(33, 33)),
    "a prologue of captures": Case(prologue="x*sigmoid(c0[i, j]) + c1[i]", captures=(floats("M", "K"), floats("M"))),
    "integers": Case(("where(c0[i, j] != 0, a0, c2[c1[i], j])",), captures=(lambda M, K, N: torch.rand(M, N) > 0.5, lambda M, K, N: torch.arange(M) % 3 - 3, floats(3, "N"))),
    "a scalar": Case(("a0*c0 + n0",), captures=(floats(),), sizes=(3,)),
    "wide": Case(N=(420,), K=20),
    "no K": Case(("a0 + 1",), K=0),
    "one column": Case(N=(1,), K=1),
    "long": Case(("a0 + a1",), N=(40, 40), K=5000),  # packed in several parts
    "bfloat16": Case(("a0*sigmoid(a0)*a1 + c0[i, j]",), N=(45, 45), dtype=BF16, norm="rms", prologue="x*r", captures=(floats("M", "N"),)),
    "float16": Case(("a0*sigmoid(a0)*a1 + c0[i, j]",), N=(45, 45), dtype=F16, norm="rms", prologue="x*r", captures=(floats("M", "N"),)),
    "float32 weights of bfloat16 rows": Case(dtype=BF16, weight_dtype=F32),
}


@functools.cache
def launches():
    kernels = [case.kernel() for case in CASES.values()]
    libraries = compile_cpp([CppUnit.of(k, case.flags) for k, case in zip(kernels, CASES.values())])
    return {name: CppLauncher(library, "linear") for name, library in zip(CASES, libraries)}


def outputs(launch, spec, x, weights, captures, sizes, eps=1e-5):
    outs = [torch.full((x.shape[0], n), 77.0, dtype=x.dtype) for n in widths(spec, weights)]
    launch([*outs, x, *weights, *captures], sizes, (eps,))
    return outs


def expected(spec, x, weights, captures, sizes, eps=1e-5):
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    return reference(x.double(), [w.double() for w in weights], wide, sizes, eps, spec)


def compare(name, x, weights, captures, launch=None):
    case = CASES[name]
    spec = case.spec()
    actual, exact = outputs(launch or launches()[name], spec, x, weights, captures, case.sizes), expected(spec, x, weights, captures, case.sizes)
    parts = expanded(x, weights, captures, case.sizes, case.norm, 1e-5, case.prologue, case.epilogues, [n for pair in spec.pairs for n in pair]) if case.dtype != F32 and case.weight_dtype is None else None
    for o, (a, e) in enumerate(zip(actual, exact)):
        assert a.dtype == x.dtype and a.shape == e.shape
        if parts is not None:  # rounded once: no worse than what rounds after every step
            assert (a.double() - e).abs().max() <= 2 * (parts[o].double() - e).abs().max() + 1e-9
        torch.testing.assert_close(a.double(), e, rtol=2e-5 if case.dtype == F32 else 2e-2, atol=2e-5 if case.dtype == F32 else 2e-2, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name):
    case = CASES[name]
    weights = case.weights()
    for M in ROWS if case.K < 1000 else (2, 30):
        compare(name, torch.randn(M, case.K).to(case.dtype), weights, case.captured(M))


@pytest.mark.parametrize("M", [2, 40])
@pytest.mark.parametrize("name", ["rms norm", "residual", "q k v", "bfloat16"])
def test_any_strides(name, M):
    case = CASES[name]
    x = torch.randn(M, 2 * case.K + 5).to(case.dtype)
    for view in (x[:, 3:3 + case.K], x[:, : 2 * case.K : 2], torch.randn(case.K, M).to(case.dtype).T):
        compare(name, view, case.weights(), case.captured(M))
    transposed = [w.T.contiguous().T for w in case.weights()]
    sliced = [torch.cat([w, w], 1)[:, : case.K] for w in case.weights()]
    apart = [torch.stack([w, w], -1)[..., 0] for w in case.weights()]
    captures = [c.T.contiguous().T if c.dim() == 2 else torch.stack([c, c], -1)[..., 0] for c in case.captured(M)]
    for weights in (transposed, sliced, apart):
        compare(name, x[:, : case.K], weights, captures)


@pytest.mark.parametrize("M", [1, 2, 3, 4, 7])
def test_transposed_weights_are_read_in_place(M):
    compare("wide", torch.randn(M, 20), [torch.randn(20, 420).T], [])


@pytest.mark.parametrize("M", [2, 40])
@pytest.mark.parametrize("name", ["residual", "bfloat16"])
def test_outputs_of_any_row_stride_are_written_and_nothing_else(name, M):
    case = CASES[name]
    spec, x, weights, captures = case.spec(), torch.randn(M, case.K).to(case.dtype), case.weights(), case.captured(M)
    n = case.N[0]
    for stride, column in ((n + 9, 1), (2 * n, 2)):
        memory = torch.full((M, stride), 77.0, dtype=case.dtype)
        out = memory.as_strided((M, n), (stride, column))
        launches()[name]([out, x, *weights, *captures], (), (1e-5,))
        assert torch.equal(out, outputs(launches()[name], spec, x, weights, captures, ())[0])
        assert (memory == 77).sum() >= M * (stride - n)


@pytest.mark.parametrize("M", [0, 5, 40])
def test_rows_that_hold_nan_and_infinity_keep_to_themselves(M):
    x = torch.randn(M, 67)
    if M:
        x[1, 3], x[2, 66], x[3] = float("nan"), float("inf"), 0.0
    for name in ("plain", "rms norm", "layer norm", "gated", "no K"):
        case = CASES[name]
        compare(name, x[:, : case.K], case.weights()[:], case.captured(M))


KNOWN = {"plain": (1, 2, 9), "whole vectors": (1, 3, 30), "layer norm": (1, 30), "gated after a norm": (5, 12), "q k v": (1, 30), "interleaved": (1, 30), "partial": (6, 30), "integers": (7, 30), "wide": (1, 8, 17),
         "no K": (1, 30), "one column": (1, 30), "long": (1, 3), "bfloat16": (1, 30), "float16": (1, 30), "float32 weights of bfloat16 rows": (1, 30)}
LAID = {"in rows": lambda t: t, "in columns": lambda t: t.T.contiguous().T, "apart": lambda t: torch.stack([t, t], -1)[..., 0]}


@functools.cache
def known_launches():
    """Kernels for one number of rows and one layout of the weights each; captures of two dims lie as the weights do."""
    wanted = [(name, M, how) for name, sizes in KNOWN.items() for M in sizes for how in (LAID if name in ("plain", "q k v", "bfloat16") else ("in rows", "in columns"))]
    kernels = []
    for name, M, how in wanted:
        case = CASES[name]
        tensors = [*(torch.empty(M, n) for n in widths(case.spec(), case.weights())), torch.empty(M, case.K), *map(LAID[how], case.weights()), *(LAID[how](c) if c.dim() == 2 else c for c in case.captured(M))]
        kernels.append(case.kernel(rows=M, unit=[[stride == 1 for stride in t.stride()] for t in tensors]))
    libraries = compile_cpp([CppUnit.of(k) for k in kernels])
    return {key: (CppLauncher(library, "linear"), kernel.source) for key, library, kernel in zip(wanted, libraries, kernels)}


@pytest.mark.parametrize("name", KNOWN)
def test_kernels_for_known_rows_and_strides(name):
    case = CASES[name]
    for (other, M, how), (launch, _) in known_launches().items():
        if other == name:
            compare(name, torch.randn(M, case.K).to(case.dtype), list(map(LAID[how], case.weights())), [LAID[how](c) if c.dim() == 2 else c for c in case.captured(M)], launch)


def test_a_kernel_for_known_rows_holds_one_way_and_many_rows_share_it():
    unit, K = [[False, True]] * 3, CASES["plain"].K
    sources = {M: CASES["plain"].kernel(rows=M, unit=unit).source for M in (1, few(K), few(K) + 1, 100)}
    assert all(("few_rows(call);" in source, "many_rows(call);" in source) == (M <= few(K), M > few(K)) for M, source in sources.items())
    assert sources[few(K) + 1] == sources[100] and len(sources[100]) < len(CASES["plain"].kernel().source)


def test_captures_without_unit_stride_leave_the_others_theirs():
    case = Case(("a0 + c0[i, j] + c1[i, j]",), captures=(floats("M", "N"), floats("M", "N")))
    source = case.kernel(rows=2, unit=[[False, True]] * 3 + [[True, False], [False, True]]).source
    assert "* call.c0_stride[1]" in source and "* call.c1_stride[1]" not in source and "template <bool unit>" not in source


def test_bfloat16_products_over_long_rows_round_no_more_than_eager():
    """Pairs of bfloat16 along K, where the processor has them; odd K, K in parts, rows of x that are read in place, and infinities."""
    for K, N, M in ((2049, 70, 25), (4096, 300, 40), (130, 64, 13)):
        kernel = emit(Spec(), x_dtype=BF16, weight_dtypes=[BF16], widths=[N], k=K, rows=M, unit=[[False, True]] * 3)
        launch = CppLauncher(compile_cpp([CppUnit.of(kernel)])[0], "linear")
        for stride in (K, K + 6, K + 1):
            x, w = torch.randn(M, stride).to(BF16)[:, :K], (torch.randn(N, K) / K**0.5).to(BF16)
            x[3, 5], x[4, 6] = float("inf"), float("nan")
            out, exact, eager = outputs(launch, Spec(), x, [w], [], ())[0], x.double() @ w.double().T, x @ w.T
            rest = [m for m in range(M) if m not in (3, 4)]
            assert (out[rest].double() - exact[rest]).abs().max() <= 2 * (eager[rest].double() - exact[rest]).abs().max()
            assert torch.equal(out[3].double(), exact[3]) and out[4].isnan().all()


def test_large_values_of_float16_do_not_overflow_on_the_way():
    case = CASES["float16"]
    for M in (2, 40):
        compare("float16", torch.full((M, case.K), 6e4, dtype=F16), case.weights(), case.captured(M))


def test_threads_and_rows_give_the_same_numbers():
    """Every row of a result is summed in the same order, whatever the number of threads; between few and many rows only the order of sums differs."""
    case = CASES["q k v"]
    spec, weights, x = case.spec(), [w.repeat(1, 1) for w in case.weights()], torch.randn(200, case.K)
    for M in (FEW, FEW + 1, 200):
        captures = case.captured(M)
        first = outputs(launches()["q k v"], spec, x[:M], weights, captures, ())
        torch.set_num_threads(1)
        try:
            second = outputs(launches()["q k v"], spec, x[:M], weights, captures, ())
        finally:
            torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_outputs_that_share_weights_are_one_group():
    spec = Spec(epilogues=("a0", "a1*a3", "a2", "a3"), pairs=((0, 0),) * 4)
    assert [(g.weights, g.outputs) for g in groups(spec, [8, 16, 24, 16])] == [((0,), (0,)), ((1, 3), (1, 3)), ((2,), (2,))]


@pytest.mark.parametrize(("spec", "dtypes", "widths", "reason"), [
    (Spec(), (torch.float64, F32), [8], "float64"),
    (Spec(), (F32, torch.int8), [8], "int8"),
    (Spec(epilogues=("p0 + a0", "p0"), pairs=((4, 2), (2, 1))), (F32, F32), [8], "differ in pairs"),
    (Spec(epilogues=("p0",), pairs=((4, 2),)), (F32, F32), [6], "blocks of 4"),
    (Spec(epilogues=("a0 + c0[i, j]",)), (F32, F32), [8], "2 indices"),
])
def test_what_no_kernel_can_do_is_refused(spec, dtypes, widths, reason):
    with pytest.raises(UnsupportedError, match=reason):
        emit(spec, x_dtype=dtypes[0], weight_dtypes=dtypes[1:], capture_dtypes=[F32], capture_ranks=[1], widths=widths, k=8)


def test_loops_are_cut_where_conditions_change_and_moduli_wrap():
    period, pieces = cut(parse(HALF.format(0), frozenset()), 192)
    assert period == 64 and all(not piece.atoms(sc.where) for *_, piece in pieces)
    assert all({index for load in sc.loads(piece) for index in load.args[2:]} == {STEP} for *_, piece in pieces)
    assert [(low, high) for low, high, _ in pieces] == [(0, 32), (32, 64)]
    for text, stretches in (("where(j <= 4, a0, 0)", [(0, 5), (5, 192)]), ("where(j > 7, a0, 0)", [(0, 8), (8, 192)]), ("where(j == 5, a0, 0)", [(0, 5), (5, 6), (6, 192)]), ("where(2*j < 9, a0, 0)", [(0, 5), (5, 192)])):
        assert [(low, high) for low, high, _ in cut(parse(text, frozenset()), 192)[1]] == stretches


TERMS = ("a0", "a1", "c0[j]", "c1[i, j]", "c1[i, mod(j, 8)]", "c0[mod(j, 5)]", "where(mod(j, 8) < 3, p0, -a1)", "where(j < 13, p1, 2)", "c0[j//4]", "relu(a0)", "where(c2[i] == 1, a0, p0)", "j*0.1", "c0[22 - j]")


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(terms=st.lists(st.sampled_from(TERMS), min_size=1, max_size=4), first=st.sampled_from(("a0", "a0*a1")), norm=st.sampled_from(("", "rms", "layer")), pair=st.sampled_from(((8, 4), (2, 1), (12, 5), (24, 3))),
       K=st.integers(0, 40))
def test_random_specs(terms, first, norm, pair, K):
    epilogue = first + "".join(f" {'+-*'[n % 3]} ({term})" for n, term in enumerate(terms))
    N, prologue = 24, {"": "x", "rms": "x*r", "layer": "(x - u)*r"}[norm]
    epilogue = epilogue.replace("c0[22 - j]", "c0[min(j, 22 - min(j, 22))]")
    make = lambda M: [torch.randn(N), torch.randn(M, N), torch.randint(0, 2, (M,))]  # noqa: E731
    spec = spec_of(make(1), norm, prologue, (epilogue, "a1"), (*pair, 0, 0))
    kernel = emit(spec, x_dtype=F32, weight_dtypes=[F32, F32], capture_dtypes=[F32, F32, torch.int64], capture_ranks=[1, 2, 1], widths=[N, N], k=K)
    launch = CppLauncher(compile_cpp([CppUnit.of(kernel, ("-O1",))])[0], "linear")
    for M in (2, 19):
        x, weights, captures = torch.randn(M, K), [torch.randn(N, K) / max(K, 1) ** 0.5 for _ in range(2)], make(M)
        for a, e in zip(outputs(launch, spec, x, weights, captures, ()), expected(spec, x, weights, captures, ())):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)
