"""The attention rewrite: every spelling of one core becomes tileweld::attention and keeps its value."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

B, H, T, S, D = 2, 4, 6, 9, 8
SCALE = D**-0.5
INF = math.inf


def attend(scores, v):
    return torch.softmax(scores, -1) @ v


def qkv(rows=T, keys=S, width=D, value_width=6):
    return torch.randn(B, H, rows, width), torch.randn(B, H, keys, width), torch.randn(B, H, keys, value_width)


def detail(report):
    (fusion,) = [f for f in report.fusions if f.rewrite == "attention"]
    return fusion.detail


# ---------------------------------------------------------------- the contraction of q and k

PRODUCTS = {
    "mT": lambda q, k: q @ k.mT,
    "transpose": lambda q, k: torch.matmul(q, k.transpose(-1, -2)),
    "permute": lambda q, k: q @ k.permute(0, 1, 3, 2),
    "movedim": lambda q, k: q @ k.movedim(-1, -2),
    "swapaxes": lambda q, k: q @ k.swapaxes(2, 3),
    "transposed_product": lambda q, k: (k @ q.mT).mT,
    "contiguous": lambda q, k: q @ k.mT.contiguous(),
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
    "einsum_spaces": lambda q, k: torch.einsum("b h i d, b h j d -> b h i j", q, k),
    "einsum_ellipsis": lambda q, k: torch.einsum("...id,...jd->...ij", q, k),
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(B, H, T, S),
    "baddbmm_beta_0": lambda q, k: torch.baddbmm(torch.empty(B * H, T, S), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.0, alpha=2.0).view(B, H, T, S) / 2,
    "grouped_5d": lambda q, k: (q.view(B, 2, 2, T, D) @ k.view(B, 2, 2, S, D).mT).flatten(1, 2),
    "through_bthd": lambda q, k: torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2).contiguous(), k.transpose(1, 2)),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_of_q_and_k(product, compare):
    report = compare(lambda q, k, v: attend(PRODUCTS[product](q, k) * SCALE, v), *qkv(), fused=1)
    assert detail(report) == f"score={SCALE!r}*s"


def test_beta_0_ignores_the_bias_even_where_it_is_nan(compare):
    def core(q, k, v):
        bias = torch.full((B * H, T, S), math.nan)
        return attend(torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.0, alpha=SCALE).view(B, H, T, S), v)

    compare(core, *qkv(), fused=1)


def test_baddbmm_adds_its_bias(compare):
    def core(q, k, v, alibi):
        return attend(alibi.baddbmm(q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=SCALE).view(B, H, T, S), v)

    compare(core, *qkv(), torch.randn(B * H, 1, S), fused=1)


def test_two_dims_and_three_dims(compare):
    q, k, v = qkv()
    compare(lambda q, k, v: torch.softmax(q.mm(k.t()) * SCALE, -1).mm(v), q[0, 0], k[0, 0], v[0, 0], fused=1)
    compare(lambda q, k, v: torch.bmm(torch.softmax(torch.bmm(q, k.mT) * SCALE, -1), v), q[0], k[0], v[0], fused=1)


def test_a_key_dim_that_is_not_last(compare):
    """The softmax runs over dim 2 of a product k q^T: positions are told by use, not by place."""
    compare(lambda q, k, v: torch.softmax(k @ q.mT * SCALE, -2).mT @ v, *qkv(), fused=1)
    compare(lambda q, k, v: torch.einsum("bhji,bhjd->bihd", torch.softmax(torch.einsum("bhjd,bhid->bhji", k, q), 2), v), *qkv(), fused=1)


def test_values_on_the_left(compare):
    compare(lambda q, k, v: (v.mT @ torch.softmax(q @ k.mT, -1).mT).mT, *qkv(), fused=1)


# ---------------------------------------------------------------- scale and casts

SCALES = {
    "after": lambda q, k: q @ k.mT * SCALE,
    "divided": lambda q, k: q @ k.mT / math.sqrt(D),
    "size_power": lambda q, k: q @ k.mT / q.size(-1) ** 0.5,
    "on_q": lambda q, k: (q * SCALE) @ k.mT,
    "on_k": lambda q, k: q @ (k / math.sqrt(D)).mT,
    "on_both": lambda q, k: (q * D**-0.25) @ (k * D**-0.25).mT,
    "on_k_transposed": lambda q, k: q @ (k.mT * SCALE),
    "tensor": lambda q, k: q @ k.mT / torch.sqrt(torch.tensor(float(D))),
    "before_and_after": lambda q, k: (q * 0.5) @ k.mT * (2 * SCALE),
    "einsum_then_mul": lambda q, k: torch.mul(SCALE, torch.einsum("bhid,bhjd->bhij", q, k)),
}


@pytest.mark.parametrize("scale", SCALES)
def test_scales(scale, compare):
    report = compare(lambda q, k, v: attend(SCALES[scale](q, k), v), *qkv(), fused=1)
    text, _, s = detail(report).removeprefix("score=").partition("*")
    if scale != "tensor":  # the root of a tensor stays a tensor of the model's
        assert s == "s" and float(text) == pytest.approx(SCALE, rel=1e-6)  # one constant, however often it was scaled


def test_a_learned_scale_is_captured(compare):
    report = compare(lambda q, k, v, w: attend((q * w[:, None, None]) @ k.mT, v), *qkv(), torch.rand(H), fused=1)
    assert "c0[h]" in detail(report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_at_most_twice_eagers_error(dtype):
    """fp16 and bf16, with every way to go through float32; the op rounds once, to the dtype that the model returns."""
    from tileweld.compiler.backend import tileweld
    from tileweld.compiler.report import Report

    def up(x):
        return x if x.dtype == torch.float64 else x.float()

    cores = {
        "plain": lambda q, k, v: attend(q @ k.mT * SCALE, v),
        "softmax in float32": lambda q, k, v: torch.softmax(up(q @ k.mT) * SCALE, -1).to(v.dtype) @ v,
        "all in float32": lambda q, k, v: attend(up(q) @ up(k).mT * SCALE, up(v)),
        "down at the end": lambda q, k, v: attend(up(q) @ up(k).mT * SCALE, up(v)).to(v.dtype),
        "softcap": lambda q, k, v: attend(torch.tanh(q @ k.mT * SCALE / 5) * 5, v),
        "causal, finfo.min": lambda q, k, v: attend((q @ k.mT * SCALE).masked_fill(torch.ones(T, S).triu(S - T + 1) > 0, torch.finfo(dtype).min), v),
    }
    inputs = [x.to(dtype) for x in qkv()]
    for name, core in cores.items():
        report = Report()
        with torch.no_grad():
            eager = core(*inputs)
            ours = torch.compile(core, backend=lambda gm, x, report=report: tileweld(gm, x, options={"target": "reference"}, report=report))(*inputs)
            exact = core(*(x.double() for x in inputs))
        assert report.counts["attention"] == 1 and ours.dtype == eager.dtype, name
        assert (ours.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max() + 1e-9, name


def test_float64(compare):
    compare(lambda q, k, v: attend(q @ k.mT * SCALE, v), *(x.double() for x in qkv()), fused=1, tolerance=1e-13)


# ---------------------------------------------------------------- the softmax

SOFTMAXES = {
    "function": lambda x: torch.softmax(x, -1),
    "method": lambda x: x.softmax(dim=3),
    "functional": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
    "module": nn.Softmax(dim=-1),
    "exp_over_sum": lambda x: torch.exp(x) / torch.exp(x).sum(-1, keepdim=True),
    "max_values": lambda x: (lambda e: e / e.sum(-1, keepdim=True))(torch.exp(x - x.max(-1, keepdim=True).values)),
    "max_first": lambda x: (lambda e: e / torch.sum(e, dim=-1, keepdim=True))(torch.exp(x - torch.max(x, dim=-1, keepdim=True)[0])),
    "amax": lambda x: (lambda e: e / e.sum(-1, True))((x - x.amax(-1, keepdim=True)).exp()),
    "amax_detached": lambda x: (lambda e: e / e.sum(-1, True))((x - x.amax(-1, keepdim=True).detach()).exp()),
    "logsumexp": lambda x: torch.exp(x - torch.logsumexp(x, -1, keepdim=True)),
    "shifted_twice": lambda x: torch.softmax(x - x.amax(-1, keepdim=True), -1),
}


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_softmax_spellings(softmax, compare):
    compare(lambda q, k, v: SOFTMAXES[softmax](q @ k.mT * SCALE) @ v, *qkv(), fused=1)


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_softmax_spellings_with_rows_that_see_no_key(softmax, compare):
    """-inf everywhere in a row: NaN in each spelling."""
    mask = torch.rand(B, 1, T, S) < 0.6
    mask[0, :, 2] = False
    compare(lambda q, k, v, m: SOFTMAXES[softmax]((q @ k.mT).masked_fill(~m, -INF)) @ v, *qkv(), mask, fused=1)


def test_dropout_that_does_nothing(compare):
    compare(lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.1, training=False) @ v, *qkv(), fused=1)
    compare(lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.0, training=True) @ v, *qkv(), fused=1)


# ---------------------------------------------------------------- score functions

SCORES = {
    "softcap": (lambda s: 30 * torch.tanh(s / 30), "30*tanh("),
    "clamp": (lambda s: s.clamp(-3, 3), "max(-3, s)"),
    "sigmoid": (lambda s: torch.sigmoid(s), "sigmoid(s)"),
    "square": (lambda s: s**2, "s*s"),
    "relu": (lambda s: F.relu(s), "relu(s)"),
    "leaky": (lambda s: torch.where(s > 0, s, 0.1 * s), "where(s > 0, s, 0.1*s)"),
    "distance": (lambda s: s - 0.25 * (torch.arange(T)[:, None] - torch.arange(S)).abs(), "abs(i - j)"),
    "symmetric_constant": (lambda s: s + math.log(2.0), "s + 0.693"),
}


@pytest.mark.parametrize("score", SCORES)
def test_score_functions(score, compare):
    function, text = SCORES[score]
    assert text in detail(compare(lambda q, k, v: attend(function(q @ k.mT), v), *qkv(), fused=1))


@pytest.mark.parametrize("dynamic", [None, True])
def test_scores_that_are_asked_for_their_sizes_alone(compare, dynamic):
    """Flaubert and XLM: the mask is expanded like the scores, and then written into them."""
    def attend(q, k, v, seen):
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
        hidden = (seen == 0).view(2, 1, 1, -1).expand_as(scores)
        scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
        return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)

    seen = torch.ones(2, 9, dtype=torch.int64)
    seen[0, :3] = 0
    compare(attend, *(torch.randn(2, 4, 9, 16) for _ in range(3)), seen, fused=1, dynamic=dynamic)


def test_bias_tensors_become_captures(compare):
    q, k, v = qkv()
    assert "c0[h, i, j]" in detail(compare(lambda q, k, v, b: attend(q @ k.mT + b, v), q, k, v, torch.randn(1, H, T, S), fused=1))
    assert "c0[j]" in detail(compare(lambda q, k, v, b: attend(q @ k.mT + b, v), q, k, v, torch.randn(S), fused=1))
    assert "c0[b, i]" in detail(compare(lambda q, k, v, b: attend(q @ k.mT + b, v), q, k, v, torch.randn(B, 1, T, 1), fused=1))


def test_scores_of_norms(compare):
    """-|q - k|^2 as 2 q.k - |q|^2 - |k|^2: two captures beside the product."""
    compare(lambda q, k, v: attend(2 * q @ k.mT - (q * q).sum(-1, keepdim=True) - (k * k).sum(-1)[:, :, None], v), *qkv(), fused=1)


def test_sum_of_two_products(compare):
    """Content and position logits, or nope and rope: one product of concatenated q and k."""
    def split(q, k, v):
        return attend((q[..., :5] @ k[..., :5].mT + q[..., 5:] @ k[..., 5:].mT) * SCALE, v)

    def shared_rope_key(q, k, v):  # one head of k_pe for all query heads, as in DeepSeek
        return attend((q[..., :5] @ k[..., :5].mT + torch.einsum("bhid,bjd->bhij", q[..., 5:], k[:, 0, :, 5:])) * SCALE, v)

    def weighted(q, k, v):
        return attend(0.5 * (q[..., :5] @ k[..., :5].mT) - 2 * (q[..., 5:] @ k[..., 5:].mT), v)

    for core in (split, shared_rope_key, weighted):
        compare(core, *qkv(), fused=1)


@pytest.mark.parametrize("shape", [(H,), (1, H, 1, 1)])
def test_sinks(shape, compare):
    def core(q, k, v, sinks):
        column = sinks.reshape(1, H, 1, 1).expand(B, H, T, 1)
        return torch.softmax(torch.cat([q @ k.mT * SCALE, column], -1), -1)[..., :-1] @ v

    def stable(q, k, v, sinks):
        joined = torch.cat([q @ k.mT * SCALE, sinks.reshape(1, H, 1, 1).expand(B, H, T, 1)], dim=-1)
        joined = joined - joined.max(dim=-1, keepdim=True).values
        return F.softmax(joined, dim=-1)[..., :S] @ v

    for fn in (core, stable):
        assert "sink=c0[h]" in detail(compare(fn, *qkv(), torch.randn(shape), fused=1))


def test_softmax_plus_one(compare):
    """A column of zeros: softmax over one more key that says nothing."""
    def core(q, k, v):
        return torch.softmax(torch.cat([q @ k.mT, torch.zeros(B, H, T, 1)], -1), -1)[..., :-1] @ v

    assert "sink=0" in detail(compare(core, *qkv(), fused=1))
