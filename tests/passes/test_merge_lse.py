"""merge_lse: attention in chunks of keys is found however it is written, keeps its result, and is left alone where it is something else."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import tileweld
from tileweld.passes import attention, merge_lse  # noqa: F401 (the pass by its name)

from .conftest import error, rewritten


def scores(q, k, n=0, past=None):
    """0.3 q k^T; past: causal, the keys of chunk n stand 7 n further."""
    s = q @ k.mT * 0.3
    if past is None:
        return s
    i, j = torch.arange(q.shape[-2])[:, None] + past, torch.arange(k.shape[-2]) + 7 * n
    return s.masked_fill(j > i, -math.inf)


def largest_off(q, ks, vs, past=None):
    parts = [scores(q, k, n, past) for n, k in enumerate(ks)]
    lses, outs = [s.logsumexp(-1) for s in parts], [s.softmax(-1) @ v for s, v in zip(parts, vs)]
    top = torch.stack(lses).amax(0)
    weights = [torch.exp(x - top) for x in lses]
    return sum(o * (w / sum(weights)).unsqueeze(-1) for o, w in zip(outs, weights))


def flash(q, ks, vs, past=None):
    m = torch.full((*q.shape[:-1], 1), -math.inf, dtype=q.dtype)
    l, acc = torch.zeros_like(m), torch.zeros(*q.shape[:-1], vs[0].shape[-1], dtype=q.dtype)
    for n, (k, v) in enumerate(zip(ks, vs)):
        s = scores(q, k, n, past)
        new = torch.maximum(m, s.amax(-1, keepdim=True))
        p, shrink = torch.exp(s - new), torch.exp(m - new)
        l, acc, m = l * shrink + p.sum(-1, keepdim=True), acc * shrink + p @ v, new
    return acc / l, (m + torch.log(l)).squeeze(-1)


def ring(q, ks, vs, past=None):
    out = lse = None
    for n, (k, v) in enumerate(zip(ks, vs)):
        s = scores(q, k, n, past)
        block, o = torch.logsumexp(s, -1, keepdim=True), torch.softmax(s, -1) @ v
        if out is None:
            out, lse = o, block
        else:
            out, lse = out - torch.sigmoid(block - lse) * (out - o), lse - F.logsigmoid(lse - block)
    return out


def stacked(q, ks, vs, past=None):
    parts = [scores(q, k, n, past) for n, k in enumerate(ks)]
    weights = torch.softmax(torch.stack([s.logsumexp(-1) for s in parts]), 0)
    return (weights.unsqueeze(-1) * torch.stack([s.softmax(-1) @ v for s, v in zip(parts, vs)])).sum(0)


def side_by_side(q, ks, vs, past=None):
    parts = [scores(q, k, n, past) for n, k in enumerate(ks)]
    tops = [s.max(-1, keepdim=True)[0] for s in parts]
    exps = [torch.exp(s - t) for s, t in zip(parts, tops)]
    lses = torch.cat([t + e.sum(-1, keepdim=True).log() for t, e in zip(tops, exps)], -1)
    weights = torch.exp(lses - lses.logsumexp(-1, keepdim=True))
    return sum(weights[..., n, None] * (e @ v) / e.sum(-1, keepdim=True) for n, (e, v) in enumerate(zip(exps, vs)))


def in_pairs(q, ks, vs, past=None):
    """One after the other by logaddexp, the layout [B, T, H, D]."""
    out = lse = None
    for n, (k, v) in enumerate(zip(ks, vs)):
        s = scores(q, k, n, past).permute(0, 2, 1, 3)
        block, o = s.logsumexp(-1), torch.einsum("bthj,bjhd->bthd", s.softmax(-1), v.transpose(1, 2))
        if out is None:
            out, lse = o, block
        else:
            both = torch.logaddexp(lse, block)
            out, lse = torch.exp(lse - both)[..., None] * out + (block - both).exp().unsqueeze(-1) * o, both
    return out.transpose(1, 2)


SPELLINGS = [largest_off, flash, ring, stacked, side_by_side, in_pairs]


def draw(seed=0, sizes=(7, 7, 5), tokens=5, heads=(3, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return make(2, heads[0], tokens, 8), [make(2, heads[1], n, 8) for n in sizes], [make(2, heads[1], n, 6) for n in sizes]


def check(fn, *args, chunks=3, merged=1, **options):
    with torch.no_grad():
        exact = fn(*args)
    got, report = rewritten(fn, *args, verify=True, **options)
    assert error(got, exact) <= 1e-10
    assert (report.counts["merge_lse"], report.counts["attention"]) == (merged, chunks), [(r.rewrite, r.reason) for r in report.refusals]
    return report


@pytest.mark.parametrize("past", [None, 19], ids=["all", "causal"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_is_one_kernel_a_chunk_and_one_that_merges(spelling, past):
    report = check(lambda q, ks, vs: spelling(q, ks, vs, past), *draw())
    targets = [str(n.target) for n in report.graphs[0].graph.nodes if n.op == "call_function"]
    assert targets.count("tileweld.attention_lse.default") == 3 and targets.count("tileweld.merge_lse.default") == 1
    assert not {"aten.exp.default", "aten.logsumexp.default", "aten.softmax.int", "aten.sigmoid.default", "aten.amax.default"} & set(targets)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 4), st.sampled_from(SPELLINGS), st.booleans())
def test_fuzzed(seed, sizes, tokens, spelling, single):
    dtype = torch.float32 if single else torch.float64
    args = draw(seed, sizes, tokens, dtype=dtype)
    exact = torch.softmax(torch.cat([scores(args[0], k) for k in args[1]], -1).double(), -1) @ torch.cat(args[2], 2).double()
    got, report = rewritten(spelling, *args)
    assert error(got[0] if isinstance(got, tuple) else got, exact) <= (1e-5 if single else 1e-10) * max(1, exact.abs().max())
    assert report.counts["merge_lse"] == 1 and report.counts["attention"] == len(sizes)


@pytest.mark.parametrize("target", ["cpp", "triton"])
@pytest.mark.parametrize("spelling", [largest_off, flash], ids=lambda f: f.__name__)
def test_the_kernels_of_both_targets(spelling, target):
    args = draw(dtype=torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda q, ks, vs: spelling(q, ks, vs, 19), backend="tileweld", options={"target": target, "strict": True})
        torch.testing.assert_close(compiled(*args), spelling(*args, 19), rtol=1e-5, atol=1e-5)
        report = tileweld.explain(lambda q, ks, vs: spelling(q, ks, vs, 19), *args, options={"target": target})
    names = [k.implementation for k in report.kernels]
    assert sum(f"{target}:attention" in n for n in names) == 3
    (total,) = [s.detail.splitlines()[-1] for s in report.sources if s.detail.count("out0[x0, x1, x2, x3] =") and s.detail.count("*c") >= 3]  # one pass over the chunks' results; the rest is as small as the weights
    assert len(names) <= 8 and set(report.fallbacks) <= {"amax", "sum"}, (names, report.fallbacks, total)


def test_sums_divided_behind_the_product_are_plain_attention():
    """exp(s - max) v / sum: one chunk, no log-sum-exp."""
    def late(q, k, v):
        s = scores(q, k)
        p = torch.exp(s - s.amax(-1, keepdim=True))
        return (p @ v) / p.sum(-1, keepdim=True)

    q, (k, *_), (v, *_) = draw()
    report = check(late, q, k, v, chunks=1)
    assert not any("lse" in str(n.target) for n in report.graphs[0].graph.nodes)


def test_a_log_sum_exp_that_leaves_is_a_second_result():
    def both(q, k, v):
        s = scores(q, k, 0, 3)
        return s.softmax(-1) @ v, s.logsumexp(-1)

    q, (k, *_), (v, *_) = draw()
    report = check(both, q, k, v, chunks=1, merged=0)
    assert "with log-sum-exp" in report.fusions[0].detail


def test_grouped_heads_and_half_types():
    def grouped(q, ks, vs):
        wide = lambda x: x.repeat_interleave(2, 1)
        return largest_off(q.float(), [wide(k).float() for k in ks], [wide(v).float() for v in vs]).to(q.dtype)

    args = draw(heads=(4, 2), dtype=torch.bfloat16)
    with torch.no_grad():
        exact = largest_off(*(args[0].double(), *([x.repeat_interleave(2, 1).double() for x in xs] for xs in args[1:])))
    got, report = rewritten(grouped, *args)
    assert report.counts["merge_lse"] == 1 and "heads=4/2" in next(f.detail for f in report.fusions if f.rewrite == "attention")
    assert error(got, exact) <= 0.02


def test_a_row_that_sees_no_key_of_a_chunk_is_as_the_model_has_it():
    """exp of running maxima: an empty later chunk counts nothing. A softmax of nothing is NaN, and stays it."""
    args = draw()
    for spelling, is_nan in ((flash, False), (largest_off, True)):
        with torch.no_grad():
            exact = spelling(*args, 3)  # token 0 sees keys 0..3, nothing of chunks 1 and 2
        got, report = rewritten(lambda q, ks, vs: spelling(q, ks, vs, 3), *args)
        got, exact = (x[0] if isinstance(x, tuple) else x for x in (got, exact))
        assert report.counts["merge_lse"] == 1 and bool(exact.isnan().any()) == is_nan and torch.equal(got.isnan(), exact.isnan())
        assert error(got.nan_to_num(), exact.nan_to_num()) <= 1e-10


# ---------------------------------------------------------------- what is none


def wrong_weights(q, ks, vs):
    """exp(lse) without the sum over both."""
    parts = [scores(q, k) for k in ks]
    return sum(torch.sigmoid(s.logsumexp(-1)).unsqueeze(-1) * (s.softmax(-1) @ v) for s, v in zip(parts, vs))


def forgotten_shrink(q, ks, vs):
    """The sum is not rescaled to the new maximum: depends on the maxima."""
    m, l, acc = scores(q, ks[0]).amax(-1, keepdim=True), 0, 0
    for k, v in zip(ks, vs):
        s = scores(q, k)
        new = torch.maximum(m, s.amax(-1, keepdim=True))
        p = torch.exp(s - new)
        l, acc, m = l + p.sum(-1, keepdim=True), acc * torch.exp(m - new) + p @ v, new
    return acc / l


def swapped(q, ks, vs):
    """Each chunk with the other's weight."""
    a, b = (scores(q, k) for k in ks[:2])
    la, lb = a.logsumexp(-1, keepdim=True), b.logsumexp(-1, keepdim=True)
    return torch.sigmoid(lb - la) * (a.softmax(-1) @ vs[0]) + torch.sigmoid(la - lb) * (b.softmax(-1) @ vs[1])


