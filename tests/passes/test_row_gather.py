"""Overlapping heads: moved columns of a projection become gathered rows of its weight, if it is asked for."""
import pytest
import tileweld
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tileweld import models
from tileweld.models import mohsa

ON = {"passes": {"row_gather": True}}


def attention(**config):
    return mohsa.Attention(mohsa.Config(**config)).eval()


@pytest.mark.parametrize("config", [{}, {"spelling": "pad"}, {"overlap": 8}, {"heads": 1}])
def test_gathered(rewriting, config):
    report = rewriting.check(attention(**config), torch.randn(2, 5, 32), count={"row_gather": 3, "attention": 1}, **ON)
    wide = 32 + 2 * mohsa.Config(**config).overlap * mohsa.Config(**config).heads
    assert {f.detail for f in report.fusions if f.rewrite == "row_gather"} == {f"32 -> {wide} columns"}


def test_off_unless_asked_for_and_attention_is_fused_anyway(rewriting):
    report = rewriting.check(models.load("mohsa").build(), *models.load("mohsa").example_inputs(), count={"row_gather": 0, "attention": 2})
    assert "row_gather" not in report.counts


def test_kept_and_watched():
    m, x = attention(hidden=256, overlap=16), torch.randn(2, 5, 256)
    with torch.no_grad():
        report = tileweld.explain(m, x, options=ON)
        assert report.counts["row_gather"] == 3 and sum(f.bytes == 4 * 256 * (256 + 4 * 32) for f in report.folded) == 3
        torch._dynamo.reset()
        run = torch.compile(m, backend="tileweld", options={"target": "reference", **ON})
        torch.testing.assert_close(run(x), m(x), rtol=1e-4, atol=1e-5)
        m.q.weight.mul_(2)
        m.v.weight[0] += 1
        torch.testing.assert_close(run(x), m(x), rtol=1e-4, atol=1e-5)


class Changed(mohsa.Attention):
    """q goes through `change` on its way."""

    def __init__(self, change):
        super().__init__(mohsa.Config())
        self.change = change

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (4, 8)) for f in (self.q, self.k, self.v))
        q = self.change(q, mohsa.overlapped)
        k, v = mohsa.overlapped(k, 2), mohsa.overlapped(v, 2)
        weights = torch.softmax(q.transpose(1, 2) @ k.transpose(1, 2).transpose(-2, -1), -1)
        return self.o((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2))


NO_MOVE = "no move of columns, the same for every token"


@pytest.mark.parametrize("change, reason", [
    (lambda q, o: torch.cat([o(q, 2)[:, 1:], o(q, 2)[:, :1]], 1), NO_MOVE),  # of the next token
    (lambda q, o: torch.cat([o(q, 2)[..., :10], o(q, 2)[:, :1, :, 10:].expand(-1, 5, -1, -1)], -1), NO_MOVE),  # of the first token
    (lambda q, o: torch.nn.functional.pad(q, (2, 2), value=1.0), NO_MOVE),
])
def test_moves_of_another_kind(rewriting, change, reason):
    _, report = rewriting.rewritten(Changed(change), torch.randn(2, 5, 32), **ON)
    assert report.counts["row_gather"] == 2 and [reason in r.reason for r in report.refusals if r.rewrite == "row_gather"] == [True]


def test_refused(rewriting):
    x = torch.randn(2, 5, 32)
    for options, grad, reason in (({}, True, "is trained"), ({"fold_weights": False}, False, "fold_weights is off")):
        _, report = rewriting.rewritten(attention(), x, grad=grad, **ON, **options)
        assert report.counts["row_gather"] == 0 and all(reason in r.reason for r in report.refusals if r.rewrite == "row_gather") and sum(r.rewrite == "row_gather" for r in report.refusals) == 3
    _, report = rewriting.rewritten(attention(), x, dynamic=True, **ON)
    assert report.counts["row_gather"] == 0 and {r.reason for r in report.refusals if r.rewrite == "row_gather"} == {"a size is no number"}

    class Read(mohsa.Attention):
        def forward(self, x):
            q = mohsa.overlapped(self.q(x).unflatten(-1, (4, 8)), 2)
            return torch.softmax(q.transpose(1, 2) @ q.transpose(1, 2).transpose(-2, -1), -1) @ q.transpose(1, 2), q[:, 0]

    _, report = rewriting.rewritten(Read(mohsa.Config()), x, **ON)
    assert {r.reason for r in report.refusals if r.rewrite == "row_gather"} == {"a part of what is moved is also read elsewhere"}


def test_a_function_in_between_is_none_of_this(rewriting):
    _, report = rewriting.rewritten(Changed(lambda q, o: o(q.sin(), 2)), torch.randn(2, 5, 32), **ON)
    assert report.counts["row_gather"] == 2 and not [r for r in report.refusals if r.rewrite == "row_gather"]


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_equal_in_float64(heads, dim, data):
    overlap, tokens = data.draw(st.integers(0, dim)), data.draw(st.integers(1, 5))
    m = attention(hidden=heads * dim, heads=heads, overlap=overlap, spelling=data.draw(st.sampled_from(["cat", "pad"]))).double()
    x = torch.randn(2, tokens, heads * dim, dtype=torch.float64)
    torch._dynamo.reset()
    with torch.no_grad():
        report = tileweld.explain(m, x, options={"target": "reference", **ON})
        got, expected = torch.compile(m, backend="tileweld", options={"target": "reference", **ON})(x), m(x)
    assert report.counts["row_gather"] == (3 if overlap else 0)
    assert (got - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item())
