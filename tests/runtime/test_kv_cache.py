"""The int8 KV cache: what it rounds, that appending is quantising at once, and a loop by hand with it, eager and compiled."""
import math

import pytest
import tileweld
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tileweld.compiler.errors import OptionError
from tileweld.runtime.kv_cache import HEADROOM, channel_range, dequantize_kv, quantize_kv, quantize_kv_asymmetric, rounded

OPTIONS = [{}, {"asymmetric": True}, {"keys": "channel"}, {"asymmetric": True, "keys": "channel"}, {"keys": "channel", "group": 4}, {"asymmetric": True, "keys": "channel", "group": 5}]
B, HEADS, KV, LENGTH, D, DV = 2, 4, 2, 24, 16, 8


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.floats(-6, 4))
def test_the_error_is_half_a_step(seed, dtype, magnitude):
    x = (torch.randn(3, 2, 5, D, generator=torch.Generator().manual_seed(seed)) * 10**magnitude).to(dtype)
    q, scale = quantize_kv(x)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (3, 2, 5, 1)
    assert (q.abs().amax(-1, keepdim=True) == 127 * (scale > 0)).all()
    assert ((x.double() - q.double() * scale.double()).abs() <= scale.double() * (0.5 + 1e-5)).all()


def test_rounding_is_to_the_nearest_and_to_even_from_halfway():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 2.49, -126.51]])
    assert quantize_kv(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, 2, -127]]


def test_zero_rows_and_rows_that_are_not_finite():
    x = torch.randn(5, D)
    x[0], x[1, 3], x[2, 3], x[3, 3] = 0, math.inf, math.nan, -math.inf
    q, scale = quantize_kv(x)
    back = dequantize_kv(q, scale)
    assert (q[0] == 0).all() and (scale[0] == 0).all() and (back[0] == 0).all()
    assert back[1:4].isnan().any(-1).all() and back[1:4].isfinite().sum() == 0  # nothing that looks like a number is left of them
    assert back[4].isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.floats(-6, 4), st.floats(-3, 3))
def test_the_error_with_a_zero_point_is_half_a_step_of_the_row_s_own_range(seed, dtype, magnitude, centre):
    x = ((torch.randn(3, 2, 5, D, generator=torch.Generator().manual_seed(seed)) + centre) * 10**magnitude).to(dtype)
    q, scale, shift = quantize_kv_asymmetric(x)
    assert q.dtype == torch.int8 and scale.dtype == shift.dtype == torch.float32 and scale.shape == shift.shape == (3, 2, 5, 1)
    wide = x.double()
    assert (scale.double() <= (wide.amax(-1, keepdim=True) - wide.amin(-1, keepdim=True)) / 255 * (1 + 1e-6)).all()
    assert ((wide - q.double() * scale.double() - shift.double()).abs() <= scale.double() * 0.5 + 1e-5 * wide.abs().amax(-1, keepdim=True)).all()
    assert (q.amin(-1) <= -127).all() and (q.amax(-1) >= 126).all()


def test_zero_points_of_constant_rows_and_of_rows_that_are_not_finite():
    x = torch.randn(6, D)
    x[0], x[1], x[2, 3], x[3, 3], x[4, 3] = 0, 2.7, math.inf, math.nan, -math.inf
    back = dequantize_kv(*quantize_kv_asymmetric(x)[:2], shift=quantize_kv_asymmetric(x)[2])
    assert torch.equal(back[:2], x[:2]) and back[2:5].isfinite().sum() == 0 and back[5].isfinite().all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.floats(-4, 4), st.floats(-3, 3))
