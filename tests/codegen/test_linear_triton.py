"""Generated Triton matrix products in Triton's interpreter against the float64 definition. What runs on a GPU is the same source."""
import functools

import pytest
import torch

pytest.importorskip("triton", reason="the Triton target needs triton")

from tileweld.codegen.triton.linear import emit  # noqa: E402
from tileweld.codegen.triton.linear_text import without_r  # noqa: E402
from tileweld.compiler.errors import UnsupportedError  # noqa: E402
from tileweld.compiler.ir.linear import Spec, reference  # noqa: E402
from tileweld.compiler.ir.parser import parse  # noqa: E402
from tileweld.runtime.interpret import interpreted_entry, interpreting, load_interpreted  # noqa: E402
from tileweld.runtime.tune import split_count  # noqa: E402

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
#: relative to the largest output: fp16 rounds y = prologue(x) and the output, bf16 is computed in fp32 by the interpreter
TOLERANCE = {F32: 3e-6, F16: 2e-3, BF16: 8e-3}
# 1 to 8 rows reach the gemv kernel, up to 64 one block of rows with split K, more several blocks of rows

@functools.cache
def entry(spec, x_dtype, weight_dtypes, capture_dtypes, capture_ranks, num_sizes):
    kernel = emit(spec, x_dtype=x_dtype, weight_dtypes=weight_dtypes, capture_dtypes=capture_dtypes, capture_ranks=capture_ranks, num_sizes=num_sizes)
    return interpreted_entry(kernel.name, kernel.source, kernel.entry)


def launch(spec, x, weights, captures=(), sizes=(), eps=1e-5):
    outs = [x.new_full((x.shape[0], weights[spec.accumulators(o)[0]].shape[0]), 77) for o in range(len(spec.epilogues))]
    run = entry(spec, x.dtype, tuple(w.dtype for w in weights), tuple(c.dtype for c in captures), tuple(c.dim() for c in captures), len(sizes))
    run([*outs, x, *weights, *captures], sizes, (eps,))
    return outs


def check(spec, x, weights, captures=(), sizes=(), eps=1e-5):
    """The outputs after comparing them with the definition."""
    outs = launch(spec, x, weights, captures, sizes, eps)
    expected = reference(x.double(), [w.double() for w in weights], [c.double() if c.is_floating_point() else c for c in captures], sizes, eps, spec)
    for out, wanted in zip(outs, expected, strict=True):
        assert torch.equal(out.isnan(), wanted.isnan())
        scale = wanted[wanted.isfinite()].abs().max().clamp(min=1e-3) if wanted.isfinite().any() else 1.0
        torch.testing.assert_close(out.double() / scale, wanted / scale, rtol=0, atol=TOLERANCE[x.dtype], equal_nan=True)
    return outs


def weight(n, k, dtype=F32):
    return (torch.randn(n, k) / max(k, 1) ** 0.5).to(dtype)


def rotary(w, dim, half, cos=1, sin=2):
    """Half-split rotary of the first 2 half columns of each head of dim."""
    return f"a{w}*c{cos}[i, mod(j, {dim})] + where(mod(j, {dim}) < {half}, -p{w}, p{w})*c{sin}[i, mod(j, {dim})]"


CASES = {
    "plain": (Spec(), 1, lambda m, n, k: ()),
    "bias": (Spec(epilogues=("a0 + c0[j]",)), 1, lambda m, n, k: (torch.randn(n),)),
    "bias and gelu": (Spec(epilogues=("0.5*(a0 + c0[j])*(1 + erf(0.70710678*(a0 + c0[j])))",)), 1, lambda m, n, k: (torch.randn(n),)),
    "residual": (Spec(epilogues=("c0[i, j] + a0",)), 1, lambda m, n, k: (torch.randn(m, n),)),
    "softcap": (Spec(epilogues=("30*tanh(0.1*a0)",)), 1, lambda m, n, k: ()),
    "rms norm": (Spec("rms", "x*r*c0[j]"), 1, lambda m, n, k: (torch.randn(k),)),
    "rms norm without a weight": (Spec("rms", "x*r"), 1, lambda m, n, k: ()),
    "rms norm, 1 + weight": (Spec("rms", "(1 + c0[j])*(x*r)", ("a0 + c1[j]",)), 1, lambda m, n, k: (torch.randn(k), torch.randn(n))),
    "rms norm, not a product": (Spec("rms", "x*r + c0[j]"), 1, lambda m, n, k: (torch.randn(k),)),
    "layer norm": (Spec("layer", "(x - u)*r*c0[j] + c1[j]", ("a0 + c2[j]",)), 1, lambda m, n, k: (torch.randn(k), torch.randn(k), torch.randn(n))),
    "mean alone": (Spec("layer", "x - u"), 1, lambda m, n, k: ()),
    "prologue without a norm": (Spec("", "c0[i, j]*sigmoid(x) + 0.25"), 1, lambda m, n, k: (torch.randn(m, k),)),
    "prologue without x": (Spec("", "c0[j]"), 1, lambda m, n, k: (torch.randn(k),)),
    "gated": (Spec("rms", "x*r*c0[j]", ("a0*sigmoid(a0)*a1",)), 2, lambda m, n, k: (torch.randn(k),)),
    "two outputs of shared weights": (Spec("", "x", ("a0*a1", "a1 + c0[j]"), ((0, 0),) * 2), 2, lambda m, n, k: (torch.randn(n),)),
    "two forms of outputs": (Spec("rms", "x*r", ("a0*a1", "a2"), ((0, 0),) * 2), 3, lambda m, n, k: ()),
    "three accumulators": (Spec("", "x", ("a0*a1 + a2",)), 3, lambda m, n, k: ()),
    "position and size": (Spec("", "x", ("where(j <= i + n0, a0, c0[1])",)), 1, lambda m, n, k: (torch.randn(2),)),
    "boolean and integer captures": (Spec("", "x", ("where(c0[j] != 0, a0*c1[i], 0)",), ((0, 0),), frozenset({0, 1})), 1, lambda m, n, k: (torch.rand(n) < 0.5, torch.arange(m) + 1)),
}


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    spec, count, captures = CASES[name]
    sizes = (3,) if "n0" in "".join(spec.epilogues) else ()
    for rows in (3, 20, 70) if dtype == F32 else (2, 33):
        n, k = 67, 90
        check(spec, torch.randn(rows, k).to(dtype), [weight(n, k, dtype) for _ in range(count)], captures(rows, n, k), sizes)


