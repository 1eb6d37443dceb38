"""int8 with the other rewrites of weights, in every order that is legal, on the models of models/ and a Hugging Face Llama; an illegal order says why."""
import copy
import functools

import pytest
import torch
from tileweld import convert, models
from tileweld.compiler.backend import tileweld
from tileweld.compiler.errors import ConversionError
from tileweld.compiler.report import Report
from torch import nn


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def run(model, *inputs, **options):
    torch._dynamo.reset()
    report = Report()
    return torch.compile(model, backend=functools.partial(tileweld, report=report, options=options))(*inputs), report


def distance(a, b):
    a, b = (x[0] if isinstance(x, tuple) else x for x in (a, b))
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", models.available())
def test_models_by_option_and_by_conversion(name):
    module = models.load(name)
    model, inputs = module.build(), module.example_inputs(2, 9)
    exact = model(*inputs)
    result, report = run(model, *inputs, int8="weight_only", target="reference")  # kernels have tests of their own, and take seconds to compile
    assert report.counts["int8"] > 0 and distance(result, exact) < 0.03, distance(result, exact)
    made = copy.deepcopy(model)
    convert.quantize_(made, "dynamic")
    eager = made(*inputs)
    result, report = run(made, *inputs, target="reference")
    assert report.counts["int8"] > 0 and distance(eager, exact) < 0.08 and distance(result, eager) < 0.04, (distance(eager, exact), distance(result, eager))


@pytest.mark.parametrize("scheme", ["weight_only", "dynamic", "llm_int8"])
def test_llama_of_hugging_face_saved_and_loaded(tmp_path, scheme):
    import transformers

    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97, max_position_embeddings=64, tie_word_embeddings=True)
    model, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    tokens = torch.randint(0, 97, (2, 12))
    exact = model(tokens, use_cache=False).logits
    if scheme == "dynamic":
        convert.smooth_(model, tokens)
        assert distance(model(tokens, use_cache=False).logits, exact) < 1e-5
    report = convert.quantize_(model, scheme, calibration=tokens if scheme == "llm_int8" else None)
    assert scheme != "weight_only" or report.bytes_after < 0.28 * report.bytes_before
    convert.save_quantized(model, tmp_path / "m")
    convert.load_quantized(other, tmp_path / "m")
    eager = model(tokens, use_cache=False).logits
    assert torch.equal(other(tokens, use_cache=False).logits, eager) and distance(eager, exact) < 0.05
    result, compilation = run(other, tokens)
    assert distance(result.logits, eager) < 0.03 and compilation.counts["attention"] == 2
    norms = [n for n in compilation.graphs[-1].graph.nodes if n.target is torch.ops.tileweld.int8_linear.default and n.args[5] == "rms"]
    assert len(norms) == 4 + (scheme == "weight_only")  # qkv and gate/up of both layers, the tied head


class Adapted(nn.Module):
    """A linear and a low-rank adapter beside it, as peft writes it."""

    def __init__(self, n=48, k=64, r=4):
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = nn.Linear(k, n), nn.Linear(k, r, bias=False), nn.Linear(r, n, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))


def test_an_adapter_is_merged_before_it_is_quantised():
    model, x = nn.Sequential(Adapted()), torch.randn(3, 64)
    result, report = run(model, x, int8={"scheme": "weight_only", "force": True})
    assert report.counts["lora"] == report.counts["int8"] == 1 and 1e-4 < distance(result, model(x)) < 0.02
    merged = model[0].base_layer.weight + 2 * model[0].lora_B.weight @ model[0].lora_A.weight
    from tileweld.compiler.ir.int8_linear import dequantized, quantized

    torch.testing.assert_close(result, nn.functional.linear(x, dequantized(*quantized(merged), torch.float32), model[0].base_layer.bias))
    assert run(model, x, int8={"scheme": "weight_only", "skip": ["0"]})[1].counts["int8"] == 0  # the name is the layer's, not the adapter's
    model[0].lora_B.weight.mul_(3)  # a merged, quantised weight follows
    compiled = torch.compile(model, backend="tileweld", options={"int8": "weight_only"})
    before = compiled(x)
    model[0].lora_B.weight.mul_(0)
    assert distance(compiled(x), model(x)) < 0.02 < distance(before, model(x))


def test_an_adapter_on_int8_stays_apart_and_the_reason_is_said():
    model, x = nn.Sequential(Adapted()), torch.randn(3, 64)
    report = convert.quantize_(model)
    assert report.left_out == {"0.lora_A": "an adapter", "0.lora_B": "an adapter"} and [layer.name for layer in report.layers] == ["0.base_layer"]
    result, compilation = run(model, x)
    torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-5)
    assert compilation.counts["lora"] == 0 and compilation.counts["int8"] == 1 and not compilation.folded
    assert any(r.rewrite == "lora" and "int8" in r.reason for r in compilation.refusals), compilation.refusals


def test_heads_are_merged_before_they_are_quantised():
    module = models.load("llama_gqa")
    model, inputs = module.build(), module.example_inputs(2, 9)
    tokens = inputs[0]
    merged = copy.deepcopy(model)
    convert.to_gqa(merged, 1, calibration=tokens)
    exact = merged(*inputs)
    convert.quantize_(merged, "weight_only")
    assert distance(merged(*inputs), exact) < 0.03 and distance(run(merged, *inputs)[0], exact) < 0.03
    convert.quantize_(model)
    with pytest.raises(ConversionError, match="int8 already.*to_gqa first"):
        convert.to_gqa(model, 1, calibration=tokens)


def test_heads_merged_by_option_are_quantised_merged():
    """Both by option: the merged weights are what becomes int8."""
    module = models.load("llama_gqa")
    model, inputs = module.build(), module.example_inputs(2, 9)
    merged, first = run(model, *inputs, gqa=1, target="reference")
    both, second = run(model, *inputs, gqa=1, int8={"scheme": "weight_only", "force": True}, target="reference")
    assert first.counts["mha_to_gqa"] == second.counts["mha_to_gqa"] > 0 == first.counts["int8"] < second.counts["int8"] and 0 < distance(both, merged) < 0.03
    assert all(u.kept for u in second.int8)


def test_latent_attention_with_int8_weights():
    """Absorption moves products around; with int8 weights from the option it happens first, with int8 modules the weights stay as they are held."""
    module = models.load("deepseek_mla")
    model, inputs = module.build(), module.example_inputs(2, 9)
    exact = model(*inputs)
    result, report = run(model, *inputs, int8={"scheme": "weight_only", "force": True})
    assert distance(result, exact) < 0.03 and report.counts["int8"] > 0
    convert.quantize_(model)
    result, report = run(model, *inputs)
    assert distance(result, model(*inputs)) < 0.01 and not any("dequantize" in op for f in report.folded for op in f.operations)
