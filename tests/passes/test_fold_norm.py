"""The norm's weight goes into the matrices, if it is asked for, and nothing else changes."""
import pytest
import tileweld
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tileweld import models
from torch import nn

ON = {"passes": {"fold_norm": True}}


class Block(nn.Module):
    """A norm, and what reads it; gemma: the weight is 1 + w."""

    def __init__(self, k=24, n=40, gemma=False, dtype=torch.float32, after=None):
        super().__init__()
        self.norm = nn.Parameter(torch.randn(k, dtype=dtype))
        self.gate, self.up = nn.Linear(k, n, bias=False, dtype=dtype), nn.Linear(k, n, dtype=dtype)
        self.gemma, self.after = gemma, after or (lambda m, y: F.silu(m.gate(y)) * m.up(y))

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) if x.dtype != torch.float64 else x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        y = (y * (1 + self.norm.to(y.dtype))).to(x.dtype) if self.gemma else y.to(x.dtype) * self.norm
        return self.after(self, y)


CASES = {
    "gated": {}, "gemma": {"gemma": True}, "two": {"after": lambda m, y: (m.gate(y), m.up(y).sin())}, "double": {"dtype": torch.float64},
}


@pytest.mark.parametrize("case", CASES)
def test_folded(rewriting, case):
    m = Block(**CASES[case])
    x = torch.randn(3, 24, dtype=m.norm.dtype)
    report = rewriting.check(m, x, count={"fold_norm": 1}, **ON)
    (fusion,) = [f for f in report.fusions if f.rewrite == "fold_norm"]
    assert fusion.detail.startswith("x*r, ")


def test_half_types_are_no_worse_than_eager(rewriting):
    rewriting.check(Block(dtype=torch.bfloat16), torch.randn(3, 24).bfloat16(), count={"fold_norm": 1}, **ON)


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e15])
def test_rows_near_zero_and_huge_rows(rewriting, scale):
    """eps stays where it is: in r."""
    rewriting.check(Block(dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64) * scale, count={"fold_norm": 1}, tolerance=1e-10, **ON)


def test_off_unless_asked_for(rewriting):
    _, report = rewriting.rewritten(Block(), torch.randn(3, 24))
    assert report.counts["fold_norm"] == 0 and report.counts["rms_norm_linear"] == 1


def test_refused(rewriting):
    rewriting.refused("fold_norm", Block(), torch.randn(3, 24), grad=True, reason="is trained: a gradient is wanted of it", **ON)
    rewriting.refused("fold_norm", Block(), torch.randn(3, 24), reason="fold_weights is off", fold_weights=False, **ON)
    w = torch.randn(24)
    m = nn.Linear(24, 40)
    rewriting.refused("fold_norm", lambda x, w: m(F.rms_norm(x, (24,), w, 1e-6)), torch.randn(3, 24), w, reason="is no weight of the model", **ON)


def test_a_layer_norm_stays(rewriting):
    got, report = rewriting.rewritten(nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 40)), torch.randn(3, 24), **ON)
    assert not report.counts["fold_norm"]


def test_tied_matrix_and_shared_norm(rewriting):
    """The embedding reads the matrix as it is, lm_head the folded one."""
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(32, 24), nn.RMSNorm(24, eps=1e-6)
            nn.init.normal_(self.norm.weight)

        def forward(self, tokens):
            x = self.table(tokens) + 1
            return F.linear(self.norm(F.linear(self.norm(x).cos(), self.table.weight).sin() @ self.table.weight), self.table.weight)

    report = rewriting.check(Tied(), torch.arange(5)[None], count={"fold_norm": 1}, **ON)
    assert report.counts["rms_norm_linear"] == 1


def test_a_whole_model_and_a_change_of_the_norm():
    m = models.load("llama_gqa").build()
    tokens = torch.randint(0, 50, (1, 9))
    with torch.no_grad():
        for p in m.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)
        report = tileweld.explain(m, tokens, options=ON)
        assert report.counts["fold_norm"] == report.counts["rms_norm_linear"] >= 3
        torch._dynamo.reset()
        run = torch.compile(m, backend="tileweld", options={"target": "reference", **ON})
        torch.testing.assert_close(run(tokens), m(tokens), rtol=1e-4, atol=1e-4)
        for p in m.parameters():
            if p.dim() == 1:
                p.mul_(1.5)
        torch.testing.assert_close(run(tokens), m(tokens), rtol=1e-4, atol=1e-4)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 4), st.integers(2, 12), st.integers(1, 12), st.booleans())
def test_equal_in_float64(rows, k, n, gemma):
    m, x = Block(k, n, gemma, torch.float64), torch.randn(rows, k, dtype=torch.float64)
    torch._dynamo.reset()
    with torch.no_grad():
        got, expected = torch.compile(m, backend="tileweld", options={"target": "reference", **ON})(x), m(x)
    assert (got - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item())
