"""An RMS norm that matmuls alone read moves into their prologue; one that is needed elsewhere is computed, with the reason."""
import pytest
import torch
import torch.nn.functional as F
from tileweld import models

K, N = 24, 40
OP = torch.ops.tileweld.linear.default


def llama(x, w):
    return w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def gemma(x, w):
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + w.float())).to(x.dtype)


def operands(dtype=torch.float32):
    return torch.randn(2, 5, K).to(dtype), torch.randn(K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N, K).to(dtype)


def calls(report):
    return [n for n in report.graphs[0].graph.nodes if n.target is OP]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("norm", "prologue"), [(llama, "x*r*c0[j]"), (gemma, "x*r*(c0[j] + 1)"), (lambda x, w: F.rms_norm(x, (K,), eps=1e-5), "x*r")], ids=["llama", "gemma", "bare"])
def test_one_linear(rewriting, norm, prologue, dtype):
    report = rewriting.check(lambda x, n, w, _: F.linear(norm(x, n), w), *operands(dtype), count={"rms_norm_linear": 1})
    (call,) = calls(report)
    assert call.args[4:7] == ("rms", 1e-5, prologue) and not [n for n in report.graphs[0].graph.nodes if n.target is torch.ops.tileweld.rms_norm.default]


def test_gate_and_up_dynamic_and_gradients(rewriting):
    def fn(x, n, g, u):
        y = llama(x, n)
        return F.silu(F.linear(y, g)) * F.linear(y, u)

    report = rewriting.check(fn, *operands(), count={"gated_mlp": 1, "rms_norm_linear": 1})
    assert next(f.detail for f in report.fusions if f.rewrite == "rms_norm_linear") == "rms norm, 2x[40, 24], a0*sigmoid(a0)*a1"
    rewriting.check_gradients(fn, *operands(), count={"rms_norm_linear": 1}, tolerance=1e-6)  # the model itself computes the norm in float32


def test_attention_and_mlp_of_a_parallel_block_become_one_op(rewriting):
    def fn(x, n, w, up, down):
        y = llama(x, n)
        q = F.linear(y, w)
        q = torch.softmax(q, -1)
        return F.linear(F.gelu(F.linear(y, up)), down) + q.sum(-1, keepdim=True)

    x, n, w, up = operands()
    report = rewriting.check(fn, x, n, w, up, torch.randn(K, N), count={"rms_norm_linear": 1})
    assert sorted(len(c.args[7]) for c in calls(report)) == [1, 2]


@pytest.mark.parametrize(("name", "count"), [("llama_gqa", 5), ("gemma2", 5)])
def test_models(rewriting, name, count):
    """Gemma 2 has four norms a layer, two of them behind a matmul."""
    module = models.load(name)
    rewriting.check(module.build(), *module.example_inputs(2, 9), count={"rms_norm_linear": count})


def test_a_norm_that_is_needed_elsewhere_is_refused(rewriting):
    rewriting.refused("rms_norm_linear", lambda x, n, w, _: (lambda y: (F.linear(y, w), y))(llama(x, n)), *operands(), reason="also needed elsewhere")


def test_a_norm_whose_result_is_the_residual_is_another_pattern(rewriting):
    """Post-norm models by design: neither fused nor refused, so that strict does not raise."""
    _, report = rewriting.rewritten(lambda x, n, w, _: (lambda y: F.linear(y, w).sum(-1, keepdim=True) + y)(llama(x, n)), *operands())
    assert report.counts["rms_norm_linear"] == 0 and not [r for r in report.refusals if r.rewrite == "rms_norm_linear"]


def test_a_wider_residual_stream_is_refused(rewriting):
    def fn(x, n, w, _):
        return F.linear(F.rms_norm(x, (K,), n, 1e-5).bfloat16(), w.bfloat16()).float()

    _, report = rewriting.rewritten(fn, *operands())
    assert report.counts["rms_norm_linear"] == 0


def test_matmuls_that_depend_on_each_other_are_refused(rewriting):
    def fn(x, n, w, v, m):
        y = llama(x, n)
        first = F.linear(torch.softmax(F.linear(y, w), -1), m)
        return torch.tanh(F.linear(y, v)) + first.cumsum(-1)

    rewriting.refused("rms_norm_linear", fn, *operands(), torch.randn(N, N), reason="depend on each other")


def test_a_symbolic_eps_is_specialised(rewriting):
    layer = torch.nn.Linear(K, N)

    def fn(x, eps):
        return layer(F.rms_norm(x, (K,), None, eps))

    rewriting.check(fn, operands()[0], 1e-2, count={"rms_norm_linear": 1}, dynamic=True)
    compiled = torch.compile(fn, backend="tileweld", options={"target": "reference"}, dynamic=True)
    ones = torch.ones(2, 5, K)
    for eps in (1e-2, 3.0):  # the second needs its own code: rsqrt(1 + 3) is half of rsqrt(1)
        torch.testing.assert_close(compiled(ones, eps), fn(ones, eps))


def test_a_norm_that_no_matmul_reads_is_not_this(rewriting):
    rewriting.silent("rms_norm_linear", lambda x, n, w, _: llama(F.linear(x, w), torch.ones(N)), *operands())
