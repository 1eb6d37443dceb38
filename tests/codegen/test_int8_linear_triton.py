"""Generated Triton products with int8 weights in Triton's interpreter against the definition; sums of integers bit by bit."""
import functools
import math

import pytest
import torch

pytest.importorskip("triton", reason="the Triton target needs triton")

from tileweld.codegen.triton.int8_linear import emit  # noqa: E402
from tileweld.compiler.errors import UnsupportedError  # noqa: E402
from tileweld.compiler.ir.int8_linear import quantized, reference  # noqa: E402
from tileweld.compiler.ir.linear import Spec  # noqa: E402
from tileweld.runtime.interpret import interpreted_entry, interpreting, load_interpreted  # noqa: E402

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INF = math.inf
#: relative to the largest output; half types round y = prologue(x) for the products that are not int8, and the output
TOLERANCE = {F32: 3e-6, F16: 2e-3, BF16: 8e-3}
WAYS = [("float", INF), ("int8", INF), ("mixed", 2.0)]
ROWS = (3, 20, 70)  # gemv or one block of rows; one block, split K; several blocks


@functools.cache
def entry(spec, dtype, captures, activation, groups, columns, k, sizes=0):
    kernel = emit(spec, x_dtype=dtype, capture_dtypes=[d for d, _ in captures], capture_ranks=[r for _, r in captures], activation=activation, groups=groups, has_columns=columns, k=k, num_sizes=sizes)
    return interpreted_entry(kernel.name, kernel.source, kernel.entry)


def launch(spec, x, weights, captures=(), activation="float", threshold=INF, columns=None, eps=1e-5):
    """weights: (q, scale) of each"""
    outs = [x.new_full((x.shape[0], weights[spec.accumulators(o)[0]][0].shape[0]), 77) for o in range(len(spec.epilogues))]
    run = entry(spec, x.dtype, tuple((c.dtype, c.dim()) for c in captures), activation, tuple(s.shape[1] for _, s in weights), columns is not None, x.shape[1])
    run([*outs, x, *(q for q, _ in weights), *(s for _, s in weights), *captures, *([columns] if columns is not None else [])], [], (eps, threshold))
    return outs


def check(spec, x, weights, captures=(), activation="float", threshold=INF, columns=None):
    outs = launch(spec, x, weights, captures, activation, threshold, columns)
    wide = x.float() if activation != "float" else x.double()  # what is rounded to int8 is computed in float32 by both
    expected = reference(wide, [q for q, _ in weights], [s for _, s in weights], [c.to(wide.dtype) if c.is_floating_point() else c for c in captures], [], 1e-5, spec, activation, threshold, columns)
    for out, e in zip(outs, expected, strict=True):
        assert torch.equal(out.isnan(), e.isnan()), (out.isnan().sum(), e.isnan().sum())
        scale = e.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-6) if e.numel() else torch.tensor(1.0)
        torch.testing.assert_close(out.double() / scale, e.double() / scale, rtol=0, atol=TOLERANCE[x.dtype], equal_nan=True)
    return outs


def weight(n, k, group=0):
    return quantized(torch.randn(n, k) / math.sqrt(max(k, 1)), group)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("activation", "threshold"), WAYS)
def test_gated_mlp_behind_a_norm(activation, threshold, dtype):
    spec = Spec("rms", "x*r*c0[j]", ("a0*sigmoid(a0)*a1 + c1[i, j]",))
    for rows in ROWS:
        x = torch.randn(rows, 96).to(dtype)
        if dtype == F32 or activation == "float":  # elsewhere a half's rounding of y decides which neighbour it goes to
            check(spec, x, [weight(48, 96), weight(48, 96)], (torch.randn(96).to(dtype), torch.randn(rows, 48).to(dtype)), activation, threshold)
        else:
            check(Spec("", "x", ("a0 + c0[j]",)), x, [weight(48, 96)], (torch.randn(48).to(dtype),), activation, threshold)


