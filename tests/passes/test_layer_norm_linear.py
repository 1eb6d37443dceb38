"""A layer norm that matmuls alone read moves into their prologue, with or without weight and bias."""
import pytest
import torch
import torch.nn.functional as F
from tileweld.compiler.tiny import tiny_inputs, tiny_model

K, N = 24, 40
OP = torch.ops.tileweld.linear.default


def operands(dtype=torch.float32):
    return torch.randn(2, 5, K).to(dtype), torch.randn(K).to(dtype), torch.randn(K).to(dtype), torch.randn(N, K).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weight", "bias", "prologue"), [(1, 1, "(x - u)*r*c0[j] + c1[j]"), (1, 0, "(x - u)*r*c0[j]"), (0, 0, "(x - u)*r")])
def test_weight_and_bias_may_be_absent(rewriting, weight, bias, prologue, dtype):
    report = rewriting.check(lambda x, w, b, m: F.linear(F.layer_norm(x, (K,), w if weight else None, b if bias else None, 1e-3), m), *operands(dtype), count={"layer_norm_linear": 1})
    (call,) = [n for n in report.graphs[0].graph.nodes if n.target is OP]
    assert call.args[4:7] == ("layer", 1e-3, prologue)


def test_spelled_out_dynamic_and_gradients(rewriting):
    def fn(x, w, b, m):
        c = x - x.mean(-1, keepdim=True)
        return F.gelu(F.linear(c / torch.sqrt((c * c).mean(-1, keepdim=True) + 1e-5) * w + b, m))

    rewriting.check(fn, *operands(), count={"layer_norm": 1, "linear_epilogue": 1, "layer_norm_linear": 1})
    rewriting.check_gradients(fn, *operands(), count={"layer_norm_linear": 1})
    layers = torch.nn.Sequential(torch.nn.LayerNorm(K), torch.nn.Linear(K, N))
    rewriting.check(lambda x: layers(x), operands()[0], count={"layer_norm_linear": 1}, dynamic=True)


@pytest.mark.parametrize(("name", "count"), [("gpt2", 5), ("gpt_neox", 5)])
def test_hugging_face(rewriting, name, count):
    model = tiny_model(name)
    rewriting.check(lambda ids: model(input_ids=ids).logits, tiny_inputs(model)["input_ids"], count={"layer_norm_linear": count})


def test_a_norm_whose_result_is_the_residual_is_another_pattern(rewriting):
    """BERT's: the norm is behind the residual, and its result is the next residual."""
    def fn(x, w, b, m):
        y = F.layer_norm(x, (K,), w, b)
        return y + F.linear(F.relu(F.linear(y, m)), m.T.contiguous())

    _, report = rewriting.rewritten(fn, *operands())
    assert report.counts["layer_norm_linear"] == 0 and not [r for r in report.refusals if r.rewrite == "layer_norm_linear"]


def test_several_normalised_dims_are_refused(rewriting):
    rewriting.refused("layer_norm_linear", lambda x, m: F.linear(F.layer_norm(x, (5, K)), m), operands()[0], operands()[3], reason="last 2 dims")
