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


class LayerNormed(nn.Module):
    """A layer norm, and what reads it."""

    def __init__(self, k=24, n=40, weight=True, bias=True, linear_bias=True, dtype=torch.float32, after=None):
        super().__init__()
        self.norm = nn.LayerNorm(k, elementwise_affine=weight, bias=bias, dtype=dtype)
        self.gate, self.up = (nn.Linear(k, n, bias=linear_bias, dtype=dtype) for _ in range(2))
        for p in self.norm.parameters():
            nn.init.normal_(p)
        self.after = after or (lambda m, y: F.silu(m.gate(y)) * m.up(y))

    def forward(self, x):
        return self.after(self, self.norm(x))


def rotated(m, y):
    """Rotary on heads of 8, with a bias: the partner's column has a bias of its own."""
    q = m.gate(y)
    heads = q.view(*q.shape[:-1], -1, 8)
    angle = torch.outer(torch.arange(y.shape[-2], dtype=y.dtype), 10.0 ** -torch.arange(4, dtype=y.dtype)).repeat(1, 2)[:, None]
    return heads * angle.cos() + torch.cat([-heads[..., 4:], heads[..., :4]], -1) * angle.sin(), m.up(y)


LAYER = {
    "gated": ({}, ", its bias in theirs"), "no bias of the norm": ({"bias": False}, ""), "none of the linears": ({"linear_bias": False}, ", its bias in theirs"),
    "rotary": ({"after": rotated}, ", its bias in theirs"), "read twice": ({"after": lambda m, y: (m.gate(y), torch.tanh(m.gate(y)) * m.up(y))}, ", its bias in theirs"),
}


@pytest.mark.parametrize("case", LAYER)
def test_layer_norm_folded(rewriting, case):
    words, end = LAYER[case]
    report = rewriting.check(LayerNormed(**words), torch.randn(3, 24), count={"fold_norm": 1, "layer_norm_linear": 1}, **ON)
    (fusion,) = [f for f in report.fusions if f.rewrite == "fold_norm"]
    assert fusion.detail.startswith("(x - u)*r, ") and fusion.detail.endswith("]" + end), fusion.detail


def test_a_bias_of_the_linear_and_the_norms_become_one(rewriting):
    _, report = rewriting.rewritten(LayerNormed(), torch.randn(3, 24), **ON)
    (op,) = [n for n in report.graphs[-1].graph.nodes if n.target is torch.ops.tileweld.linear.default]
    assert op.args[6] == "(x - u)*r" and sorted(op.args[7][0].count(f"c{k}[j]") > 0 for k in range(3)) == [False, True, True] and len(op.args[2]) == 2, op.args


def test_rows_are_centred_in_float64_alone(rewriting):
    report = rewriting.check(LayerNormed(dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64) + 2, count={"fold_norm": 1}, tolerance=1e-10, **ON)
    (fusion,) = [f for f in report.fusions if f.rewrite == "fold_norm"]
    assert fusion.detail.startswith("x*r, ") and fusion.detail.endswith(", rows centred")
    bare = LayerNormed(weight=False, dtype=torch.float64)  # nothing to fold
    assert not rewriting.rewritten(bare, torch.randn(3, 24, dtype=torch.float64), **ON)[1].counts["fold_norm"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norms_in_half_types_are_no_worse_than_eager(rewriting, dtype):
    rewriting.check(LayerNormed(dtype=dtype), (torch.randn(3, 24) * 3 + 1).to(dtype), count={"fold_norm": 1}, **ON)


@pytest.mark.parametrize("x", [torch.zeros(3, 24), torch.full((3, 24), 5.0), torch.randn(3, 24) * 1e-30, torch.randn(3, 24) * 1e15, torch.randn(3, 24) + 1e4])
def test_layer_norms_of_rows_without_deviation_and_of_huge_ones(rewriting, x):
    rewriting.check(LayerNormed(dtype=torch.float64), x.double(), count={"fold_norm": 1}, tolerance=1e-10, **ON)


def test_layer_norms_that_stay(rewriting):
    rewriting.refused("fold_norm", LayerNormed(), torch.randn(3, 24), grad=True, reason="is trained: a gradient is wanted of it", **ON)
    rewriting.refused("fold_norm", LayerNormed(), torch.randn(3, 24), reason="fold_weights is off", fold_weights=False, **ON)
    residual = LayerNormed(n=24, after=lambda m, y: y + m.gate(y))  # post-norm: the stream is the norm's result
    rewriting.refused("fold_norm", residual, torch.randn(3, 24), reason="the norm's weight stays apart: its result is also read by the residual behind a matmul", **ON)
    returned = LayerNormed(after=lambda m, y: (m.gate(y), y))
    rewriting.refused("fold_norm", returned, torch.randn(3, 24), reason="its result is also read by", **ON)
    m = nn.Linear(24, 40)
    rewriting.refused("fold_norm", lambda x, b: m(F.layer_norm(x, (24,), None, b)), torch.randn(3, 24), torch.randn(24), reason="is no weight of the model", **ON)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(2, 12), st.sampled_from([8, 16]), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([0.0, 3.0, 1e3]), st.booleans())
def test_layer_norms_equal_in_float64(rows, k, n, bias, linear_bias, rotary, mean, gated):
    m = LayerNormed(k, n, True, bias, linear_bias, torch.float64, rotated if rotary else None if gated else lambda m, y: (m.gate(y), m.up(y).sin()))
    x = torch.randn(rows, k, dtype=torch.float64) + mean
    torch._dynamo.reset()
    with torch.no_grad():
        report = tileweld.explain(m, x, options={"target": "reference", **ON})
        got, expected = torch.compile(m, backend="tileweld", options={"target": "reference", **ON})(x), m(x)
    assert report.counts["fold_norm"] == 1
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, expected))):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, b.abs().max().item())


def test_a_change_of_the_layer_norms_weight_and_bias_is_seen():
    m, x = LayerNormed(), torch.randn(3, 24)
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(m, backend="tileweld", options=ON)
        torch.testing.assert_close(run(x), m(x), rtol=1e-4, atol=1e-4)
        for p in m.norm.parameters():
            p.mul_(1.5)
        torch.testing.assert_close(run(x), m(x), rtol=1e-4, atol=1e-4)


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