@pytest.mark.parametrize(("activation", "threshold"), WAYS)
def test_qkv_with_rotary(activation, threshold):
    rotary = "a{0}*c1[i, mod(j, 16)] + where(mod(j, 16) < 8, -p{0}, p{0})*c2[i, mod(j, 16)]"
    spec = Spec("layer", "(x - u)*r*c0[j]", (rotary.format(0), rotary.format(1), "a2"), ((16, 8), (16, 8), (0, 0)))
    for rows in ROWS:
        check(spec, torch.randn(rows, 90), [weight(64, 90), weight(32, 90), weight(37, 90)], (torch.randn(90), *torch.randn(2, rows, 16)), activation, threshold)


@pytest.mark.parametrize("rows", [1, 7, 9, 33, 65, 130])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 3), (33, 130), (127, 257)])
def test_integer_sums_are_exact(rows, n, k):
    """Rows whose largest element is 127 have the scale 1, and weights with the scale 1: the result is the sum in int64, bit by bit."""
    x, q = torch.randint(-127, 128, (rows, k)), torch.randint(-127, 128, (n, k), dtype=torch.int8)
    x[:, 0] = 127
    out, = launch(Spec(), x.float(), [(q, torch.ones(n, 1))], activation="int8")
    assert torch.equal(out.long(), x @ q.long().T)


def test_the_largest_sums():
    """127 * 127 * 8192 is 1.3e8: beyond the integers that float32 holds, exact in int32 until it is scaled."""
    k = 8192
    x, q = torch.full((17, k), 127.0), torch.full((16, k), 127, dtype=torch.int8)
    q[:, 0] = 126
    out, = launch(Spec(), x, [(q, torch.ones(16, 1))], activation="int8")
    assert (out == float(torch.tensor(127 * 127 * k - 127, dtype=torch.int64).float())).all()


ROTARY = "a{0}*c1[i, mod(j, 16)] + where(mod(j, 16) < 8, -p{0}, p{0})*c2[i, mod(j, 16)]"
SPLIT = [(Spec("rms", "x*r*c0[j]", ("a0*sigmoid(a0)*a1 + c1[i, 3]",)), (48, 48)), (Spec("rms", "x*r*c0[j]", (ROTARY.format(0), ROTARY.format(1), "a2"), ((16, 8), (16, 8), (0, 0))), (32, 16, 37))]


