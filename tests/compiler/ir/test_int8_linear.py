"""tileweld::int8_linear: the definition against int64 and float64 arithmetic, its limits, hostile values, opcheck."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tileweld.compiler.errors import RefusalError
from tileweld.compiler.ir.int8_linear import ACTIVATIONS, MOST_K, accumulators, dequantized, quantized

T = torch.ops.tileweld
F64 = torch.float64


def weight(n, k, group=0):
    return T.quantize_rows(torch.randn(n, k), group)


def call(x, q, s, activation, threshold=math.inf, columns=None, epilogue="a0", captures=(), norm="", prologue="x"):
    return T.int8_linear(x, [q], [s], list(captures), [], norm, 1e-6, prologue, [epilogue], [0, 0], activation, threshold, columns)[0]


def int64(x, q, s):
    """W8A8 in Python's way: the row scales in float32, the sum in int64."""
    rows = x.abs().amax(1, keepdim=True) / 127
    t = torch.where(rows > 0, x / rows, 0).round().long()
    return (t[:, None] * q.long()[None]).sum(-1), rows


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31))
def test_sums_are_those_of_int64(m, k, n, seed):
    torch.manual_seed(seed)
    x, (q, s) = torch.randn(m, k) * 10 ** torch.randint(-6, 6, (m, 1)), weight(n, k)
    sums, rows = int64(x, q, s)
    assert torch.equal(call(x, q, s, "int8"), sums.float() * rows * s.T)


