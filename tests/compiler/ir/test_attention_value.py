"""tileweld::attention with a factor of its weights (``value``) and with int8 keys and values: the definition, its gradients, the commutations that fold scales."""

import math

import pytest
import torch
from tileweld.compiler.ir import attention as _op  # noqa: F401 (registers the op)

B, H, HK, T, S, D, DV = 2, 4, 2, 5, 7, 8, 6


def attention(q, k, v, captures=(), score="s", mask="True", value="", fill=-math.inf, sink="", empty="nan"):
    return torch.ops.tileweld.attention(q, k, v, list(captures), [], score, mask, fill, sink, empty, value)


def qkv(dtype=torch.float64):
    return torch.randn(B, H, T, D, dtype=dtype), torch.randn(B, HK, S, D, dtype=dtype), torch.randn(B, HK, S, DV, dtype=dtype)


def quantised():
    """(k8, v8 [B, HK, S, width] int8, their scales [B, HK, S])"""
    k8, v8 = (torch.randint(-127, 128, (B, HK, S, n), dtype=torch.int8) for n in (D, DV))
    return k8, v8, torch.rand(B, HK, S, dtype=torch.float64) / 50, torch.rand(B, HK, S, dtype=torch.float64)


K_SCALE, V_SCALE = "s*c0[b, h//2, j]", "c1[b, h//2, j]"
MASKS = [dict(), dict(mask="j <= i"), dict(mask="j <= i + 2", fill=-1e9), dict(mask="j < i", empty="zero"), dict(sink="c1[b, 0, 0]")]


@pytest.mark.parametrize("rest", MASKS, ids=str)
def test_scales_of_tokens_commute_into_score_and_weight(rest):
    """(s0 k8) . q = s0 (k8 . q); p (s1 v8) = (p s1) v8, the denominator without s1."""
    q, (k8, v8, s0, s1) = qkv()[0], quantised()
    expected = attention(q, s0[..., None] * k8, s1[..., None] * v8, [s0, s1], **rest)
    torch.testing.assert_close(attention(q, k8, v8, [s0, s1], score=K_SCALE, value=V_SCALE, **rest), expected, rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("rest", MASKS, ids=str)
def test_zero_points_commute_into_the_sum_of_q_and_a_number_for_every_dim(rest):
    """(s0 k8 + z0) . q = s0 (k8 . q) + z0 sum(q); p (s1 v8 + z1) = (p s1) v8 + p z1."""
    q, (k8, v8, s0, s1) = qkv()[0], quantised()
    z0, z1 = (torch.randn(B, HK, S, dtype=torch.float64) for _ in range(2))
    expected = attention(q, s0[..., None] * k8 + z0[..., None], s1[..., None] * v8 + z1[..., None], [s0, s1], **rest)
    got = attention(q, k8, v8, [s0, s1, z0, z1, q.sum(-1)], score=f"{K_SCALE} + c2[b, h//2, j]*c4[b, h, i]", value=f"{V_SCALE}*v + c3[b, h//2, j]", **rest)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12, equal_nan=True)


def test_forms_of_value():
    q, k, v = qkv()
    (f, o), plain = torch.randn(2, B, H, S, dtype=torch.float64), attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v, value="v"), plain)
    for text in ("c0[b, h, j]*v + c1[b, h, j]", "c1[b, h, j] + v*c0[b, h, j]"):
        torch.testing.assert_close(attention(q, k, v, [f, o], value=text), attention(q, k, v, [f, o], value="c0[b, h, j]") + attention(q, k, torch.ones_like(v), [f, o], value="c1[b, h, j]"))
    torch.testing.assert_close(attention(q, k, v, value="v + 2"), plain + 2)
    torch.testing.assert_close(attention(q, k, v, value="3*v"), plain * 3)
    for text, expected in {"v - 0.75": plain - 0.75, "1 - v": 1 - plain, "-v": -plain, "2*(v + 1)": 2 * plain + 2, "(3 - (v - 1)*2)/4 - 1": (3 - (plain - 1) * 2) / 4 - 1}.items():
        torch.testing.assert_close(attention(q, k, v, value=text), expected)


@pytest.mark.parametrize("value", ["v*v", "v*v + 1", "exp(v)", "v + v", "1/v", "s*v", "v + s", "2*exp(v)", "max(v, 0)"])
def test_what_is_not_f_v_plus_o_is_refused(value):
    with pytest.raises(ValueError, match="value="):
        attention(*qkv(), value=value)


def test_scales_of_channels_commute_into_q_and_the_result():
    q, (k8, v8, *_) = qkv()[0], quantised()
    a, b = torch.rand(B, HK, 1, D, dtype=torch.float64), torch.rand(B, HK, 1, DV, dtype=torch.float64)
    folded = attention(q * a.repeat_interleave(2, 1), k8, v8) * b.repeat_interleave(2, 1)
    torch.testing.assert_close(folded, attention(q, a * k8, b * v8), rtol=1e-12, atol=1e-13)


def test_each_operand_may_be_int8_alone():
    q, k, v = qkv()
    k8, v8, *_ = quantised()
    torch.testing.assert_close(attention(q, k8, v), attention(q, k8.double(), v))
    torch.testing.assert_close(attention(q, k, v8), attention(q, k, v8.double()))
    assert attention(q.bfloat16(), k8, v8).dtype == torch.bfloat16


@pytest.mark.parametrize(("shape", "value"), [((H, T, S), "c0[h, i, j]"), ((B, HK, S), "tanh(c0[b, h//2, j]) + 1"), ((), "2*c0"), ((S + T,), "c0[j - i + Tq]*j"), ((B, HK, S), "v + c0[b, h//2, j]"), ((H, T, S), "cos(c0[h, i, j])*v + c0[h, i, j]**2")])
@pytest.mark.parametrize("rest", [dict(), dict(mask="j <= i + 1"), dict(mask="j <= i"), dict(sink="0.5")], ids=str)
def test_gradients(shape, value, rest):
    """gradcheck through q, k, v and the captures of ``value``; the causal way of the backward, which reads fewer keys, too."""
    c = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    q, k, v = (x[..., :3].contiguous().requires_grad_() for x in qkv())
    assert torch.autograd.gradcheck(lambda q, k, v, c: attention(q, k, v, [c], value=value, **rest), (q, k, v, c), eps=1e-6, atol=1e-6)


def test_gradients_through_int8():
    """q and the scales have the gradients that dequantised k and v give them."""
    k8, v8, *scales = quantised()
    floats = [qkv()[0].requires_grad_(), *(s.requires_grad_() for s in scales)]
    q, s0, s1 = floats
    up = torch.randn(B, H, T, DV, dtype=torch.float64)
    ours = torch.autograd.grad((attention(q, k8, v8, [s0, s1], score=K_SCALE, value=V_SCALE) * up).sum(), floats)
    for a, b in zip(ours, torch.autograd.grad((attention(q, s0[..., None] * k8, s1[..., None] * v8) * up).sum(), floats), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_opcheck():
    k8, v8, *scales = quantised()
    scales = [s.float().requires_grad_() for s in scales]
    torch.library.opcheck(torch.ops.tileweld.attention.default, (qkv(torch.float32)[0].requires_grad_(), k8, v8, scales, [], K_SCALE, "j <= i + 2", -math.inf, "", "nan", V_SCALE))


def test_a_factor_that_depends_on_the_score_is_refused():
    with pytest.raises(ValueError, match="depends on s"):
        attention(*qkv(), value="s*2")
