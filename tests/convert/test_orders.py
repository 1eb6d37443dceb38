"""Conversions one after the other, all ordered pairs: legal ones compute what they should, eager and compiled, an illegal one says why and leaves the model as it was."""
import copy

import pytest
import tileweld
import torch
from tileweld import convert, models
from tileweld.compiler.errors import ConversionError
from torch import nn

transformers = pytest.importorskip("transformers")
IDS = torch.randint(31, (4, 8), generator=torch.Generator().manual_seed(1))
CONVERSIONS = {
    # no refit: it would give a head that is dead a little to do, after which prune keeps it
    "to_gqa": lambda model: convert.to_gqa(model, 1, IDS, refit=False), "prune": lambda model: convert.prune(model, structured=True), "smooth_": lambda model: convert.smooth_(model, IDS),
    "quantize_": lambda model: convert.quantize_(model, "weight_only"),
}
ILLEGAL = {
    "to_gqa": "int8 already: merging would round its weights a second time.*to_gqa first, then quantize_", "prune": "int8 already: what is dead was decided when it was rounded.*prune first, then quantize_",
    "smooth_": "int8 already, and its columns have lost what scaling would have saved.*smooth_ first, then quantize_", "quantize_": "no linear layer to quantise",
}


def redundant():
    """A Llama whose KV heads are one up to numbers, with a head and three channels that do nothing: to_gqa, prune and smooth_ keep what it computes."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=31, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, head_dim=8, initializer_range=0.3)).eval()
    layer = model.model.layers[0]
    with torch.no_grad():
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            heads = linear.weight.unflatten(0, (4, 8))
            heads.copy_(heads[:1] * torch.tensor([1.0, -2.0, 0.5, 3.0])[:, None, None])
        layer.self_attn.o_proj.weight[:, 8:16] = 0
        layer.mlp.down_proj.weight[:, [2, 5, 7]] = 0
        layer.input_layernorm.weight.uniform_(0.5, 1.5)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("second", CONVERSIONS)
@pytest.mark.parametrize("first", CONVERSIONS)
def test_pairs(first, second):
    model = redundant()
    exact = logits(model)
    CONVERSIONS[first](model)
    between = logits(model)
    if first == "quantize_":
        state = {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(ConversionError, match=ILLEGAL[second]) as caught:
            CONVERSIONS[second](model)
        assert caught.value.where == (None if second == "quantize_" else "model.layers.0.self_attn.q_proj")
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items()) and torch.equal(logits(model), between)
        return
    CONVERSIONS[second](model)
    assert distance(between, exact) < 1e-4 and distance(logits(model), exact) < (0.06 if second == "quantize_" else 1e-4)
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (3 if "prune" in (first, second) else 4, 1 if "to_gqa" in (first, second) else 3 if "prune" in (first, second) else 4, 21 if "prune" in (first, second) else 24)


@pytest.mark.parametrize("order", [("prune", "to_gqa", "smooth_", "quantize_"), ("smooth_", "to_gqa", "prune", "quantize_"), ("to_gqa", "smooth_", "prune", "quantize_")])
def test_all_of_them_compiled(order):
    model = redundant()
    exact = logits(model)
    for name in order:
        CONVERSIONS[name](model)
    eager = logits(model)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="tileweld", options={"target": "reference"})(IDS, use_cache=False).logits
    assert distance(eager, exact) < 0.06 and distance(compiled, eager) < 0.01
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.intermediate_size) == (3, 1, 21)


# ---------------------------------------------------------------- with what compiling merges: adapters, absorbed latents


class Adapted(nn.Module):
    """A linear layer and a low-rank adapter beside it, as peft writes it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 0.5 * self.lora_B(self.lora_A(x))


def adapted():
    model = redundant()
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    return model


def compiled(model, **options):
    torch._dynamo.reset()
    with torch.no_grad():
        report = tileweld.explain(model, IDS, use_cache=False, options={"target": "reference", **options})
        return torch.compile(model, backend="tileweld", options={"target": "reference", **options})(IDS, use_cache=False).logits, report


@pytest.mark.parametrize("name", ["to_gqa", "prune"])
def test_an_adapter_in_the_way_is_named(name):
    model = adapted()
    exact = logits(model)
    with pytest.raises(ConversionError, match="Adapted.*with an adapter.*merge it first") as caught:
        CONVERSIONS[name](model)
    assert caught.value.where == "model.layers.0.self_attn.q_proj" and torch.equal(logits(model), exact)


def test_smooth_and_an_adapter_and_then_int8():
    """The adapter reads what the layer reads: its columns take the scale too. Merging comes with compiling; int8 weights are not merged any more, and the report says why."""
    model = adapted()
    exact = logits(model)
    convert.smooth_(model, IDS)
    assert distance(logits(model), exact) < 1e-4
    found, report = compiled(model, int8={"scheme": "weight_only", "force": True})
    assert report.counts["lora"] == 1 and report.counts["int8"] > 0 and distance(found, exact) < 0.06
    convert.quantize_(model)
    found, report = compiled(model)
    assert not report.counts["lora"] and any(r.rewrite == "lora" and "int8" in r.reason and "merge the adapter first" in r.cure for r in report.refusals)
    assert distance(found, logits(model)) < 0.01


@pytest.mark.parametrize("name", CONVERSIONS)
def test_latent_attention(name):
    """Absorption is compiling's, of whatever the layers hold by then; its heads cannot be merged, and are not pruned."""
    module = models.load("deepseek_mla")
    model, inputs = module.build(), module.example_inputs(2, 9)
    with torch.no_grad():
        exact = model(*inputs)
    if name == "to_gqa":
        with pytest.raises(ConversionError, match="its keys come from 2 linear layers.*heads are merged where"):
            convert.to_gqa(model, 1)
        return
    report = {"prune": convert.prune, "smooth_": lambda m: convert.smooth_(m, inputs[0]), "quantize_": convert.quantize_}[name](model)
    if name == "prune":
        assert "latent" in report.left_out["layers.0.attn.wo"] and "latent" in report.left_out["layers.1.attn.wo"] and {x.what for x in report.layers} == {"channels"}
    torch._dynamo.reset()
    with torch.no_grad():
        eager, found = model(*inputs), torch.compile(copy.deepcopy(model), backend="tileweld", options={"target": "reference"})(*inputs)
    first = lambda x: x[0] if isinstance(x, tuple) else x
    assert distance(first(eager), first(exact)) < (0.03 if name == "quantize_" else 1e-4) and distance(first(found), first(eager)) < 0.01
