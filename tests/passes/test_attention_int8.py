"""int8 keys and values in the attention rewrite: dequantising them with torch operations folds into the score and the weights."""
import pytest
import torch
import torch.nn.functional as F

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


def test_other_integers_are_cast_before(compare):
    """int16 does not fit into a half type, and there is no kernel for it: such a cast is the model's."""
    q, _, _, s0, s1 = operands()
    k, v = (torch.randint(-9, 9, (B, H, S, D), dtype=torch.int16) for _ in range(2))
    report = compare(by_library, q, k, v, s0, s1, fused=1)
    assert attention_of(report).args[1].meta["val"].dtype == torch.float32