def test_channels_have_the_range_of_the_prompt_and_later_tokens_are_clamped(seed, asymmetric, magnitude, centre):
    x = (torch.randn(2, KV, 9, D, generator=torch.Generator().manual_seed(seed)) + centre) * 10**magnitude
    scale, shift = channel_range(x, asymmetric)
    assert scale.shape == (2, KV, 1, D) and (shift is None) == (not asymmetric)
    middle = 0 if shift is None else shift
    for factor in (1, HEADROOM, 50):  # as far out as those seen, as far as foreseen, far beyond
        later = middle + factor * (x - middle)
        back = rounded(later - middle, scale) * scale + middle
        inside = (later - middle).abs() <= 127 * scale * (1 + 1e-5) + 1e-5 * later.abs()
        assert inside.all() or factor == 50
        error = (back - later).abs()
        assert (error[inside] <= (0.5 * scale + 2e-3 * scale + 1e-5 * later.abs()).expand_as(error)[inside]).all()
        assert torch.allclose(back[~inside], (middle + 127 * scale * (later - middle).sign())[~inside], rtol=1e-3)


def test_other_words_are_refused():
    with pytest.raises(OptionError, match="keys='head'"):
        tileweld.Int8KV(1, 1, 4, 8, keys="head")
    for wrong in ({"group": 4}, {"keys": "channel", "group": -1}):
        with pytest.raises(OptionError, match="group="):
            tileweld.Int8KV(1, 1, 4, 8, **wrong)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_appending_is_quantising_at_once(options):
    """with ranges of channels: once they are set"""
    k, v = torch.randn(B, KV, LENGTH, D), torch.randn(B, KV, LENGTH, DV)
    at_once, appended = (tileweld.Int8KV(B, KV, LENGTH, D, DV, **options) for _ in range(2))
    if "keys" in options and "group" not in options:
        for cache in (at_once, appended):
            cache.update(k[:, :, :12], v[:, :, :12], torch.arange(12))
            assert cache.key_scales.shape == (B, KV, 1, D)
    expected = at_once.update(k, v, torch.arange(LENGTH))
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 20), (20, LENGTH)):
        got = appended.update(k[:, :, start:stop], v[:, :, start:stop], torch.arange(start, stop))
    assert all(map(torch.equal, at_once.tensors, appended.tensors)) and all(map(torch.equal, got, expected))