@pytest.mark.parametrize(("spec", "widths"), SPLIT)
@pytest.mark.parametrize(("activation", "threshold"), WAYS[1:])
def test_shares_of_k(activation, threshold, spec, widths):
    """Any number of shares, empty ones too: sums of integers are the same bits as in one, those of floats (rows that are not finite, outliers) the same up to their order."""
    made = emit(spec, x_dtype=F32, capture_dtypes=[F32] * 3, capture_ranks=[1, 2, 2], activation=activation, groups=(1,) * len(widths), k=300)
    module = load_interpreted(made.name, made.source)
    for rows, k in ((20, 150), (70, 70), (2, 20)):
        x, weights, captures = torch.randn(rows, k), [weight(n, k) for n in widths], (torch.randn(k), *torch.randn(2, rows, 16))
        x[1, 7] = INF
        results = []
        for count in (1, 3):
            asked = []
            module.split_count = lambda *sizes, count=count, asked=asked: asked.append(sizes) or count
            outs = [torch.full((rows, widths[spec.accumulators(o)[0]]), 77.0) for o in range(len(spec.epilogues))]
            with interpreting():
                module.linear([*outs, x, *(q for q, _ in weights), *(s for _, s in weights), *captures], [], [1e-5, threshold])
            assert len(asked) == 1 and not any((out == 77).any() for out in outs)
            results.append(torch.cat(outs, 1))
        whole, *split = results
        assert whole[1].isnan().any() and whole[0].isfinite().all()
        finite = torch.arange(rows) != 1
        for result in split:
            if activation == "int8":
                assert torch.equal(result[finite], whole[finite])
            torch.testing.assert_close(result, whole, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("columns", [False, True])
def test_threshold_at_the_ends(columns):
    """inf is W8A8, 0 the dequantised weights; given columns decide alone."""
    for rows in ROWS:
        x, w = torch.randn(rows, 70) * 3, [weight(20, 70)]
        none, every = (torch.full((70,), marked) if columns else None for marked in (False, True))
        torch.testing.assert_close(launch(Spec(), x, w, activation="mixed", threshold=INF, columns=none), launch(Spec(), x, w, activation="int8"), rtol=0, atol=0)
        torch.testing.assert_close(launch(Spec(), x, w, activation="mixed", threshold=0.0, columns=every), launch(Spec(), x, w, activation="float"), rtol=1e-5, atol=1e-5)


def test_outliers_of_any_row_and_given_ones():
    for rows in ROWS:
        x = torch.randn(rows, 100).clamp(-3, 3)
        x[1, 3], x[2, 77] = 40.0, -9.0
        given = torch.zeros(100, dtype=torch.bool)
        given[[3, 50]] = True
        check(Spec("", "x", ("a0 + c0[j]",)), x, [weight(24, 100)], (torch.randn(24),), "mixed", 6.0)
        check(Spec("", "x", ("a0 + c0[j]",)), x, [weight(24, 100)], (torch.randn(24),), "mixed", 6.0, given)
        check(Spec("rms", "x*r*c0[j]"), x, [weight(24, 100)], (torch.randn(100),), "mixed", 2.5)


@pytest.mark.parametrize(("activation", "threshold"), WAYS)
def test_zero_rows_constant_rows_and_rows_that_are_not_finite(activation, threshold):
    for rows in (8, 33, 70):
        x = torch.randn(rows, 50)
        x[1], x[2], x[3, 7], x[4, 5], x[5, 2:4] = 0, 1.5, INF, math.nan, torch.tensor([INF, -INF])
        w = weight(20, 50)
        w[0][4] = 0  # a weight of zeros: inf times it is NaN, as in floats
        out, = check(Spec(), x, [w], (), activation, threshold)
        assert (out[1] == 0).all() and out[3].isnan().any() and not out[[0, 2, 6, 7]].isnan().any()


@pytest.mark.parametrize(("k", "group"), [(128, 64), (256, 128), (96, 48), (64, 16)])
def test_groups(k, group):
    for rows in ROWS:
        for dtype in (F32, BF16):
            check(Spec("rms", "x*r*c0[j]", ("a0*a1",)), torch.randn(rows, k).to(dtype), [weight(40, k, group), weight(40, k, group)], (torch.randn(k).to(dtype),))


def test_no_rows_no_columns_no_depth():
    for activation, threshold in WAYS:
        assert [tuple(o.shape) for o in check(Spec(), torch.randn(0, 8), [weight(5, 8)], (), activation, threshold)] == [(0, 5)]
        for rows in (2, 20, 70):
            assert (check(Spec("", "x", ("a0 + c0[j]",)), torch.empty(rows, 0), [weight(5, 0)], (torch.ones(5),), activation, threshold)[0] == 1).all()


def test_any_strides():
    base = torch.randn(80, 64)
    for activation, threshold in WAYS:
        for x in (base[:20, ::2], base.T[:20, 3:35], base[:1, :32].expand(9, 32)):
            q, s = weight(40, 64)
            check(Spec(), x, [(q[:, ::2], s.expand(40, 3)[:, :1])], (), activation, threshold)


def test_what_has_no_kernel_is_refused():
    for wrong, message in ((dict(x_dtype=torch.float64), "torch.float64|float64"), (dict(groups=[2, 4], k=64), "scales of"), (dict(groups=[8], k=64), "groups of K"), (dict(groups=[2]), "groups of K"),
                           (dict(activation="int4"), "int4"), (dict(activation="int8", k=133_145), "overflows")):
        with pytest.raises(UnsupportedError, match=message):
            emit(Spec(), **{"x_dtype": F32, **wrong})
