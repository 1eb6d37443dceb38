"""The C++ attention kernels with wide heads, keys in parts, and values that are a view of the keys, as absorbed multi-head latent attention has them."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tileweld.codegen.cpp.attention import MAX_HEAD_DIM, emit
from tileweld.compiler.errors import UnsupportedError
from tileweld.compiler.ir.attention import Variant, empty_output, integer_captures, reference
from tileweld.compiler.ir.attention_parts import joined
from tileweld.runtime.build import CppUnit, compile_cpp
from tileweld.runtime.launch import CppLauncher

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    key_dims: tuple
    value_dim: int
    score: str = "s*0.1"
    mask: str = "j <= i + n0"
    fill: float = float("-inf")
    sink: str = ""
    empty: str = "nan"
    dtype: torch.dtype = torch.float32
    captures: object = lambda B, H, Tq, Tk: []  # noqa: E731
    queries: int | None = None

    def variant(self):
        return Variant(self.score, self.mask, self.fill, self.sink, self.empty, integer_captures(self.captures(1, 4, 2, 2)))

    def kernel(self):
        captures = self.captures(1, 4, 2, 2)
        return emit(self.variant(), q_dtype=self.dtype, capture_dtypes=[c.dtype for c in captures], capture_ranks=[c.dim() for c in captures],
                    head_dim=sum(self.key_dims), value_dim=self.value_dim, num_sizes=1, key_dims=self.key_dims, queries=self.queries)


def keep(B, H, Tq, Tk):
    kept = torch.rand(B, Tk) > 0.3
    kept[0] = False  # a batch entry that sees nothing
    return [kept]


CASES = {
    "one tensor": Case((576,), 512),
    "parts": Case((512, 64), 512),
    "parts, bfloat16": Case((512, 64), 512, dtype=torch.bfloat16),
    "parts, float16, odd": Case((37, 9), 21, dtype=torch.float16),
    "odd": Case((20, 13), 20),
    "narrow value": Case((288,), 70),
    "three parts": Case((33, 16, 5), 50),
    "largest": Case((MAX_HEAD_DIM,), MAX_HEAD_DIM, queries=3),
    "bias and padding": Case((48, 16), 48, "s*0.1 + c1[h]*(j - i)", "(j <= i + n0) & (c0[b, j] != 0)", captures=lambda B, H, Tq, Tk: [*keep(B, H, Tq, Tk), torch.rand(H)], empty="zero"),
    "finite fill and sink": Case((48, 16), 48, "s*0.1", "(j <= i + n0) & (c0[b, j] != 0)", -1e9, "c1[h]", captures=lambda B, H, Tq, Tk: [*keep(B, H, Tq, Tk), torch.randn(H)]),
    "finite fill": Case((48, 16), 48, "s*0.1", "c0[b, j] != 0", torch.finfo(torch.float32).min, captures=keep),
}


@pytest.fixture(scope="module")
def built():
    kernels = [case.kernel() for case in CASES.values()]
    libraries = compile_cpp([CppUnit.of(kernel) for kernel in kernels])
    return {name: CppLauncher(library, kernel.entry) for name, library, kernel in zip(CASES, libraries, kernels)}


def check(run, case, q, parts, v, captures=None):
    Tq, Tk = q.shape[2], v.shape[2]
    captures = case.captures(q.shape[0], q.shape[1], Tq, Tk) if captures is None else captures
    out = empty_output(q, v.shape[3]).fill_(7)
    run([out, q, *parts, v, *captures], [Tk - Tq])
    expected = reference(q.double(), joined(parts, q.shape[1]).double(), v.double(), captures, [Tk - Tq], case.variant())
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype], equal_nan=True)


def inputs(case, Tq, Tk, batch=2, heads=4, key_heads=None, value_heads=1):
    key_heads = key_heads or [1] * len(case.key_dims)
    q = torch.randn(batch, heads, Tq, sum(case.key_dims)).to(case.dtype)
    return q, [torch.randn(batch, h, Tk, d).to(case.dtype) for h, d in zip(key_heads, case.key_dims)], torch.randn(batch, value_heads, Tk, case.value_dim).to(case.dtype)


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(built, name):
    case = CASES[name]
    for Tq, Tk in ((1, 1), (1, 67), (3, 130)) + (() if case.queries else ((9, 40), (50, 130))):
        check(built[name], case, *inputs(case, Tq, Tk))


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 16, 40, 128])
@pytest.mark.parametrize("Tq", [1, 2, 8])
def test_any_number_of_heads_on_one_key(built, heads, Tq):
    """Fewer rows than a tile, whole tiles, rests, and more than share a reading."""
    check(built["odd"], CASES["odd"], *inputs(CASES["odd"], Tq, 70, 1, heads))


@pytest.mark.parametrize("heads", [(1, 12, 1), (12, 1, 1), (4, 6, 2), (3, 3, 4), (2, 4, 12)])
@pytest.mark.parametrize("Tq", [1, 30])
def test_parts_with_heads_of_their_own(built, heads, Tq):
    check(built["odd"], CASES["odd"], *inputs(CASES["odd"], Tq, 70, 2, 12, heads[:2], heads[2]))


@pytest.mark.parametrize("name", ["one tensor", "parts", "parts, bfloat16", "parts, float16, odd", "odd"])
@pytest.mark.parametrize("Tq", [1, 20])
def test_values_that_are_a_view_of_the_keys(built, name, Tq):
    case = CASES[name]
    q, parts, _ = inputs(case, Tq, 150)
    check(built[name], case, q, parts, parts[0][..., :case.value_dim])
    check(built[name], case, q, parts, parts[0].flip(2)[..., :case.value_dim])  # other rows: not the keys
    cache = torch.randn(2, 1, 150, 2 * parts[0].shape[3]).to(case.dtype)  # rows apart in memory
    check(built[name], case, q, [cache[..., :parts[0].shape[3]], *parts[1:]], cache[..., :case.value_dim])
    check(built[name], case, q, [cache[..., :parts[0].shape[3]], *parts[1:]], cache[..., 3:3 + case.value_dim])


@pytest.mark.parametrize("name", ["parts", "parts, float16, odd"])
@pytest.mark.parametrize("Tq", [2, 20])
def test_strides(built, name, Tq):
    case = CASES[name]
    q, parts, v = inputs(case, Tq, 70, 2, 4, [4] * len(case.key_dims), 4)
    for layout in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: torch.randn(*x.shape[:3], 2 * x.shape[3]).to(x.dtype)[..., ::2], lambda x: x[:, :1].expand(x.shape),
                   lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)):
        check(built[name], case, q, [layout(x) for x in parts], layout(v))
        check(built[name], case, layout(q), [parts[0], *(layout(x) for x in parts[1:])], v)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_long_caches_over_any_number_of_threads(built, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in ("odd", "finite fill and sink"):
            check(built[name], CASES[name], *inputs(CASES[name], 1, 3001, 2, 16))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("Tq", [1, 6, 40])
def test_special_values_reach_their_rows_alone(built, value, Tq):
    for which, position in (("q", 0), ("a", 30), ("b", 5), ("v", 0)):
        q, parts, v = inputs(CASES["odd"], Tq, 50, 2, 5)
        {"q": q, "a": parts[0], "b": parts[1], "v": v}[which][0, 0, position, 2] = value
        check(built["odd"], CASES["odd"], q, parts, v)


def test_nothing_to_see(built):
    for shape in ((2, 3, 0), (0, 3, 5), (2, 0, 5)):
        q, parts, v = torch.randn(shape[0], 4, shape[1], 33), [torch.randn(shape[0], 1, shape[2], d) for d in (20, 13)], torch.randn(shape[0], 1, shape[2], 20)
        check(built["odd"], CASES["odd"], q, parts, v)


def test_refusals():
    for options, words in (({"head_dim": MAX_HEAD_DIM + 1}, "head dim"), ({"value_dim": MAX_HEAD_DIM + 1}, "value dim"), ({"key_dims": (4, 5)}, "parts"), ({"key_dims": (8, 0)}, "parts")):
        with pytest.raises(UnsupportedError, match=words):
            emit(Variant(), **{"q_dtype": torch.float32, "head_dim": 8, "value_dim": 8} | options)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(1, 70), min_size=1, max_size=3), st.integers(1, 90), st.integers(1, 20), st.integers(1, 90), st.sampled_from([1, 2, 3, 6, 12]), st.integers(0, 2**31),
       st.sampled_from([torch.float32, torch.bfloat16]))
def test_random_sizes(dims, value_dim, Tq, Tk, heads, seed, dtype):
    torch.manual_seed(seed)
    case = Case(tuple(dims), value_dim, mask="True", dtype=dtype, queries=Tq)
    kernel = case.kernel()
    [library] = compile_cpp([CppUnit.of(kernel)])
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    chosen = [divisors[int(torch.randint(0, len(divisors), ()))] for _ in range(len(dims) + 1)]
    check(CppLauncher(library, kernel.entry), case, *inputs(case, Tq, Tk, 2, heads, chosen[:-1], chosen[-1]))
