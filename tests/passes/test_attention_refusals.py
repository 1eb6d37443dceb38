"""Legality of the attention rewrite: each rule refuses with its reason and the user's line, and nothing ever changes a result."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

B, H, T, S, D = 2, 4, 6, 9, 8
SCALE = D**-0.5
INF = math.inf
LOWEST = torch.finfo(torch.float32).min


def attend(scores, v):
    return torch.softmax(scores, -1) @ v


def qkv(keys=S, value_width=D):
    return torch.randn(B, H, T, D), torch.randn(B, H, keys, D), torch.randn(B, H, keys, value_width)


# ---------------------------------------------------------------- refusals


def weights_returned(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v, weights


def weights_averaged(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v, weights.mean(1)


def weights_used_twice(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v, weights @ k


def scores_returned(q, k, v):
    scores = q @ k.mT * SCALE
    return attend(scores, v), scores


def raw_scores_reduced(q, k, v):
    product = q @ k.mT
    return attend(product * SCALE, v), product.sum()


def top_k(q, k, v):
    scores = q @ k.mT
    return attend(scores.masked_fill(scores < scores.topk(3, -1).values[..., -1:], -INF), v)


def over_queries(q, k, v):
    return torch.softmax(q @ k.mT, -2) @ v


def over_heads(q, k, v):
    return torch.softmax(q @ k.mT, 1) @ v


def weights_transposed(q, k, v):
    return torch.softmax(q @ k[:, :, :T].mT, -1).mT @ v[:, :, :T]


def gated(q, k, v):
    return (torch.softmax(q @ k.mT, -1) * torch.arange(4.0).view(1, H, 1, 1)) @ v


def second_mask(q, k, v):
    return torch.softmax(q @ k.mT, -1).tril() @ v


def nan_to_num(q, k, v):
    return torch.nan_to_num(torch.softmax((q @ k.mT).masked_fill(torch.arange(S) > 2, -INF), -1)) @ v


def normalised_twice(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


def dropout(q, k, v):
    torch.manual_seed(0)
    return F.dropout(torch.softmax(q @ k.mT, -1), 1e-9, training=True) @ v


def library_dropout(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9)


def integer_weights(q, k, v):
    return (torch.softmax(q @ k.mT, -1) > 0.5).to(torch.int32).float() @ v


def values_with_a_batch_of_their_own(q, k, v):
    return torch.softmax(q[:1, :1] @ k[:1, :1].mT, -1) @ v


def column_that_stays(q, k, v):
    return torch.softmax(torch.cat([q @ k.mT, torch.zeros(B, H, T, 1)], -1), -1) @ torch.cat([v, v[:, :, :1]], 2)


def weights_sliced(q, k, v):
    return torch.softmax(q @ k.mT, -1)[..., : S - 2] @ v[:, :, : S - 2]


def product_of_products(q, k, v):
    return attend((q @ k.mT) * (k[:, :, :T] @ q.mT[..., :T]).sum(-1, keepdim=True).tanh() * (q @ v.mT), v)


def residual_in_the_product(q, k, v):
    weights = torch.softmax(torch.bmm(q[0], k[0].mT), -1)
    return torch.baddbmm(q[0], weights, v[0])


def unknown_function(q, k, v):
    return attend(torch.round(q @ k.mT), v)


def heads_mixed_into_positions(q, k, v):
    return attend(q.reshape(B, H, D, T).mT @ k.mT, v)


def logsumexp_of_finite_masks(q, k, v):
    scores = (q @ k.mT).masked_fill((torch.arange(S) > 2) & (torch.arange(T)[:, None] > 1), -1e9)
    scores = scores.masked_fill(torch.arange(T)[:, None] == 3, -1e9)
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v


MIX = nn.Parameter(torch.randn(H, H, generator=torch.Generator().manual_seed(0)))


def heads_mixed_in_the_scores(q, k, v):
    return attend(torch.einsum("gh,bhij->bgij", MIX, q @ k.mT), v)


def heads_mixed_in_the_weights(q, k, v):
    return torch.einsum("gh,bhij->bgij", MIX, torch.softmax(q @ k.mT, -1)) @ v


def heads_mixed_by_a_linear(q, k, v):
    return attend(F.linear((q @ k.mT).permute(0, 2, 3, 1), MIX).permute(0, 3, 1, 2), v)


def differential(q, k, v):
    return (torch.softmax(q @ k.mT, -1) - 0.3 * torch.softmax((q * 0.5).tanh() @ k.mT, -1)) @ v


REFUSALS = {
    heads_mixed_in_the_scores: "mixes the scores of all heads before the softmax",
    heads_mixed_in_the_weights: "mixes the weights of all heads before v",
    heads_mixed_by_a_linear: "mixes the scores of all heads before the softmax",
    weights_returned: "the attention weights are also used outside the core, by the graph's output",
    weights_averaged: "the attention weights are also used outside the core, by mean",
    weights_used_twice: "the attention weights are also used outside the core, by matmul",
    scores_returned: "the attention scores are also used outside the core, by the graph's output",
    raw_scores_reduced: "the attention scores are also used outside the core, by sum",
    top_k: "the attention scores are also used outside the core, by topk",
    over_queries: "the softmax runs over dim 2 of the scores, the contraction with v sums over another",
    over_heads: "the dim of the softmax is no position of k",
    weights_transposed: "the softmax runs over dim 3 of the scores, the contraction with v sums over another",
    gated: "mul stands between the softmax and v",
    second_mask: "tril stands between the softmax and v",
    nan_to_num: "nan_to_num stands between the softmax and v",
    normalised_twice: "the attention weights are also used outside the core",
    dropout: "dropout of 1e-09 on the attention weights",
    library_dropout: "dropout of 1e-09 on the attention weights",
    integer_weights: "gt stands between the softmax and v",
    values_with_a_batch_of_their_own: "v has batch dims that the attention weights lack",
    column_that_stays: "",
    weights_sliced: "the attention weights are sliced before v",
    product_of_products: "several products of q and k",
    residual_in_the_product: "is no plain product of weights and values",
    unknown_function: "round between the product of q and k and the softmax has no scalar expression",
    logsumexp_of_finite_masks: "a softmax without its maximum subtracted",
}


@pytest.mark.parametrize("core", REFUSALS, ids=lambda f: f.__name__)
def test_refused_with_reason_and_line(core, compare):
    report = compare(core, *qkv(), refused=REFUSALS[core])
    (refusal,) = [r for r in report.refusals if r.rewrite == "attention"]
    assert "test_attention_refusals.py:" in refusal.source and core.__name__ in refusal.source


def test_weights_that_are_combined_have_their_own_cure(compare):
    report = compare(differential, *qkv(), fused=None)
    assert {r.cure for r in report.refusals if r.rewrite == "attention"} == {"multiply each of the two weights with v, and combine the products"}
    assert compare(lambda q, k, v: attend(q @ k.mT, v) - 0.3 * attend((q * 0.5).tanh() @ k.mT, v), *qkv(), fused=2)
    (gate,) = [r for r in compare(gated, *qkv(), refused="mul stands").refusals if r.rewrite == "attention"]
    assert gate.cure == "apply it to the scores or to the output instead"


def test_strict_raises_the_refusal(compare):
    with pytest.raises(Exception, match="attention refused: mul stands between the softmax and v"):
        compare(gated, *qkv(), strict=True)


# ---------------------------------------------------------------- no noise


def router(x, weight, experts):
    probabilities = torch.softmax(x @ weight, -1)
    gate, chosen = probabilities.topk(2, -1)
    return torch.einsum("btk,btkd->btd", gate / gate.sum(-1, keepdim=True), experts[chosen])


OTHERS = {
    "classifier": (lambda x, w: torch.softmax(x @ w, -1), torch.randn(B, T, D), nn.Parameter(torch.randn(D, 5))),
    "linear_classifier": (lambda x, w: torch.softmax(F.linear(x, w.T), -1), torch.randn(B, T, D), nn.Parameter(torch.randn(D, 5))),
    "router": (router, torch.randn(B, T, D), nn.Parameter(torch.randn(D, 5)), torch.randn(5, 7)),
    "linear_attention": (lambda q, k, v: torch.softmax(q, -1) @ (torch.softmax(k, -2).mT @ v), *(torch.randn(B, T, D) for _ in range(3))),
    "pooling": (lambda x, w: (torch.softmax(F.linear(x, w.T), 1) * x[..., :5]).sum(1), torch.randn(B, T, D), nn.Parameter(torch.randn(D, 5))),
    "expected_value": (lambda x, w: torch.softmax(F.linear(x, w.T), -1) @ torch.arange(5.0), torch.randn(B, T, D), nn.Parameter(torch.randn(D, 5))),
    "linear_of_pairs": (lambda z, w, v: torch.softmax(F.linear(z, w).permute(0, 3, 1, 2), -1) @ v, torch.randn(B, T, S, 3), nn.Parameter(torch.randn(H, 3)), torch.randn(B, H, S, D)),
    "entropy": (lambda x: -(torch.softmax(x, -1) * torch.log_softmax(x, -1)).sum(-1), torch.randn(B, D)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_softmaxes_are_not_talked_about(case, compare):
    core, *inputs = OTHERS[case]
    report = compare(core, *inputs, fused=0)
    assert not report.refusals


# ---------------------------------------------------------------- rows that see no key, and masks of all sizes

FILLS = [-INF, LOWEST, -1e30, -1e9, -1e4, -1e3]


def masks():
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, :3] = False  # left padding: with a causal mask the first rows see nothing
    keep[1] = False
    causal = torch.ones(T, S, dtype=torch.bool).tril()
    return {"padding": keep[:, None, None], "causal": causal, "both": causal & keep[:, None, None]}


MASKINGS = {
    "fill": lambda s, m, f: s.masked_fill(~m, f),
    "where": lambda s, m, f: torch.where(m, s, f),
    "add": lambda s, m, f: s + torch.zeros(m.shape).masked_fill(~m, f),
    "add_product": lambda s, m, f: s + (1.0 - m.float()) * max(f, LOWEST),
    "fill_then_causal": lambda s, m, f: s.masked_fill(~m, f).masked_fill(torch.ones(T, S).triu(1).bool(), f),
    "two_adds": lambda s, m, f: s + torch.where(m, 0.0, f) + torch.where(torch.tril(torch.ones(T, S)) > 0, 0.0, f),
    "sum_of_masks": lambda s, m, f: s + (torch.where(m, 0.0, f) + torch.where(torch.tril(torch.ones(T, S)) > 0, 0.0, f)),
    "minimum_of_masks": lambda s, m, f: s + torch.minimum(torch.where(m, 0.0, f), torch.where(torch.tril(torch.ones(T, S)) > 0, 0.0, f)),
    "finite_and_infinite": lambda s, m, f: s + torch.where(m, 0.0, f) + torch.where(torch.tril(torch.ones(T, S)) > 0, 0.0, -INF),
    "infinite_and_finite": lambda s, m, f: s + torch.where(m, 0.0, -INF) + torch.where(torch.tril(torch.ones(T, S)) > 0, 0.0, f),
    "before_softcap": lambda s, m, f: 5 * torch.tanh(s.masked_fill(~m, f) / 5),
    "after_softcap": lambda s, m, f: (5 * torch.tanh(s / 5)).masked_fill(~m, f),
    "before_scale": lambda s, m, f: s.masked_fill(~m, f) * SCALE,
    "before_enlarging": lambda s, m, f: s.masked_fill(~m, f) * 4,
    "then_clamped": lambda s, m, f: torch.clamp(s.masked_fill(~m, f), min=LOWEST),
    "then_maximum": lambda s, m, f: torch.max(s + torch.where(m, 0.0, f), torch.tensor(LOWEST)),
}


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("fill", [-INF, LOWEST, -1e9, -1e4], ids=str)
def test_masked_rows_keep_eagers_value(masking, fill, compare):
    """NaN where eager gives NaN, a mean over all keys where it gives that, also when rows see no key."""
    for mask in (masks()["padding"], masks()["both"]):
        compare(lambda q, k, v, m: attend(MASKINGS[masking](q @ k.mT, m, fill), v), *qkv(), mask, fused=1, tolerance=3e-5)


@pytest.mark.parametrize("fill", FILLS, ids=str)
def test_additive_masks_from_outside(fill, compare):
    """A captured float mask may hold -inf or finfo.min itself: twice finfo.min is -inf, and no fill may hide that."""
    for mask in masks().values():
        outside = torch.zeros(mask.shape).masked_fill(~mask, fill)
        after = torch.ones(T, S).triu(1).bool()
        for core in (
            lambda q, k, v, m: attend(q @ k.mT + m, v),
            lambda q, k, v, m: attend((q @ k.mT).masked_fill(after, fill) + m, v),
            lambda q, k, v, m: attend((q @ k.mT + m).masked_fill(after, fill), v),
            lambda q, k, v, m: attend(q @ k.mT + m + torch.zeros(T, S).masked_fill(after, fill), v),
            lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m.expand(B, H, T, S)),
        ):
            compare(core, *qkv(), outside, fused=1, tolerance=3e-5)


@pytest.mark.parametrize("fill", FILLS, ids=str)
def test_huge_scores(fill, compare):
    """Scores of 1e5 and 1e11: a mask of -1e4 or -1e9 hides nothing there, and eager's softmax says so."""
    for size in (300.0, 3e5):
        q, k, v = qkv()
        compare(lambda q, k, v: attend((q @ k.mT).masked_fill(torch.ones(T, S).triu(1).bool(), fill), v), q * size, k * size, v, fused=1, tolerance=1e-4)


