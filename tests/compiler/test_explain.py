"""tileweld.explain: what it counts and refuses, that it builds nothing and leaves everything as it was."""

import pytest
import torch
import torch.nn.functional as F

import tileweld
from tileweld.compiler.errors import OptionError, RefusalError
from tileweld.compiler.explain import trace


def attention(q, k, v):
    return F.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v


def escaping(q, k, v):
    weights = F.softmax(q @ k.transpose(-1, -2) * 0.25, -1)
    return weights @ v, weights


@pytest.fixture
def qkv():
    return tuple(torch.randn(1, 2, 6, 16) for _ in range(3))


def test_counts_graphs_and_a_table(qkv):
    report = tileweld.explain(attention, *qkv)
    assert report.counts == {"attention": 1} and not report.refusals and len(report.graphs) == 1
    assert any("attention" in str(n.target) for n in report.graphs[0].graph.nodes)
    assert "score=0.25*s" in str(report) and "test_explain.py" in str(report)


def test_keyword_arguments_and_modules():
    class Net(torch.nn.Module):
        def forward(self, x, *, bias):
            return attention(x, x, x) + bias

    report = tileweld.explain(Net(), torch.randn(1, 2, 6, 16), bias=torch.ones(16))
    assert report.counts["attention"] == 1


def test_it_says_what_each_op_would_run_on_and_builds_nothing(qkv, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path))
    report = tileweld.explain(lambda q, k, v: F.softmax((q @ k.transpose(-1, -2) * 0.25).tanh(), -1) @ v, *qkv)
    (use,) = [k for k in report.kernels if k.op == "attention"]
    assert use.implementation.startswith("cpp:") and len(report.sources) >= 1
    assert not list(tmp_path.rglob("*.so"))
    assert [k.implementation for k in tileweld.explain(attention, *qkv, options={"target": "reference"}).kernels] == ["reference"]


def test_a_refusal_has_its_four_parts(qkv):
    (refusal,) = tileweld.explain(escaping, *qkv).refusals
    assert refusal.rewrite == "attention" and "used outside the core" in refusal.reason
    assert "test_explain.py" in refusal.source and refusal.cure


def test_strict_raises_with_the_reason(qkv):
    with pytest.raises(Exception) as caught:
        tileweld.explain(escaping, *qkv, options={"strict": True})
    inner = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(inner, RefusalError) and inner.rewrite == "attention" and "used outside the core" in str(inner)


def test_a_bad_option_is_an_option_error_before_anything_runs():
    def never(x):
        raise AssertionError("must not run")

    with pytest.raises(OptionError, match="unknown option 'targets'"):
        tileweld.explain(never, torch.ones(1), options={"targets": "cpp"})


def test_softmaxes_are_all_accounted_for(qkv):
    def routed(q, k, v, w):
        out = attention(q, k, v)
        return out * F.softmax(out.mean(-1) @ w, -1)[..., :1].unsqueeze(-1)

    report = tileweld.explain(routed, *qkv, torch.randn(6, 6))
    (s,) = report.softmaxes
    assert (s.seen, s.fused, s.refused, s.other) == (2, 1, 0, 1)
    assert "1 no attention core" in str(report)


def test_graph_breaks_are_counted(qkv):
    def broken(q, k, v):
        x = attention(q, k, v)
        torch._dynamo.graph_break()
        return attention(x, k, v)

    report = tileweld.explain(broken, *qkv)
    assert len(report.graphs) == 2 and report.counts["attention"] == 2
    assert {f.graph for f in report.fusions} == {0, 1}


def test_training_traces_the_backward_and_leaves_the_gradients_alone(qkv):
    model = torch.nn.Linear(16, 16)
    q = qkv[0]

    def f(x):
        x = model(x)
        return attention(x, x, x)

    report = trace(f, (q.requires_grad_(),), train=True)
    assert [a.is_backward for a in report.aot] == [False, True]
    assert q.grad is None and model.weight.grad is None


def test_the_model_stays_as_it_was(qkv):
    compiled = torch.compile(attention, backend="tileweld")
    before = compiled(*qkv)
    tileweld.explain(attention, *qkv)
    torch.testing.assert_close(compiled(*qkv), before, rtol=0, atol=0)
