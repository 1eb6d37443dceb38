"""int8 keys and values in the attention rewrite: dequantising them with torch operations folds into the score and the weights."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

B, H, T, S, D = 2, 4, 3, 9, 8


def operands(kv_heads=H, dtype=torch.float32):
    """q [B, H, T, D], k8 and v8 [B, KV heads, S, D], and their scales [B, KV heads, S, 1]"""
    k8, v8 = (torch.randint(-127, 128, (B, kv_heads, S, D), dtype=torch.int8) for _ in range(2))
    s0, s1 = (torch.rand(B, kv_heads, S, 1).to(dtype) / 60 for _ in range(2))
    return torch.randn(B, H, T, D).to(dtype), k8, v8, s0, s1


def dequantised(x, scale):
    return x.to(scale.dtype) * scale


def repeated(x, n):
    return x[:, :, None].expand(-1, -1, n, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def by_hand(q, k8, v8, s0, s1):
    k, v = (repeated(dequantised(x, s), H // x.shape[1]) for x, s in ((k8, s0), (v8, s1)))
    return torch.softmax(q @ k.transpose(2, 3) * 0.25, -1) @ v


def by_library(q, k8, v8, s0, s1):
    return F.scaled_dot_product_attention(q, dequantised(k8, s0), dequantised(v8, s1), enable_gqa=k8.shape[1] != H)


def scaled_before_the_cast(q, k8, v8, s0, s1):
    """the scale first as a factor of the repeated heads, and as a division"""
    n = H // k8.shape[1]
    k, v = repeated(k8, n).to(q.dtype) * repeated(s0, n), repeated(v8, n).to(q.dtype) / (1 / repeated(s1, n))
    return torch.softmax(q @ k.mT, -1) @ v


def attention_of(report):
    (node,) = [n for n in report.graphs[-1].graph.nodes if n.target is torch.ops.tileweld.attention.default]
    return node


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("fn", [by_hand, by_library, scaled_before_the_cast])
def test_scales_fold_and_nothing_is_dequantised(fn, kv_heads, compare):
    inputs = operands(kv_heads)
    report = compare(fn, *inputs, fused=1, dynamic=False, verify=True)
    q, k, v, *_, value = attention_of(report).args
    assert k.meta["val"].dtype == v.meta["val"].dtype == torch.int8 and k.meta["val"].shape[1] == kv_heads
    assert "j]" in value, value


@pytest.mark.parametrize("fn", [by_hand, by_library])
def test_any_number_of_keys(fn, rewriting):
    q, k8, v8, s0, s1 = operands(2)
    packed, scales = torch.cat([k8, v8], 3), torch.cat([s0, s1], 3)  # one symbol for the length of all
    torch._dynamo.mark_dynamic(packed, 2)
    torch._dynamo.mark_dynamic(scales, 2)
    got, report = rewriting.rewritten(lambda q, x, s: fn(q, x[..., :D], x[..., D:], s[..., :1], s[..., 1:]), q, packed, scales, verify=True)
    assert not report.refusals and attention_of(report).args[1].meta["val"].dtype == torch.int8
    torch.testing.assert_close(got, fn(q, k8, v8, s0, s1))


def rounded_to_half(q, k8, v8, s0, s1):
    """in float32, rounded once to the model's dtype"""
    k, v = ((x.float() * s.float()).to(q.dtype) for x, s in ((k8, s0), (v8, s1)))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize("fn", [by_library, rounded_to_half])
def test_half_types(fn, compare):
    report = compare(fn, *operands(2, torch.bfloat16), fused=1, tolerance=2e-2)
    assert [a.meta["val"].dtype for a in attention_of(report).args[1:3]] == [torch.int8] * 2


def test_a_cast_down_of_floats_is_the_models(compare):
    q, k, v = (torch.randn(B, H, n, D) for n in (T, S, S))
    report = compare(lambda q, k, v: F.scaled_dot_product_attention(q.half(), (k * 2).half(), (v * 2).half()), q, k, v, fused=1, tolerance=1e-3)
    assert [a.meta["val"].dtype for a in attention_of(report).args[1:3]] == [torch.float16] * 2


def test_keys_or_values_alone(compare):
    q, k8, v8, s0, s1 = operands(2)
    k, v = dequantised(k8, s0), dequantised(v8, s1)
    report = compare(lambda q, k, v8, s1: F.scaled_dot_product_attention(q, k, dequantised(v8, s1), enable_gqa=True), q, k, v8, s1, fused=1)
    assert [a.meta["val"].dtype for a in attention_of(report).args[1:3]] == [torch.float32, torch.int8]
    report = compare(lambda q, k8, v, s0: F.scaled_dot_product_attention(q, dequantised(k8, s0), v, enable_gqa=True), q, k8, v, s0, fused=1)
    assert [a.meta["val"].dtype for a in attention_of(report).args[1:3]] == [torch.int8, torch.float32] and len(attention_of(report).args) == 10