@pytest.mark.parametrize("fill", FILLS, ids=str)
def test_exponentials_without_their_maximum(fill, compare):
    """exp(x) / sum(exp(x)) is 0/0 where a row sees nothing, for finite fills too."""
    def core(q, k, v, m):
        exponentials = torch.exp((q @ k.mT * SCALE).masked_fill(~m, fill))
        return (exponentials / exponentials.sum(-1, keepdim=True)) @ v

    for mask in masks().values():
        compare(core, *qkv(), mask, fused=1)


def test_special_values(compare):
    q, k, v = qkv()
    compare(lambda q, k, v: attend(q @ k.mT, v), torch.full_like(q, math.nan), k, v, fused=1)
    q[0, 0, 0, 0] = INF
    compare(lambda q, k, v: attend(q @ k.mT, v), q, k, v, fused=1)
    v[:, :, 3] = math.nan
    compare(lambda q, k, v: attend((q @ k.mT).masked_fill(torch.arange(S) == 3, -INF), v), torch.randn_like(q), k, v, fused=1)  # 0 * NaN
    k[:, :, 3] = math.nan
    compare(lambda q, k, v: attend((q @ k.mT).masked_fill(torch.arange(S) == 3, -INF), v), torch.randn_like(q), k, torch.randn_like(v), fused=1)


@pytest.mark.parametrize("fill", [-INF, LOWEST, -1e9, -1e4], ids=str)
def test_the_generated_kernel_keeps_them_too(fill):
    """The same on the C++ target, or on the definition where the machine has no compiler."""
    from tileweld.compiler.backend import tileweld
    from tileweld.compiler.report import Report

    def core(q, k, v, m):
        return attend((q @ k.mT * SCALE).masked_fill(~m, fill), v)

    for mask in masks().values():
        q, k, v = qkv()
        report = Report()
        ours = torch.compile(core, backend=lambda gm, x, report=report: tileweld(gm, x, report=report))(q, k, v, mask)
        eager = core(q, k, v, mask)
        assert report.counts["attention"] == 1
        assert torch.equal(ours.isnan(), eager.isnan())
        torch.testing.assert_close(ours.nan_to_num(), eager.nan_to_num(), rtol=1e-5, atol=1e-5)