def other_rows(q, ks, vs):
    """The weights of other rows: heads and tokens are exchanged."""
    parts = [scores(q, k) for k in ks]
    weights = torch.softmax(torch.stack([s.logsumexp(-1).transpose(1, 2) for s in parts]), 0)
    return sum(w.unsqueeze(-1) * (s.softmax(-1) @ v) for w, s, v in zip(weights, parts, vs))


@pytest.mark.parametrize("wrong", [wrong_weights, forgotten_shrink, swapped, other_rows], ids=lambda f: f.__name__)
def test_what_is_no_merge_is_left_alone(wrong):
    args = draw(tokens=3)
    with torch.no_grad():
        exact = wrong(*args)
    got, report = rewritten(wrong, *args)
    assert report.counts["merge_lse"] == 0 and error(got, exact) <= 1e-10


def test_scores_that_leave_are_refused():
    def leaving(q, ks, vs):
        parts = [scores(q, k) for k in ks]
        weights = torch.softmax(torch.stack([s.logsumexp(-1) for s in parts]), 0)
        return sum(w.unsqueeze(-1) * (s.softmax(-1) @ v) for w, s, v in zip(weights, parts, vs)), parts[0].sum()

    args = draw()
    got, report = rewritten(leaving, *args)
    assert report.counts["merge_lse"] == 0 and "also used" in next(r.reason for r in report.refusals if r.rewrite == "merge_lse")
    assert error(got, leaving(*args)) <= 1e-10


def test_training_is_refused():
    q, ks, vs = draw()
    got, report = rewritten(largest_off, q.requires_grad_(), ks, vs, grad=True)
    assert "has no gradient here" in next(r.reason for r in report.refusals if r.rewrite == "merge_lse") and not report.counts["attention"]
    (gradient,) = torch.autograd.grad(got.sum(), q)
    (exact,) = torch.autograd.grad(largest_off(q, ks, vs).sum(), q)
    assert error(gradient, exact) <= 1e-10
