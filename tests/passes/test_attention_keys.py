"""int8 keys with scales of channels for groups of positions (KIVI), and the newest positions in floats: the attention rewrite lifts them into a text of the keys."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

B, H, KV, T, L, D, G = 2, 4, 2, 3, 32, 8, 8
aten = torch.ops.aten


def operands(kv_heads=KV, dtype=torch.float32, length=L):
    """q [B, H, T, D], k8 [B, KV heads, L, D], scales and shifts [B, KV heads, L / G, D], v, the newest keys [B, KV heads, G, D]"""
    k8 = torch.randint(-127, 128, (B, kv_heads, length, D), dtype=torch.int8)
    scale, shift = torch.rand(B, kv_heads, length // G, D).to(dtype) / 50, torch.randn(B, kv_heads, length // G, D).to(dtype)
    return torch.randn(B, H, T, D).to(dtype), k8, scale, shift, torch.randn(B, kv_heads, length, D).to(dtype), torch.randn(B, kv_heads, G, D).to(dtype)


def grouped(x):
    return x.unflatten(2, (-1, G))


def attend(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def by_reshape(q, k8, scale, shift, v, recent):
    return attend(q, (grouped(k8).to(q.dtype) * scale[:, :, :, None]).reshape(v.shape), v)


def with_shift(q, k8, scale, shift, v, recent):
    return attend(q, (grouped(k8).to(q.dtype) * scale[:, :, :, None] + shift[:, :, :, None]).flatten(2, 3), v)


def with_zero_points(q, k8, scale, shift, v, recent):
    """of integers, which are subtracted before the cast"""
    zero = (shift * 9).to(torch.int8)
    return attend(q, ((grouped(k8).int() - zero[:, :, :, None].int()).to(q.dtype) * scale[:, :, :, None]).flatten(2, 3), v)


def by_hand(q, k8, scale, shift, v, recent):
    """repeated heads, scales repeated along the positions, products written out"""
    k = (k8.to(q.dtype) + shift.repeat_interleave(G, 2)) * scale.repeat_interleave(G, 2)
    k, v = (x[:, :, None].expand(-1, -1, H // x.shape[1], -1, -1).reshape(B, H, *x.shape[2:]) for x in (k, v))
    return torch.softmax(q @ k.transpose(2, 3) * 0.3, -1) @ v


def by_gather(q, k8, scale, shift, v, recent):
    j = torch.arange(k8.shape[2])
    return attend(q, k8.to(q.dtype) * scale.index_select(2, j // G) + shift[:, :, j // G], v)


def newest_selected(q, k8, scale, shift, v, recent):
    j = torch.arange(k8.shape[2])
    k = torch.where((j < 19)[:, None], k8.to(q.dtype) * scale.index_select(2, j // G), recent.index_select(2, j % G))
    return attend(q, k, v, attn_mask=(j <= 26)[None])


def newest_joined(q, k8, scale, shift, v, recent):
    k = torch.cat([(grouped(k8).to(q.dtype) * scale[:, :, :, None]).flatten(2, 3), recent[:, :, :5]], 2)
    return attend(q, k, torch.cat([v, recent[:, :, 1:6]], 2))


def newest_of_a_rotary(q, k8, scale, shift, v, recent):
    """the newest keys are computed here: by the model's own operations"""
    cos, sin = torch.ones(G, D) * 0.6, torch.ones(G, D) * 0.8
    turned = recent * cos + torch.cat([-recent[..., D // 2:], recent[..., : D // 2]], -1) * sin
    return newest_joined(q, k8, scale, shift, v, turned)


WAYS = [by_reshape, with_shift, with_zero_points, by_hand, by_gather, newest_selected, newest_joined, newest_of_a_rotary]


def attention_of(report):
    (node,) = [n for n in report.graphs[-1].graph.nodes if n.target in (torch.ops.tileweld.attention.default, torch.ops.tileweld.attention_keys.default)]
    return node


def reads_int8(report) -> bool:
    node = attention_of(report)
    return node.target is torch.ops.tileweld.attention_keys.default and node.args[1].meta["val"].dtype == torch.int8


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("fn", WAYS)
def test_groups_become_a_text_of_the_keys(fn, kv_heads, compare):
    report = compare(fn, *operands(kv_heads), fused=1, dynamic=False, verify=True)
    node = attention_of(report)
    assert reads_int8(report) and node.args[1].meta["val"].shape == (B, kv_heads, L, D), node.format_node()
    assert f"floordiv({'min(31, j)' if 'joined' in fn.__name__ or 'rotary' in fn.__name__ else 'j'}, 8)" in node.args[11] and "key=" in report.fusions[0].detail


@pytest.mark.parametrize("fn", [with_shift, with_zero_points, newest_selected])
def test_half_types(fn, compare):
    assert reads_int8(compare(fn, *operands(2, torch.bfloat16), fused=1, tolerance=4e-2))


def test_keys_stored_in_groups_and_transposed(compare):
    """[B, KV heads, groups, G, D], and [B, positions, KV heads, D]"""
    q, k8, scale, shift, v, recent = operands()
    stored = compare(lambda q, k8, s, v: attend(q, (k8.float() * s[:, :, :, None]).flatten(2, 3), v), q, grouped(k8), scale, v, fused=1, verify=True)
    turned = compare(lambda q, k8, s, v: attend(q, (grouped(k8.transpose(1, 2)).float() * s[:, :, :, None]).flatten(2, 3), v), q, k8.transpose(1, 2).contiguous(), scale, v, fused=1, verify=True)
    assert reads_int8(stored) and reads_int8(turned)


@pytest.mark.parametrize("fn", [with_shift, by_hand])
def test_any_number_of_groups(fn, rewriting):
    q, k8, scale, shift, v, recent = operands()

    def run(q, k8, rest):  # rest [B, KV heads, groups, 2 D + G D]: one symbol for the number of groups of all
        return fn(q, k8.flatten(2, 3), rest[..., :D], rest[..., D:2 * D], rest[..., 2 * D:].reshape(B, KV, -1, D), None)

    inputs = [q, grouped(k8), torch.cat([scale, shift, grouped(v).flatten(3)], -1)]
    for x in inputs[1:]:
        torch._dynamo.mark_dynamic(x, 2)
    got, report = rewriting.rewritten(run, *inputs, verify=True)
    torch.testing.assert_close(got, run(*inputs))
    assert not report.refusals and reads_int8(report)


def test_masks_sinks_and_scales_of_tokens_on_top(compare):
    """A score of its own, a mask of padding, a sink, and values with scales of tokens."""
    q, k8, scale, shift, v, recent = operands()
    keep, sink = torch.rand(B, 1, 1, L) > 0.3, torch.randn(1, H, 1, 1)

    def fn(q, k8, scale, v8, keep, sink):
        k, v = ((x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(B, H, L, D)) for x in ((grouped(k8).float() * scale[:, :, :, None]).flatten(2, 3), v8.float() * 0.01))
        scores = (5 * torch.tanh(q @ k.mT)).masked_fill(~keep, float("-inf"))
        return torch.softmax(torch.cat([scores, sink.expand(B, H, T, 1)], -1), -1)[..., :-1] @ v

    assert reads_int8(compare(fn, q, k8, scale, torch.randint(-9, 9, (B, KV, L, D), dtype=torch.int8), keep, sink, fused=1, verify=True))


# ---------------------------------------------------------------- what stays the model's


def of_every_element(q, k8, scale, shift, v, recent):
    return attend(q, k8.float() * v, v)


def of_query_heads(q, k8, scale, shift, v, recent):
    k = (grouped(k8).float().repeat_interleave(2, 1) * torch.cat([scale, shift], 1)[:, :, :, None]).flatten(2, 3)
    return attend(q, k, v.repeat_interleave(2, 1))


def of_two_tensors(q, k8, scale, shift, v, recent):
    return attend(q, k8.float() * scale.repeat_interleave(G, 2) + (9 * v).to(torch.int8).float() * 0.01, v)


def with_log_sums(q, k8, scale, shift, v, recent):
    scores = q @ (grouped(k8).float() * scale[:, :, :, None]).flatten(2, 3).repeat_interleave(2, 1).mT
    return torch.softmax(scores, -1) @ v.repeat_interleave(2, 1), scores.logsumexp(-1)


@pytest.mark.parametrize(("fn", "reason"), [(of_every_element, "has a number for every position and channel"), (of_query_heads, "differs among the query heads"), (of_two_tensors, "several int8 tensors"),
                                            (with_log_sums, "the log-sum-exp of their scores is a result")])
def test_what_stays_the_models_and_why(fn, reason, rewriting):
    inputs = operands()
    got, report = rewriting.rewritten(fn, *inputs, verify=True)
    torch.testing.assert_close(got, fn(*inputs), atol=2e-5, rtol=1e-4)
    (row,) = [f for f in report.fusions if f.rewrite == "attention"]
    assert "dequantised by torch" in row.detail and reason in row.detail, row.detail


def test_a_gradient_is_wanted(rewriting):
    q, k8, scale, shift, v, recent = operands()
    report = rewriting.check_gradients(lambda q, scale, shift, v: with_shift(q, k8, scale, shift, v, None), q, scale, shift, v, count={"attention": 1})
    assert report is None or not reads_int8(report)


def test_bytes_that_wrap_are_the_models(compare):
    """int8 minus int8 is int8: -100 - 100 is 56."""
    q, k8, scale, shift, v, recent = operands()
    zero = torch.randint(-128, 128, (B, KV, 1, D), dtype=torch.int8)
    report = compare(lambda q, k8, zero, scale, v: attend(q, (k8 - zero).float() * scale.repeat_interleave(G, 2), v), q, k8, zero, scale, v, fused=1)
    assert reads_int8(report) and attention_of(report).args[1].target in (aten.sub.Tensor, aten.sub.default)


def test_factors_of_scores_and_queries_come_first(compare):
    """Scales of tokens and of channels cost nothing an element: no text."""
    q, k8, scale, shift, v, recent = operands()
    for s in (torch.rand(B, KV, L, 1), torch.rand(B, KV, 1, D)):
        report = compare(lambda q, k8, s, v: attend(q, k8.float() * s, v), q, k8, s / 50, v, fused=1)
        assert attention_of(report).target is torch.ops.tileweld.attention.default and attention_of(report).args[1].meta["val"].dtype == torch.int8


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_ways_of_dequantising(data, compare):
    """Steps of groups, tokens, channels, heads and constants in any order, then the newest positions in one of three ways: the model's result, and int8 is what is read."""
    torch._dynamo.reset()
    torch.manual_seed(data.draw(st.integers(0, 99)))
    kv_heads, group = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([2, 4, 8, 16]))
    q, k8, scale, shift, v, recent = operands(kv_heads)
    shapes = [(B, kv_heads, L // group, D), (1, kv_heads, L // group, D), (L // group, D), (L // group, 1), (kv_heads, 1, D), ()]
    steps = [(data.draw(st.sampled_from(["mul", "div", "add", "sub"])), torch.rand(data.draw(st.sampled_from(shapes))) + 0.5) for _ in range(data.draw(st.integers(1, 3)))]
    steps.append(("mul", torch.rand(B, kv_heads, L // group, D) + 0.5))
    spelling, newest = data.draw(st.sampled_from(["repeat", "gather", "reshape"])), data.draw(st.sampled_from(["none", "where", "cat"]))

    def spread(c):
        if c.dim() < 2 or c.shape[-2] != L // group or (c.dim() == 3 and c.shape[0] == kv_heads):
            return c[:, :, None] if spelling == "reshape" and c.dim() == 3 else c
        return {"repeat": lambda: c.repeat_interleave(group, -2), "gather": lambda: c.index_select(-2, torch.arange(L) // group), "reshape": lambda: c.unsqueeze(-2)}[spelling]()

    def fn(q, k8, v, recent):
        x = k8.float() / 100
        x = x.unflatten(2, (-1, group)) if spelling == "reshape" else x
        for kind, c in steps:
            c = spread(c)
            x = {"mul": lambda: x * c, "div": lambda: x / c, "add": lambda: x + c, "sub": lambda: x - c}[kind]()
        x = x.flatten(2, 3) if spelling == "reshape" else x
        if newest == "where":
            j = torch.arange(L)
            x = torch.where((j > 20)[:, None], recent[:, :, j % G], x)
        elif newest == "cat":
            x, v = torch.cat([x, recent], 2), torch.cat([v, recent], 2)
        return attend(q, x, v)

    report = compare(fn, q, k8, v, recent, fused=1, dynamic=False, tolerance=3e-5)
    assert reads_int8(report), (attention_of(report).format_node(), report.fusions[0].detail)