QKV = {
    "half-split": (rotary(0, 16, 8), rotary(1, 16, 8), (16, 8)),
    "half-split, odd head dim": (rotary(0, 6, 3), rotary(1, 6, 3), (6, 3)),
    "partial": (rotary(0, 16, 4), rotary(1, 16, 4), (16, 4)),
    "partial, odd rest": (rotary(0, 15, 4), rotary(1, 15, 4), (15, 4)),
    "interleaved": tuple(f"a{w}*c1[i, floordiv(mod(j, 16), 2)] + where(mod(j, 2) < 1, -p{w}, p{w})*c2[i, floordiv(mod(j, 16), 2)]" for w in (0, 1)) + ((2, 1),),
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, F32) for name in QKV), ("partial", F16), ("interleaved", F16)])
def test_query_key_value_with_rotary(name, dtype):
    q, k, (block, half) = QKV[name]
    spec = Spec("rms", "x*r*c0[j]", (q, k, "a2"), ((block, half), (block, half), (0, 0)))
    dim = 16 if block == 2 else block
    for rows in (1, 5, 20, 70) if dtype == F32 else (2, 33):
        tables = torch.randn(2, rows, dim)
        # v has a width that no block of columns divides
        check(spec, torch.randn(rows, 90).to(dtype), [weight(6 * dim, 90, dtype), weight(2 * dim, 90, dtype), weight(2 * dim + 5, 90, dtype)], (torch.randn(90), *tables.to(dtype)))


def test_partners_of_products_and_of_a_single_weight():
    spec = Spec("", "x", ("a0*p0 - a1", "p1"), ((4, 2), (4, 2)))
    for rows in (2, 20, 70):
        check(spec, torch.randn(rows, 40), [weight(36, 40), weight(36, 40)])
    for rows in (2, 70):  # pairs of two kinds: loops of their own
        check(Spec("", "x", ("a0 + 2*p0", "a1 - p1"), ((4, 2), (2, 1))), torch.randn(rows, 40), [weight(36, 40), weight(44, 40)])


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 31, 64, 65, 127])
def test_rows(rows):
    spec = Spec("rms", "x*r*c0[j]", ("a0*sigmoid(a0)*a1 + c1[i, j]",))
    check(spec, torch.randn(rows, 64), [weight(48, 64), weight(48, 64)], (torch.randn(64), torch.randn(rows, 48)))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 130), (130, 1), (33, 15), (64, 128), (127, 257)])
def test_sizes(n, k):
    for rows in (4, 20, 70):
        check(Spec("rms", "x*r*c0[j]", ("a0 + c1[j]",)), torch.randn(rows, k), [weight(n, k)], (torch.randn(k), torch.randn(n)))
        check(Spec("layer", "(x - u)*r"), torch.randn(rows, k), [weight(n, k)], eps=1e-2)


def test_no_rows_no_columns_no_depth():
    spec = Spec("rms", "x*r*c0[j]", ("a0 + c1[j]", "a1"), ((0, 0),) * 2)
    assert check_empty(spec, 0, 8, 5) == [(0, 5), (0, 3)]
    for rows in (1, 20, 70):
        assert check_empty(spec, rows, 0, 5) == [(rows, 5), (rows, 3)]  # sums of nothing: 0 plus the bias
        assert check_empty(spec, rows, 8, 0) == [(rows, 0), (rows, 3)]
        out, = launch(Spec("layer", "(x - u)*r"), torch.empty(rows, 0), [torch.empty(4, 0)])
        assert (out == 0).all()


