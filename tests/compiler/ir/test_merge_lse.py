"""Chunks of keys merged by log-sum-exp are attention over all of them: associative, and whatever the cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tileweld.compiler.ir.merge_lse import merge_lse


def chunk(q, k, v, mask):
    scores = (q @ k.mT).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def draw(seed, tokens=5, keys=24, width=8, hidden=0.3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, n, width, generator=generator, dtype=torch.float64) for n in (tokens, keys, keys))
    mask = torch.rand(2, 3, tokens, keys, generator=generator) > hidden
    return (8 * q).to(dtype), k.to(dtype), v.to(dtype), mask


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 24), max_size=6), st.floats(0, 0.95), st.randoms(use_true_random=False))
def test_the_cut_and_the_order_do_not_matter(seed, cuts, hidden, random):
    q, k, v, mask = draw(seed, hidden=hidden)
    ends = [0, *sorted(cuts), 24]
    parts = [chunk(q, k[..., a:b, :], v[..., a:b, :], mask[..., a:b]) for a, b in zip(ends, ends[1:])]  # some are empty
    random.shuffle(parts)
    out, lse = merge_lse(*zip(*parts))
    whole, sums = chunk(q, k, v, mask)
    torch.testing.assert_close(lse, sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, torch.where(mask.any(-1, keepdim=True), whole, 0.0), rtol=1e-10, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 24), st.integers(0, 24))
def test_associative(seed, first, second):
    q, k, v, mask = draw(seed)
    low, high = sorted((first, second))
    a, b, c = (chunk(q, k[..., s, :], v[..., s, :], mask[..., s]) for s in (slice(0, low), slice(low, high), slice(high, 24)))
    left, right = merge_lse(*zip(merge_lse(*zip(a, b)), c)), merge_lse(*zip(a, merge_lse(*zip(b, c))))
    for x, y in zip(left, right):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_huge_scores_and_half_types():
    q, k, v, mask = draw(0, hidden=0.0, dtype=torch.bfloat16)
    parts = [chunk(q.float() * 1e4, k[..., s, :].float(), v[..., s, :].float(), mask[..., s]) for s in (slice(0, 9), slice(9, 24))]
    out, lse = merge_lse([o.bfloat16() for o, _ in parts], [s for _, s in parts])
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and out.isfinite().all()
    torch.testing.assert_close(out.float(), chunk(q.float() * 1e4, k.float(), v.float(), mask)[0], rtol=1e-2, atol=1e-2)


def test_rows_without_a_key_are_zero():
    q, k, v, mask = draw(1)
    mask[:, :, 0] = False
    out, lse = merge_lse(*zip(*(chunk(q, k[..., s, :], v[..., s, :], mask[..., s]) for s in (slice(0, 9), slice(9, 24)))))
    assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -torch.inf).all()


@pytest.mark.parametrize("outs, lses", [([], []), ([torch.zeros(2, 3)], [])])
def test_a_chunk_needs_both(outs, lses):
    with pytest.raises(ValueError, match="expected one of each for every chunk"):
        merge_lse(outs, lses)


def test_an_absorbed_prefix_and_naive_new_tokens_are_naive_over_all():
    """Multi-head latent attention: the prefix in chunks against the latent, the new tokens against expanded keys, merged."""
    generator = torch.Generator().manual_seed(0)
    heads, latent, nope, prefix, new = 4, 16, 6, 30, 7
    q, c = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((1, heads, new, nope), (1, 1, prefix + new, latent)))
    up_k, up_v = (torch.randn(heads, nope, latent, generator=generator, dtype=torch.float64) for _ in range(2))
    causal = torch.arange(prefix + new) <= torch.arange(prefix, prefix + new)[:, None]
    whole, _ = chunk(q, c @ up_k.mT, c @ up_v.mT, causal)
    parts = []
    for s in (slice(0, 11), slice(11, prefix)):
        out, lse = chunk(q @ up_k, c[:, :, s], c[:, :, s], causal[:, s])
        parts.append((out @ up_v.mT, lse))
    s = slice(prefix, None)
    parts.append(chunk(q, c[:, :, s] @ up_k.mT, c[:, :, s] @ up_v.mT, causal[:, s]))
    torch.testing.assert_close(merge_lse(*zip(*parts))[0], whole, rtol=1e-10, atol=1e-12)