def test_masks_and_sinks_stay(compare):
    q, k8, v8, s0, s1 = operands(2)
    keep = torch.rand(B, 1, 1, S) > 0.3
    report = compare(lambda q, k8, v8, s0, s1, keep: F.scaled_dot_product_attention(q, dequantised(k8, s0), dequantised(v8, s1), attn_mask=keep, enable_gqa=True), q, k8, v8, s0, s1, keep, fused=1)
    assert "c1[b, j]" in str(attention_of(report).args[6])

    def with_sink(q, k8, v8, s0, s1, sink):
        scores = q @ repeated(dequantised(k8, s0), 2).mT
        p = torch.softmax(torch.cat([scores, sink.expand(B, H, T, 1)], -1), -1)[..., :-1]
        return p @ repeated(dequantised(v8, s1), 2)

    compare(with_sink, q, k8, v8, s0, s1, torch.randn(1, H, 1, 1), fused=1)


def test_a_scale_of_float_values_is_left_alone(compare):
    """Only where it saves the dequantised copy: a gate of float values stays an op of its own, whose gradients are cheap."""
    q, k, v = (torch.randn(B, H, n, D) for n in (T, S, S))
    report = compare(lambda q, k, v, g: F.scaled_dot_product_attention(q, k, v * g), q, k, v, torch.rand(B, H, S, 1), fused=1)
    assert len(attention_of(report).args) == 10


# ---------------------------------------------------------------- zero points, and scales of channels


def zero_points(q, k8, v8, s0, s1, z0, z1):
    """s (x - z)"""
    return F.scaled_dot_product_attention(q, (k8.to(q.dtype) - z0) * s0, (v8.to(q.dtype) - z1) * s1, enable_gqa=True)


def lowest(q, k8, v8, s0, s1, z0, z1):
    """s x + the lowest, over repeated heads, by hand"""
    n = H // k8.shape[1]
    return torch.softmax(q @ repeated(dequantised(k8, s0) + z0, n).mT * 0.3, -1) @ repeated(z1 + dequantised(v8, s1), n)


def points(kv_heads, dtype=torch.float32):
    return *operands(kv_heads, dtype), *(torch.randn(B, kv_heads, S, 1).to(dtype) for _ in range(2))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("fn", [zero_points, lowest])
def test_zero_points_fold(fn, kv_heads, compare):
    report = compare(fn, *points(kv_heads), fused=1, dynamic=False, verify=True)
    q, k, v, *_, value = attention_of(report).args
    assert k.meta["val"].dtype == v.meta["val"].dtype == torch.int8 and k.meta["val"].shape[1] == kv_heads
    assert "*v + " in value, value


def test_zero_points_with_masks_and_sinks(compare):
    keep = torch.rand(B, 1, 1, S) > 0.3
    compare(lambda q, k8, v8, s0, s1, z0, z1, keep: F.scaled_dot_product_attention(q, dequantised(k8, s0) + z0, dequantised(v8, s1) + z1, attn_mask=keep, enable_gqa=True), *points(2), keep, fused=1)

    def with_sink(q, k8, v8, s0, s1, z0, z1, sink):
        p = torch.softmax(torch.cat([q @ repeated(dequantised(k8, s0) + z0, 2).mT, sink.expand(B, H, T, 1)], -1), -1)[..., :-1]
        return p @ repeated(dequantised(v8, s1) + z1, 2)

    compare(with_sink, *points(2), torch.randn(1, H, 1, 1), fused=1)


def of_channels(q, k8, v8, s0, s1):
    return F.scaled_dot_product_attention(q, k8.to(s0.dtype) * s0, dequantised(v8, s1), enable_gqa=True)


def of_channels_by_hand(q, k8, v8, s0, s1):
    n = H // k8.shape[1]
    return torch.softmax(q @ (repeated(k8, n).to(s0.dtype) / repeated(1 / s0, n)).mT * 0.2, -1) @ repeated(dequantised(v8, s1), n)


def with_centre(q, k8, v8, s0, s1):
    """a zero point for every channel, and one for every token"""
    return F.scaled_dot_product_attention(q, (k8.to(s0.dtype) - 3 * s0.flip(-1)) * s0 + s1[..., :1], dequantised(v8, s1), enable_gqa=True)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("fn", [of_channels, of_channels_by_hand, with_centre])