def check_empty(spec, rows, k, n):
    return [tuple(o.shape) for o in check(spec, torch.randn(rows, k), [torch.randn(n, k), torch.randn(3, k)], (torch.randn(k), torch.randn(n)))]


def test_any_strides():
    k, spec = 24, Spec("rms", "x*r*c0[j]", ("a0 + a1 + c1[i, j]",))
    base, other = torch.randn(80, 2 * k), torch.randn(2 * k, 40)
    for rows in (2, 20, 70):
        capture = torch.randn(30, rows).T
        for x in (base[:rows, :k], base[:rows, ::2], base.T[:rows, 3:3 + k] if rows < 48 else base[5:5 + rows, k:], base[:1, :k].expand(rows, k)):
            for weights in ([other[:k, :30].T] * 2, [other[:30, 8:8 + k], other[10:40, 16:40]], [other[:30, :k], other[k:, 10:].T]):
                check(spec, x, weights, (base[0, ::2], capture))


def test_a_row_stays_alone():
    for rows in (6, 33, 70):
        x = torch.randn(rows, 50)
        x[1], x[2, 5], x[3, 7], x[4] = 0, float("nan"), float("inf"), 1e15
        check(Spec("rms", "x*r*c0[j]"), x, [weight(20, 50)], (torch.randn(50),))


def test_fp16_does_not_overflow_before_it_is_normalised():
    """x c0 is up to 4e5, more than fp16 holds; x r c0 is not."""
    for rows in (2, 20, 70):
        x = (2e4 * torch.randn(rows, 64).clamp(-3, 3)).half()
        check(Spec("rms", "x*r*c0[j]"), x, [weight(32, 64, F16)], (torch.full((64,), 20.0),))


def test_mixed_dtypes_are_multiplied_in_fp32():
    for rows in (2, 20, 70):
        spec = Spec("rms", "x*r*c0[j]", ("a0 + c1[j]",))
        check(spec, torch.randn(rows, 40).half(), [weight(20, 40)], (torch.randn(40).half(), torch.randn(20)))
        check(spec, torch.randn(rows, 40).bfloat16(), [weight(20, 40, BF16)], (torch.randn(40).bfloat16(), torch.randn(20)))


def test_offsets_beyond_two_to_the_31():
    """Rows 2^31 elements apart: with 32-bit offsets the second would be read before the first. Pages that are not touched take no memory."""
    far = torch.empty(2**31 + 64, dtype=F16)
    x = far.as_strided((2, 32), (2**31, 1))
    x.copy_(torch.randn(2, 32))
    check(Spec(), x, [weight(20, 32, F16)])
    check(Spec("rms", "x*r*c0[j]"), x, [weight(20, 32, F16)], (torch.randn(32),))
    w = far.as_strided((2, 32), (2**31, 1))
    check(Spec("", "x", ("a0",)), torch.randn(70, 32).half(), [w])


def test_k_is_split_where_programs_are_few_and_the_shares_are_added_in_order(monkeypatch):
    """20 rows, 16 columns, K = 256: 16 tiles of K in 8 shares; without atomics the bits are the same every time."""
    kernel = emit(Spec("rms", "x*r"), x_dtype=F32, weight_dtypes=[F32])
    module = load_interpreted("split", kernel.source)
    counts = []
    monkeypatch.setattr(module, "split_count", lambda *args: counts.append(split_count(*args)) or counts[-1])
    x, w = torch.randn(20, 256), weight(16, 256)
    outs = [torch.empty(20, 16) for _ in range(2)]
    with interpreting():
        for out in outs:
            module.linear([out, x, w], [], [1e-5])
    assert counts == [8, 8] and torch.equal(*outs)


@pytest.mark.parametrize(("prologue", "rest"), [("x*r*c0[j]", "x*c0[j]"), ("c0[j]*(r*x)", "c0[j]*x"), ("x*r/c0[j]", "x/c0[j]"), ("r", "1"), ("x*r + 1", None), ("x*r*r", None),
                                                ("x/r", None), ("tanh(x*r)", None), ("(x*c0[j])*(2*r)", "2*(x*c0[j])")])
def test_when_r_can_wait(prologue, rest):
    found = without_r(parse(prologue))
    assert found == (None if rest is None else parse(rest))


def test_what_has_no_kernel_is_refused():
    for arguments in (dict(x_dtype=torch.float64, weight_dtypes=[torch.float64]), dict(x_dtype=F32, weight_dtypes=[torch.int8]),
                      dict(x_dtype=F32, weight_dtypes=[F32], capture_dtypes=[torch.complex64], capture_ranks=[1])):
        with pytest.raises(UnsupportedError, match="no Triton linear kernel"):
            emit(Spec(), **arguments)
    with pytest.raises(UnsupportedError, match="pairs"):
        emit(Spec("", "x", ("a0 + p0", "p0"), ((4, 2), (2, 1))), x_dtype=F32, weight_dtypes=[F32])