def attend(cache, q, k, v, positions):
    k, v = cache.update(k, v, positions)
    mask = torch.arange(k.shape[2])[None, :] <= positions[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_loop_is_the_eager_one(dtype, options):
    """and it reads int8: the graph has no dequantised copy of the cache."""
    torch._dynamo.reset()
    eager, compiled = (tileweld.Int8KV(B, KV, LENGTH, D, DV, dtype=dtype, **options) for _ in range(2))
    step = torch.compile(attend, backend="tileweld", dynamic=False)
    with torch.no_grad():
        for positions in (torch.arange(6), *(torch.tensor([n]) for n in range(6, 10))):
            q, k, v = (torch.randn(B, heads, len(positions), width).to(dtype) for heads, width in ((HEADS, D), (KV, D), (KV, DV)))
            expected = attend(eager, q, k, v, positions)
            torch.testing.assert_close(step(compiled, q, k, v, positions), expected, atol=2e-5 if dtype == torch.float32 else 3e-2, rtol=1e-5)
    for a, b in zip(eager.tensors, compiled.tensors):  # a kernel may give the last digit of a scale another value, and a number at a half another neighbour
        assert (a.float() - b.float()).abs().max() <= 1 if a.dtype == torch.int8 else torch.allclose(a, b, rtol=1e-5, atol=1e-7)
        assert a.dtype != torch.int8 or (a != b).float().mean() < 0.01
    report = tileweld.explain(attend, compiled, q, k, v, positions)
    (attention,) = [n for n in report.graphs[-1].graph.nodes if n.target in (torch.ops.tileweld.attention.default, torch.ops.tileweld.attention_keys.default)]
    assert [a.meta["val"].dtype for a in attention.args[1:3]] == [torch.int8] * 2
    assert any("int8" in source.detail for source in report.sources)


@pytest.mark.parametrize(("options", "extra"), [*zip(OPTIONS, [8 * LENGTH, 16 * LENGTH, 4 * LENGTH + 4 * D, 8 * LENGTH + 8 * D, 4 * LENGTH + 4 * D * (6 + 4), 8 * LENGTH + 8 * D * 5 + 4 * D * (5 + 2)])], ids=str)
def test_reset_and_bytes(options, extra):
    cache = tileweld.Int8KV(B, KV, LENGTH, D, **options)
    cache.update(torch.randn(B, KV, 3, D), torch.randn(B, KV, 3, D), torch.arange(3))
    assert cache.bytes == B * KV * (2 * LENGTH * D + extra)
    cache.reset()
    assert not any(x.any() for x in cache.tensors) and not cache.has_range
    cache.update(torch.randn(B, KV, 3, D), torch.randn(B, KV, 3, D), torch.arange(3))
    assert cache.key_scales.any()


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(0, 2**31), st.booleans(), st.sampled_from([1, 3, 4, 8, 40]), st.sampled_from([torch.float32, torch.bfloat16]), st.floats(-4, 4), st.floats(-3, 3))
def test_groups_have_their_own_range_and_the_newest_tokens_are_exact(data, seed, asymmetric, group, dtype, magnitude, centre):
    k = ((torch.randn(2, KV, LENGTH, D, generator=torch.Generator().manual_seed(seed)) + centre) * 10**magnitude).to(dtype)
    cache, filled = tileweld.Int8KV(2, KV, LENGTH, D, dtype=dtype, asymmetric=asymmetric, keys="channel", group=group), 0
    while filled < LENGTH:
        n = data.draw(st.integers(1, min(LENGTH - filled, 9)))
        read, _ = cache.update(k[:, :, filled:filled + n], k[:, :, filled:filled + n], torch.arange(filled, filled + n))
        filled += n
        old = max(filled - group, 0)
        assert torch.equal(read[:, :, old:filled], k[:, :, old:filled])
        assert not cache.keys[:, :, old:].any() or (cache.keys[:, :, filled:] == 0).all()
        if old:
            members = (k[:, :, g * group:min((g + 1) * group, filled)].double() for g in range(-(-old // group)))
            span = torch.stack([(x.amax(2) - x.amin(2)) / 255 if asymmetric else x.abs().amax(2) / 127 for x in members], 2)
            assert torch.allclose(cache.key_scales[:, :, : span.shape[2]].double(), span, rtol=1e-5, atol=1e-12)
            error, step = (read[:, :, :old].double() - k[:, :, :old].double()).abs(), span.repeat_interleave(group, 2)[:, :, :old]
            assert (error <= 0.5 * step + (1e-5 if dtype == torch.float32 else 5e-3) * k[:, :, :old].double().abs() + 1e-4 * step + 1e-5 * k.double().abs().amax()).all()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("steps", [[LENGTH], [1] * LENGTH, [10, 1, 13]])
def test_groups_of_zeros_constants_and_of_what_is_not_finite(asymmetric, steps):
    """Zeros and constants are exact; an inf or a NaN is exact among the newest, and then makes its channel of its group NaN, nothing else."""
    k = torch.randn(1, 1, LENGTH, D)
    k[..., 0], k[..., 1], k[0, 0, 5, 2], k[0, 0, 6, 3], k[0, 0, LENGTH - 1, 4] = 0, 2.5, math.inf, math.nan, math.nan
    cache, start = tileweld.Int8KV(1, 1, LENGTH, D, asymmetric=asymmetric, keys="channel", group=4), 0
    for n in steps:
        read, _ = cache.update(k[:, :, start:start + n], k[:, :, start:start + n], torch.arange(start, start + n))
        start += n
    assert (read[..., 0] == 0).all() and torch.allclose(read[..., 1], k[..., 1], atol=1e-6 if asymmetric else 1e-6)
    expected = torch.zeros(LENGTH, D, dtype=torch.bool)
    expected[4:8, 2:4] = expected[LENGTH - 1, 4] = True
    assert torch.equal(read[0, 0].isnan(), expected)
    cache.reset()
    assert cache.update(torch.ones(1, 1, 6, D), torch.ones(1, 1, 6, D), torch.arange(6))[0][:, :, :6].sub(1).abs().max() < 1e-6