def test_scales_of_channels_fold_into_the_queries(fn, kv_heads, compare):
    for batch in (1, B):
        q, k8, v8, _, s1 = operands(kv_heads)
        report = compare(fn, q, k8, v8, torch.rand(batch, kv_heads, 1, D) / 40, s1, fused=1, dynamic=False, verify=True)
        _, k, v, *_ = attention_of(report).args
        assert k.meta["val"].dtype == v.meta["val"].dtype == torch.int8 and k.meta["val"].shape[1] == kv_heads


@pytest.mark.parametrize("fn", [zero_points, of_channels])
def test_zero_points_and_channels_in_half_types(fn, compare):
    q, k8, v8, s0, s1, *rest = points(2, torch.bfloat16)
    inputs = (q, k8, v8, s0, s1, *rest) if fn is zero_points else (q, k8, v8, torch.rand(B, 2, 1, D).bfloat16() / 40, s1)
    report = compare(fn, *inputs, fused=1, tolerance=3e-2)
    assert [a.meta["val"].dtype for a in attention_of(report).args[1:3]] == [torch.int8] * 2


def test_gradients_reach_scales_and_zero_points(rewriting):
    q, k8, v8, s0, s1, z0, z1 = points(2)
    rewriting.check_gradients(lambda q, s0, s1, z0, z1: lowest(q, k8, v8, s0, s1, z0, z1), q, s0, s1, z0, z1, count={"attention": 1})
    rewriting.check_gradients(lambda q, s0, s1: with_centre(q, k8, v8, s0, s1), q, torch.rand(B, 2, 1, D) / 40, s1, count={"attention": 1})


@pytest.mark.parametrize("what", ["scales of both", "values by channel", "float keys"])
def test_what_does_not_fold_stays_the_models(what, compare):
    """A scale of every element is no scale of queries, one of a value's channels is the result's (which is not done), a sum of floats is no zero point."""
    q, k8, v8, s0, s1 = operands(2)
    if what == "scales of both":
        report = compare(of_channels, q, k8, v8, torch.rand(B, 2, S, D) / 40, s1, fused=1)
        assert [a.meta["val"].dtype for a in attention_of(report).args[1:3]] == [torch.float32, torch.int8]
    elif what == "values by channel":
        report = compare(by_library, q, k8, v8, s0, torch.rand(B, 2, 1, D) / 40, fused=1)
        assert [a.meta["val"].dtype for a in attention_of(report).args[1:3]] == [torch.int8, torch.float32]
    else:
        k, v = torch.randn(B, 2, S, D), torch.randn(B, 2, S, D)
        report = compare(lambda q, k, v, z: F.scaled_dot_product_attention(q, k + z, v - z, enable_gqa=True), q, k, v, torch.randn(B, 2, S, 1), fused=1)
        assert len(attention_of(report).args) == 10 and not attention_of(report).args[3]  # no captures


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_ways_of_dequantising(data, compare):
    """Scales and zero points of tokens, heads, channels and constants, in any order: the result is the model's, and nothing is dequantised unless a scale is one of every element."""
    torch._dynamo.reset()
    torch.manual_seed(data.draw(st.integers(0, 99)))
    kv_heads = data.draw(st.sampled_from([1, 2, 4]))
    q, k8, v8, *_ = operands(kv_heads)

    def drawn(shapes):
        steps = [(data.draw(st.sampled_from(["mul", "div", "add", "sub"])), data.draw(st.sampled_from(shapes))) for _ in range(data.draw(st.integers(1, 3)))]
        return [(kind, torch.rand([n if n != "kv" else kv_heads for n in shape]) + 0.5 if shape else 0.75) for kind, shape in steps]

    tokens, channels = [(B, "kv", S, 1), (1, "kv", S, 1), (S, 1), ("kv", 1, 1), ()], [(B, "kv", 1, D), ("kv", 1, D), (1, D), (D,)]
    k_steps, v_steps = drawn(tokens + channels), drawn(tokens)

    def made(x, steps):
        x = x.float() / 100
        for kind, c in steps:
            x = {"mul": lambda: x * c, "div": lambda: x / c, "add": lambda: x + c, "sub": lambda: x - c}[kind]()
        return x

    report = compare(lambda q, k8, v8: F.scaled_dot_product_attention(q, made(k8, k_steps), made(v8, v_steps), enable_gqa=True), q, k8, v8, fused=1, dynamic=False)
    assert [a.meta["val"].dtype for a in attention_of(report).args[1:3]] == [torch.int8] * 2, (k_steps, v_steps)


def test_other_integers_are_cast_before(compare):
    """int16 does not fit into a half type, and there is no kernel for it: such a cast is the model's."""
    q, _, _, s0, s1 = operands()
    k, v = (torch.randint(-9, 9, (B, H, S, D), dtype=torch.int16) for _ in range(2))
    report = compare(by_library, q, k, v, s0, s1, fused=1)
    assert attention_of(report).args[1].meta["val"].dtype == torch.float32
