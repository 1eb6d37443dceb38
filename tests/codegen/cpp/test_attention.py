"""The generated C++ attention kernels against the definition in float64. All kernels of the file are built at once, in parallel."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tileweld.codegen.cpp.attention import emit
from tileweld.compiler.errors import UnsupportedError
from tileweld.compiler.ir.attention import Variant, empty_output, integer_captures, reference
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher

FLOAT_MIN = torch.finfo(torch.float32).min
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # outputs are of order 1: the last digit of the dtype
SHAPES = ((1, 1), (1, 130), (3, 300), (17, 17), (127, 127), (150, 333))  # Tq, Tk: streamed, packed; whole and partial panels


def no_captures(B, H, Tq, Tk):
    return []


@dataclasses.dataclass(frozen=True)
class Case:
    score: str = "s*0.25"
    mask: str = "True"
    captures: object = no_captures  # of B, H, Tq, Tk
    sizes: object = lambda Tq, Tk: []
    fill: float = float("-inf")
    sink: str = ""
    empty: str = "nan"
    dtype: torch.dtype = torch.float32
    dims: tuple = (16, 16)
    tolerance: float = 0.0

    def variant(self):
        return Variant(self.score, self.mask, self.fill, self.sink, self.empty, integer_captures(self.captures(1, 4, 2, 2)))

    def kernel(self, **known):
        captures = self.captures(1, 4, 2, 2)
        return emit(self.variant(), q_dtype=self.dtype, capture_dtypes=[c.dtype for c in captures], capture_ranks=[c.dim() for c in captures],
                    head_dim=self.dims[0], value_dim=self.dims[1], num_sizes=len(self.sizes(2, 2)), **known)


def padding(B, H, Tq, Tk):
    keep = torch.rand(B, Tk) > 0.4
    keep[0, : Tk // 2] = False  # left padding: rows under a causal mask that see no key
    return [keep]


def documents(B, H, Tq, Tk):
    return [torch.arange(Tk).div(9, rounding_mode="floor").expand(B, Tk) + torch.arange(B)[:, None]]


OFFSET = {"sizes": lambda Tq, Tk: [Tk - Tq]}
CASES = {
    "none": Case(),
    "causal": Case(mask="j <= i"),
    "causal, offset": Case(mask="j <= i + n0", **OFFSET),
    "causal, zero rows": Case(mask="j < i", empty="zero"),
    "window": Case(mask="(j <= i + n0) & (i + n0 - j < 20)", **OFFSET),
    "window and global": Case(mask="(j <= i + n0) & ((i + n0 - j < 20) | (j < 4))", **OFFSET),
    "dilated": Case(mask="((i + n0 - j) % n1 == 0) & (j <= i + n0)", sizes=lambda Tq, Tk: [Tk - Tq, 3]),
    "a mask by head": Case(mask="(h % 2 == 0) | (i + n0 - j < 33*h)", empty="zero", **OFFSET),
    "sizes beyond int32": Case(mask="j - i < n0", score="s*0.25 + where(i*j + n0 > n0, 1, 0)", sizes=lambda Tq, Tk: [2**40]),
    "padding": Case(mask="c0[b, j] != 0", captures=padding),
    "documents": Case(mask="(c0[b, j] == c0[b, i]) & (j <= i + n0)", captures=documents, **OFFSET),
    "blocks": Case(mask="c0[i//8, j//8] != 0", captures=lambda B, H, Tq, Tk: [(torch.rand(Tq // 8 + 1, Tk // 8 + 1) > 0.6).int()], empty="zero"),
    "dense bias": Case(score="s*0.25 + c0[b, h, i, j]", captures=lambda B, H, Tq, Tk: [torch.randn(B, H, Tk, Tq).transpose(2, 3)]),
    "biases of 16 bits": Case(score="s*0.25 + c0[0, h, i, j] - c1[i, j]", captures=lambda B, H, Tq, Tk: [torch.randn(1, H, Tq, Tk).bfloat16(), torch.randn(Tq, Tk).half()]),
    "additive mask": Case(score="s*0.25 + c0[b, 0, i, j]", captures=lambda B, H, Tq, Tk: [torch.where(torch.rand(B, 1, Tq, Tk) > 0.9, 0.0, FLOAT_MIN)]),
    "alibi": Case(score="s*0.25 + c0[h]*(j - i)", mask="j <= i + n0", captures=lambda B, H, Tq, Tk: [torch.rand(H) / 10], **OFFSET),
    "t5": Case(score="s + c0[c1[j - i + n0], h]", captures=lambda B, H, Tq, Tk: [torch.randn(32, H), torch.randint(0, 32, (Tq + Tk,))], sizes=lambda Tq, Tk: [Tq]),
    "indices that count from the end": Case(score="s*0.25 + c0[j - i] + c1[-1, h]", captures=lambda B, H, Tq, Tk: [torch.randn(Tq + Tk), torch.randn(2, H).double()]),
    "softcap": Case(score="20*tanh(0.0125*s)", mask="(j <= i + n0) & (i + n0 - j < 50)", **OFFSET),
    "softcap, full": Case(score="5*tanh(0.2*s)"),
    "many functions": Case(score="sigmoid(s)*c0 + exp(-abs(s)) + where(s > 0, sqrt(abs(s)), log(1 + s*s)) - max(s, 0)/min(-1, s) + erf(s) + sin(s)*cos(b + s)",
                           captures=lambda B, H, Tq, Tk: [torch.tensor(0.7)]),
    "sink": Case(mask="j <= i + n0", sink="c0[h]", captures=lambda B, H, Tq, Tk: [torch.randn(H) * 3], **OFFSET),
    "softmax plus one": Case(sink="0", mask="j < i"),
    "no sink": Case(sink="-inf", mask="j < i", empty="zero"),
    "causal padding": Case(mask="(j <= i + n0) & (c0[b, j] != 0)", captures=padding, **OFFSET),
    "causal padding, zero": Case(mask="(j <= i + n0) & (c0[b, j] != 0)", captures=padding, empty="zero", **OFFSET),
    "causal padding, -1e9": Case(mask="(j <= i + n0) & (c0[b, j] != 0)", captures=padding, fill=-1e9, **OFFSET),
    "causal padding, finfo.min": Case(mask="(j <= i + n0) & (c0[b, j] != 0)", captures=padding, fill=FLOAT_MIN, **OFFSET),
    "causal padding, finfo.min and sink": Case(mask="(j <= i + n0) & (c0[b, j] != 0)", captures=padding, fill=FLOAT_MIN, sink="c0[b, 0] - 1", **OFFSET),
    "a fill among the scores": Case(mask="(j <= i + n0) & (c0[b, j] != 0)", captures=padding, fill=-3.0, **OFFSET),
    "scores down at the fill": Case(score="s - 1990", mask="c0[b, j] != 0", captures=padding, fill=-2000.0, tolerance=1e-3),  # an ulp of 1990 is 1.2e-4
    "scores of -inf": Case(score="where(j < 3, -inf, s)", mask="j <= i"),
    **{f"head dim {d}/{e}": Case(mask="j <= i + n0", score="s*0.1", dims=(d, e), **OFFSET) for d, e in ((1, 1), (33, 20), (80, 80), (96, 64), (192, 128), (256, 256))},
    **{f"{str(dtype)[6:]} {d}": Case(mask="j <= i + n0", score="s*0.1", dims=(d, d), dtype=dtype, **OFFSET) for dtype in (torch.float16, torch.bfloat16) for d in (64, 72)},
}


def launchers(kernels):
    libraries = compile_cpp([CppUnit.of(kernel) for kernel in kernels])
    return [CppLauncher(library, kernel.entry) for library, kernel in zip(libraries, kernels)]


@pytest.fixture(scope="module")
def built():
    return dict(zip(CASES, launchers([case.kernel() for case in CASES.values()])))


def check(run, case, q, k, v, captures, sizes):
    out = empty_output(q, v.shape[3])
    run([out, q, k, v, *captures], sizes)
    expected = reference(q.double(), k.double(), v.double(), captures, sizes, case.variant())
    tolerance = case.tolerance or TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance, equal_nan=True)
    return out


def inputs(case, Tq, Tk, batch=2, heads=4, key_heads=2, value_heads=2):
    d, e = case.dims
    shapes = ((batch, heads, Tq, d), (batch, key_heads, Tk, d), (batch, value_heads, Tk, e))
    return [torch.randn(shape).to(case.dtype) for shape in shapes] + [case.captures(batch, heads, Tq, Tk), case.sizes(Tq, Tk)]


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(built, name):
    for Tq, Tk in SHAPES:
        check(built[name], CASES[name], *inputs(CASES[name], Tq, Tk))


@pytest.mark.parametrize("name", ["causal", "window", "causal padding, finfo.min"])
def test_long(built, name):
    check(built[name], CASES[name], *inputs(CASES[name], 1023, 1023, 1, 2, 1, 1))
    check(built[name], CASES[name], *inputs(CASES[name], 2, 5001, 1, 2, 1, 1))  # several spans, split over threads


def test_kernels_for_known_queries():
    names = ("causal, offset", "padding", "dense bias")
    kernels = {(name, Tq): CASES[name].kernel(queries=Tq) for name in names for Tq in (1, 8, 9, 70)}
    runs = dict(zip(kernels, launchers(list(kernels.values()))))
    for (name, Tq), run in runs.items():
        check(run, CASES[name], *inputs(CASES[name], Tq, 70))
    sources = {Tq: kernels["padding", Tq].source for Tq in (1, 8, 9, 70)}
    assert sources[1] == sources[8] != sources[9] == sources[70]


@pytest.mark.parametrize("heads", [(4, 4, 4), (6, 1, 1), (6, 2, 3), (12, 4, 2), (40, 1, 1), (3, 3, 1)])
def test_head_groups(built, heads):
    for Tq in (1, 5, 40):
        check(built["causal, offset"], CASES["causal, offset"], *inputs(CASES["causal, offset"], Tq, 70, 2, *heads))


@pytest.mark.parametrize("name", ["none", "float16 64", "head dim 33/20"])
@pytest.mark.parametrize("Tq", [2, 70])
def test_strides(built, name, Tq):
    case = CASES[name]
    q, k, v, captures, sizes = inputs(case, Tq, 70)
    by_position = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    every_other = [torch.randn(*x.shape[:3], 2 * x.shape[3]).to(x.dtype)[..., ::2] for x in (q, k, v)]
    expanded = [q[:, :1].expand(q.shape), k[:1, :1].expand(k.shape), v[:, :, :1].expand(v.shape)]
    for tensors in (by_position, every_other, expanded, [q.flip(2)[:, :, ::1], *by_position[1:]]):
        check(built[name], case, *tensors, captures, sizes)


def test_output_of_any_layout(built):
    q, k, v, captures, sizes = inputs(CASES["none"], 9, 9)
    out = torch.empty(16, 9, 4, 2).permute(3, 2, 1, 0)
    built["none"]([out, q, k, v])
    torch.testing.assert_close(out.double(), reference(q.double(), k.double(), v.double(), [], [], CASES["none"].variant()), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("Tq", [2, 50])
def test_nothing_to_see(built, Tq):
    case = CASES["none"]
    for shape in ((2, Tq, 0), (0, Tq, 5), (2, 0, 5)):
        q, k, v = torch.randn(shape[0], 4, shape[1], 16), torch.randn(shape[0], 2, shape[2], 16), torch.randn(shape[0], 2, shape[2], 16)
        out = torch.full((shape[0], 4, shape[1], 16), 7.0)
        built["none"]([out, q, k, v])
        assert torch.equal(out, reference(q, k, v, [], [], case.variant()))


@pytest.mark.parametrize("name", ["none", "causal", "softcap, full", "sink"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("Tq", [7, 90])
def test_special_values(built, name, value, Tq):
    case = CASES[name]
    for which, position in (("q", 3), ("k", 5), ("k", 0), ("v", 0)):
        q, k, v, captures, sizes = inputs(case, Tq, Tq)
        {"q": q, "k": k, "v": v}[which][0, 1, position, 2] = value
        check(built[name], case, q, k, v, captures, sizes)


@pytest.mark.parametrize("sink", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("Tq", [2, 50])
def test_special_sinks(built, sink, Tq):
    q, k, v, (c0,), sizes = inputs(CASES["sink"], Tq, 50)
    c0[1] = sink
    check(built["sink"], CASES["sink"], q, k, v, [c0], sizes)


def test_a_hidden_nan_key_does_not_reach_the_row(built):
    q, k, v, _, _ = inputs(CASES["causal"], 50, 50)
    k[:, :, 20] = float("nan")
    out = check(built["causal"], CASES["causal"], q, k, v, [], [])
    assert out[:, :, :20].isfinite().all() and out[:, :, 20:].isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(built, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for Tq, Tk in ((1, 3000), (100, 100)):
            check(built["causal padding, finfo.min"], CASES["causal padding, finfo.min"], *inputs(CASES["causal padding, finfo.min"], Tq, Tk, 1, 2, 1, 1))
    finally:
        torch.set_num_threads(before)


def test_refusals():
    for options in ({"q_dtype": torch.float64}, {"head_dim": 1025}, {"value_dim": 0}, {"capture_dtypes": [torch.complex64], "capture_ranks": [1]}):
        with pytest.raises(UnsupportedError):
            emit(Variant(), **{"q_dtype": torch.float32, "head_dim": 8, "value_dim": 8} | options)
    with pytest.raises(UnsupportedError, match="2 indices"):
        emit(Variant("s + c0[b, j]"), q_dtype=torch.float32, capture_dtypes=[torch.float32], capture_ranks=[3], head_dim=8, value_dim=8)


def test_the_source_says_what_it_is():
    source = CASES["softcap"].kernel().source
    head = "\n".join(source.splitlines()[:6])
    assert "20*tanh(0.0125*s)" in head and "i + n0 - j < 50" in head and "head dim 16" in head
    assert "#include <torch" not in source and "#include <ATen" not in source


# ---- random variants


def _integers():
    leaf = st.sampled_from(["i", "j", "h", "b", "Tq", "Tk", "n0", "3", "c1[j]", "c1[i]"])
    pair = lambda x: st.one_of(st.tuples(x, st.sampled_from("+-"), x).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),  # noqa: E731
                               st.tuples(x, st.sampled_from(["//", "%"]), st.sampled_from("234")).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
                               st.tuples(st.sampled_from(["min", "max"]), x, x).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"))
    return st.recursive(leaf, pair, max_leaves=4)


def _masks():
    comparison = st.tuples(_integers(), st.sampled_from(["<", "<=", "==", "!=", ">", ">="]), _integers()).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
    return st.recursive(comparison, lambda x: st.one_of(st.tuples(x, st.sampled_from("&|"), x).map(lambda t: f"({t[0]} {t[1]} {t[2]})"), x.map(lambda t: f"~{t}")), max_leaves=4)


def _scores():
    leaf = st.one_of(st.sampled_from(["s", "s", "0.5", "c0[b, h, j]", "c0[b, h, i]", "c0[b, 0, i - j]"]), _integers().map(lambda t: f"0.125*({t})"))
    combine = lambda x: st.one_of(st.tuples(x, st.sampled_from("+-*"), x).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),  # noqa: E731
                                  st.tuples(st.sampled_from(["tanh", "sigmoid", "sin", "relu", "floor", "erf", "abs"]), x).map(lambda t: f"{t[0]}({t[1]})"),
                                  st.tuples(_masks(), x, x).map(lambda t: f"where({t[0]}, {t[1]}, {t[2]})"))
    return st.recursive(leaf, combine, max_leaves=5).map(lambda t: f"8*tanh(0.25*s + 0.01*({t}))")  # bounded, so that fp32 can be compared with float64


@settings(max_examples=2, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.builds(Case, score=_scores(), mask=_masks(), empty=st.sampled_from(["nan", "zero"]), fill=st.sampled_from([float("-inf"), -1e9])), min_size=4, max_size=4))
def test_random_variants(cases):
    captures = lambda B, H, Tq, Tk: [torch.rand(B, H, 64), torch.randint(-3, 9, (64,))]  # noqa: E731
    cases = [dataclasses.replace(case, captures=captures, sizes=lambda Tq, Tk: [5], tolerance=1e-3) for case in cases]
    for run, case in zip(launchers([case.kernel() for case in cases]), cases):
        for Tq, Tk in ((2, 64), (61, 50)):
            check(run, case, *inputs(case, Tq, Tk))
