"""A key bias that softmax does not see is dropped, a value bias goes into the output projection's; where either counts, it stays."""
import pytest
import tileweld
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

WIDTH, HEADS, DIM, TOKENS = 24, 4, 6, 5


class Attention(nn.Module):
    """Attention with biases; `core` is what the variants below change."""

    def __init__(self, core=None, kv=HEADS, bias=(True, True, True), heads=HEADS, dim=DIM, width=WIDTH):
        super().__init__()
        self.heads, self.kv, self.dim, self.core = heads, kv, dim, core or plain
        self.q = nn.Linear(width, heads * dim)
        self.k, self.v = (nn.Linear(width, kv * dim, b) for b in bias[:2])
        self.o = nn.Linear(heads * dim, width, bias[2])

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        return self.o(self.core(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1))


def scores(q, k):
    return q @ k.transpose(2, 3) * 0.3


def causal(s, fill=float("-inf")):
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), fill)


def plain(q, k, v):
    return scores(q, k).softmax(-1) @ v


def rotary(k):
    angle = torch.arange(k.shape[2])[:, None] * torch.tensor([1.0, 0.1, 0.01, 1.0, 0.1, 0.01], dtype=k.dtype)
    return k * angle.cos() + torch.cat([-k[..., 3:], k[..., :3]], -1) * angle.sin()


BOTH = "key bias dropped and value bias into the output's"
FIRES = {
    "plain": (plain, BOTH),
    "causal": (lambda q, k, v: causal(scores(q, k)).softmax(-1) @ v, BOTH),
    "finfo_min": (lambda q, k, v: causal(scores(q, k), torch.finfo(torch.float32).min).softmax(-1) @ v, BOTH),
    "sdpa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), BOTH),
    "alibi": (lambda q, k, v: (scores(q, k) - 0.125 * (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs()).softmax(-1) @ v, BOTH),
    "rotary": (lambda q, k, v: scores(rotary(q), rotary(k)).softmax(-1) @ v, "value bias into the output's"),
    "softcap": (lambda q, k, v: (5 * torch.tanh(scores(q, k) / 5)).softmax(-1) @ v, "value bias into the output's"),
    "slope_by_key": (lambda q, k, v: (scores(q, k) * torch.arange(TOKENS).to(q.dtype)).softmax(-1) @ v, "value bias into the output's"),
    "finite_fill": (lambda q, k, v: causal(scores(q, k), -3.0).softmax(-1) @ v, "value bias into the output's"),
}


@pytest.mark.parametrize("name, kv", [*((name, HEADS) for name in FIRES), ("plain", 2), ("rotary", 1)])
def test_fires(rewriting, name, kv):
    core, detail = FIRES[name]
    report = rewriting.check(Attention(core, kv), torch.randn(2, TOKENS, WIDTH), count={"bias_rules": 1, "attention": 1})
    assert [f.detail for f in report.fusions if f.rewrite == "bias_rules"] == [detail]


@pytest.mark.parametrize("bias, detail", [((True, False, True), "key bias dropped"), ((False, True, False), "value bias into the output's"), ((True, True, False), BOTH)])
def test_biases_that_are_not_there(rewriting, bias, detail):
    m = Attention(bias=bias)
    report = rewriting.check(m, torch.randn(2, TOKENS, WIDTH), count={"bias_rules": 1})
    assert detail in [f.detail for f in report.fusions]
    rewriting.silent("bias_rules", Attention(bias=(False, False, True)), torch.randn(2, TOKENS, WIDTH))


def _sink(q, k, v):
    s = torch.cat([scores(q, k), torch.ones(*q.shape[:3], 1)], -1)
    return s.softmax(-1)[..., :-1] @ v


def _empty_rows(q, k, v):
    mask = torch.arange(TOKENS) > torch.arange(TOKENS)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


STAYS = {
    "sink": (_sink, {"the key bias stays: the sink is a score without a bias", "the value bias stays: the weights of a row add up to less than 1, by the sink's"}),
    "empty_rows": (_empty_rows, {"the value bias stays: a row that sees no key gives 0"}),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays_where_it_counts(rewriting, name):
    core, reasons = STAYS[name]
    m, x = Attention(core), torch.randn(2, TOKENS, WIDTH)
    got, report = rewriting.rewritten(m, x)
    with torch.no_grad():
        torch.testing.assert_close(got, m(x))
    assert {f.detail for f in report.kept if f.rewrite == "bias_rules"} == reasons
    assert all("value" not in f.detail for f in report.fusions if f.rewrite == "bias_rules")


def test_the_reasons_are_true():
    """What stays would change the result: each core with and without its bias, in eager."""
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    for core in (_sink, *(FIRES[name][0] for name in ("softcap", "rotary", "slope_by_key", "finite_fill"))):
        m = Attention(core).double()
        with torch.no_grad():
            m.k.bias.mul_(10)
            before = m(x)
            m.k.bias.zero_()
            assert (m(x) - before).abs().max() > 1e-3


def test_keys_that_others_read_stay(rewriting):
    class Caching(Attention):
        def forward(self, x):
            q, k, v = (f(x).view(*x.shape[:2], -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(plain(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1)), k, v

    rewriting.silent("bias_rules", Caching(), torch.randn(2, TOKENS, WIDTH))


def test_outputs_that_are_read_otherwise(rewriting):
    class Gated(Attention):
        def forward(self, x):
            q, k, v = (f(x).view(*x.shape[:2], -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o((plain(q, k, v).relu()).transpose(1, 2).reshape(*x.shape[:2], -1))

    class Mixed(Attention):  # the projection's columns are not ordered by head
        def forward(self, x):
            q, k, v = (f(x).view(*x.shape[:2], -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(plain(q, k, v).permute(0, 2, 3, 1).reshape(*x.shape[:2], -1))

    for cls in (Gated, Mixed):
        report = rewriting.check(cls(), torch.randn(2, TOKENS, WIDTH), count={"bias_rules": 1})
        assert [f.detail for f in report.fusions if f.rewrite == "bias_rules"] == ["key bias dropped"]


def test_training_keeps_every_bias(rewriting):  # of a key bias the gradient is 0 but for rounding
    rewriting.check_gradients(Attention(bias=(False, True, True)), torch.randn(2, TOKENS, WIDTH), count={"bias_rules": 0})


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 7), st.integers(1, 6), st.sampled_from(["plain", "causal", "sdpa", "rotary"]))
def test_equal_in_float64(kv, group, dim, tokens, name):
    if name == "rotary":
        dim = 6
    core = FIRES[name][0]
    m = Attention(core, kv, heads=kv * group, dim=dim, width=10).double()
    x = torch.randn(2, tokens, 10, dtype=torch.float64)
    torch._dynamo.reset()
    with torch.no_grad():
        report = tileweld.explain(m, x, options={"target": "reference"})
        got, expected = torch.compile(m, backend="tileweld", options={"target": "reference"})(x), m(x)
    assert report.counts["bias_rules"] == 1 or tokens == 1
    assert (got - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item())