def test_the_largest_k_is_exact_and_one_more_is_refused():
    q, s, x = torch.full((1, MOST_K), 127, dtype=torch.int8), torch.ones(1, 1), torch.full((1, MOST_K), 127.0)
    assert 127 * 127 * MOST_K < 2**31 <= 127 * 127 * (MOST_K + 1)
    assert call(x, q, s, "int8").item() == float(torch.tensor(127.0 * 127.0 * MOST_K))
    with pytest.raises(RuntimeError, match="overflows"):
        call(torch.ones(1, MOST_K + 1), torch.ones(1, MOST_K + 1, dtype=torch.int8), s, "int8")
    assert call(torch.ones(1, MOST_K + 1), torch.ones(1, MOST_K + 1, dtype=torch.int8), s, "float").item() == MOST_K + 1


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([torch.float32, torch.float16, torch.bfloat16, F64]), st.sampled_from([0, 2, 4]), st.integers(0, 2**31))
def test_quantised_weights_are_within_half_a_step(n, blocks, dtype, group, seed):
    torch.manual_seed(seed)
    w = (torch.randn(n, 4 * blocks) * 10.0 ** torch.randint(-4, 4, (n, 1))).to(dtype)
    w[torch.rand(n) < 0.3] = 0
    q, s = T.quantize_rows(w, group)
    assert q.dtype == torch.int8 and s.dtype == torch.float32 and s.shape == (n, 4 * blocks // group if group else 1) and q.abs().max() <= 127
    steps = s.double().repeat_interleave(4 * blocks // s.shape[1], 1)
    assert ((w.double() - q.double() * steps).abs() <= steps * 0.5 * (1 + 1e-4)).all()
    assert torch.equal(T.dequantize_rows(q, s, F64, "float", math.inf, None), q.double() * steps)


def test_thresholds_at_their_ends():
    x, (q, s) = torch.randn(5, 33), weight(7, 33)
    assert torch.equal(call(x, q, s, "mixed", math.inf), call(x, q, s, "int8"))
    assert torch.equal(call(x, q, s, "mixed", 0.0), call(x, q, s, "float"))
    nothing, everything = torch.zeros(33, dtype=torch.bool), torch.ones(33, dtype=torch.bool)
    assert torch.equal(call(x, q, s, "mixed", 0.0, nothing), call(x, q, s, "int8"))
    assert torch.equal(call(x, q, s, "mixed", math.inf, everything), call(x, q, s, "float"))
    x[2, 4] = math.inf  # infinite elements flag no column: the other rows stay what they are
    assert torch.equal(call(x, q, s, "mixed", math.inf), call(x, q, s, "int8"))


def test_outlier_columns_are_exact_and_leave_the_row_maximum():
    x, (q, s) = torch.randn(4, 64), weight(8, 64)
    x[1, 9] = 800.0
    w, exact = q.double() * s.double(), x.double() @ (q.double() * s.double()).T
    kept = x.clone()
    kept[:, 9] = 0
    expected = int64(kept, q, s)[0].double() * int64(kept, q, s)[1].double() * s.double().T + x[:, 9:10].double() @ w[:, 9:10].T
    torch.testing.assert_close(call(x, q, s, "mixed", 6.0).double(), expected, rtol=1e-6, atol=1e-5)
    columns = torch.zeros(64, dtype=torch.bool)
    columns[9] = True
    assert torch.equal(call(x, q, s, "mixed", 6.0), call(x, q, s, "mixed", 1e9, columns))
    assert (call(x, q, s, "mixed", 6.0).double() - exact).abs().max() < 0.1 * (call(x, q, s, "int8").double() - exact).abs().max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_rows_that_are_not_finite_are_the_float_path(activation, value):
    x, (q, s) = torch.randn(3, 12), weight(5, 12)
    x[1, 3] = value
    y = call(x, q, s, activation, 6.0)
    torch.testing.assert_close(y[1], x[1] @ (q * s).T, equal_nan=True)
    assert torch.equal(y[[0, 2]], call(x[[0, 2]], q, s, activation, 6.0)) and not y[1].isfinite().any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zero_rows_constant_rows_and_empty_ones(activation):
    q, s = weight(5, 12)
    x = torch.stack([torch.zeros(12), torch.full((12,), 3.0)])
    y = call(x, q, s, activation, 6.0)
    assert torch.equal(y[0], torch.zeros(5))
    torch.testing.assert_close(y[1], 3 * (q * s).sum(1))
    assert call(x[:0], q, s, activation).shape == (0, 5)
    assert torch.equal(call(x[:, :0], q[:, :0], s, activation), torch.zeros(2, 5))
    zero = torch.zeros(5, 12)
    assert torch.equal(call(x, *T.quantize_rows(zero, 0), activation), torch.zeros(2, 5))


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_float_is_linear_with_dequantised_weights(group, dtype):
    x, (q, s), c, g = torch.randn(3, 12, dtype=dtype), weight(6, 12, group), torch.randn(6, dtype=dtype), torch.rand(12, dtype=dtype)
    texts = ([], "rms", 1e-6, "x*r*c1[j]", ["a0*sigmoid(a0) + c0[j]"], [0, 0])
    (y,), (wanted,) = T.int8_linear(x, [q], [s], [c, g], *texts, "float", math.inf, None), T.linear(x, [dequantized(q, s, torch.promote_types(dtype, torch.float32))], [c, g], *texts)
    assert torch.equal(y, wanted)


def test_gradients_go_straight_through():
    x, (q, s), c = torch.randn(3, 12, requires_grad=True), weight(6, 12), torch.randn(6, requires_grad=True)
    y = call(x, q, s, "int8", epilogue="a0*a0 + c0[j]", captures=[c])
    assert torch.equal(y.detach(), call(x.detach(), q, s, "int8", epilogue="a0*a0 + c0[j]", captures=[c.detach()]))
    found = torch.autograd.grad(y.sum(), (x, c))
    wanted = torch.autograd.grad(((x @ (q * s).T).square() + c).sum(), (x, c))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation):
    (q, s), columns = weight(6, 8), torch.arange(8) < 2
    torch.library.opcheck(T.int8_linear.default, (torch.randn(3, 8), [q], [s], [torch.randn(6)], [], "rms", 1e-6, "x*r", ["a0 + c0[j]"], [0, 0], activation, 6.0, columns if activation == "mixed" else None))
    torch.library.opcheck(T.dequantize_rows.default, (q, s, torch.bfloat16, activation, 6.0, None))
    torch.library.opcheck(T.quantize_rows.default, (torch.randn(6, 8), 4 if activation == "float" else 0))


def test_what_is_wrong_is_said():
    x, (q, s) = torch.randn(2, 8), weight(3, 8)
    for wrong, words in (((x, q.float(), s, "float"), "expected int8"), ((x, q, s.half(), "float"), "expected float32"), ((x[0], q, s, "float"), "1 dims"), ((x, q, s, "int4"), "activation 'int4'"),
                         ((x, q, s.expand(3, 2).contiguous(), "int8"), "expected one"), ((x, q, s, "mixed", 6.0, torch.ones(7, dtype=torch.bool)), "bool"), ((x[:, :7], q, s, "float"), "rows of 7")):
        with pytest.raises(RuntimeError, match=words):
            call(*wrong)
    for bad in ((torch.randn(3, 8), 3), (torch.ones(3, 8, dtype=torch.int32), 0), (torch.randn(8), 0)):
        with pytest.raises(RuntimeError, match="quantize_rows"):
            T.quantize_rows(*bad)


def test_weights_of_other_layouts_and_values():
    w = torch.randn(12, 5)
    for found, wanted in zip(T.quantize_rows(w.T, 4), T.quantize_rows(w.T.contiguous(), 4)):
        assert torch.equal(found, wanted) and found.is_contiguous()
    for bad in (math.inf, math.nan):
        w[3, 2] = bad
        with pytest.raises(RefusalError, match="inf or NaN.*skip"):
            T.quantize_rows(w, 0)


def test_quantising_again_changes_nothing():
    w = torch.randn(4, 16)
    q, s = quantized(w)
    assert torch.equal(quantized(dequantized(q, s, torch.float32))[0], q) and len(accumulators(torch.randn(2, 16), [q], [s], "float")) == 1
