"""What every model in models/ promises: shapes, causality, one graph under Dynamo at any length, bf16, gradients, determinism."""
import ast
import sys
from pathlib import Path

import pytest
import torch

from tileweld import models

NAMES = models.available()
CASES = [(name, label) for name in NAMES for label in ["", *models.load(name).VARIANTS]]
LANGUAGE_MODELS = [name for name in NAMES if models.load(name).CAUSAL_INPUT is not None]
# a dynamic compile takes about a second: of the variants, only those that give attention another graph
COMPILED = [(name, "") for name in NAMES] + [
    ("alibi", "distance"), ("annotated_mha", "keep_weights"), ("deepseek_mla", "split_logits"), ("llama_gqa", "mha"), ("mpt_mha", "mqa"),
    ("mpt_mha", "plain")]
CACHED = ["llama_gqa", "deepseek_mla", "collaborative"]


def make(name: str, label: str = "", **overrides):
    module = models.load(name)
    return module, module.build(**(module.VARIANTS[label] if label else {}), **overrides)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def test_every_asked_for_architecture_is_there():
    assert set(NAMES) == {
        "alibi", "annotated_mha", "bigbird", "collaborative", "deepseek_mla", "dilated", "gemma2", "gpt_oss_sinks", "llama_gqa", "longformer", "mfa", "minigpt", "mohsa", "mpt_mha",
        "t5_bias"}


def test_an_unknown_name_lists_what_exists():
    with pytest.raises(KeyError) as caught:
        models.load("lama_gqa")
    assert "'lama_gqa'" in str(caught.value) and "llama_gqa" in str(caught.value)
    with pytest.raises(KeyError):
        models.load("__init__")
    with pytest.raises(KeyError):
        models.load("../compiler/backend")


@pytest.mark.parametrize("name", NAMES)
def test_imports_torch_alone(name):
    tree = ast.parse(Path(models.load(name).__file__).read_text())
    imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {"." * node.level + (node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("name, label", CASES)
def test_shape_finite_and_deterministic(name, label):
    module, model = make(name, label)
    assert not model.training
    for batch, length in [(2, 16), (3, 7), (1, 1)]:
        inputs = module.example_inputs(batch, length)
        out = model(*inputs)
        assert out.shape == (batch, length, model.config.vocab) and out.dtype == torch.float32
        assert out.isfinite().all()
        assert all(torch.equal(a, b) for a, b in zip(inputs, module.example_inputs(batch, length)))
    state = torch.random.get_rng_state()
    again = make(name, label)[1]
    assert torch.equal(state, torch.random.get_rng_state()), "build must leave the caller's random state alone"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("name, label", [case for case in CASES if case[1] and case != ("annotated_mha", "keep_weights")])
def test_variants_do_something(name, label):
    module, model = make(name, label)
    other, inputs = module.build(), module.example_inputs()
    same = (model(*inputs) - other(*inputs)).abs().max() < 1e-4
    # these are other spellings of the same function; all others must differ
    assert same == ((name, label) in {("deepseek_mla", "split_logits"), ("alibi", "distance"), ("collaborative", "queries"), ("mohsa", "padded")})


@pytest.mark.parametrize("name, label", [case for case in CASES if case[0] in LANGUAGE_MODELS])
def test_causal_models_do_not_look_ahead(name, label):
    module, model = make(name, label)
    inputs = list(module.example_inputs(1, 16))         # row 0 has no padding
    before, k = model(*inputs), module.CAUSAL_INPUT
    for position in (5, 15):
        changed = inputs.copy()
        changed[k] = inputs[k].clone()
        changed[k][:, position] = (inputs[k][:, position] + 1) % 250 + 1
        after = model(*changed)
        assert torch.allclose(before[:, :position], after[:, :position], rtol=0, atol=1e-6)
        assert (before[:, position:] - after[:, position:]).abs().amax(-1).gt(1e-6).all(), "and later rows do look back"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LANGUAGE_MODELS])
def test_encoders_look_both_ways(name):
    module, model = make(name)
    tokens, *rest = module.example_inputs(1, 16)
    changed = tokens.clone()
    changed[:, 8] = tokens[:, 8] % 250 + 1
    difference = (model(tokens, *rest) - model(changed, *rest)).abs().amax(-1)[0]
    assert difference[6] > 1e-6 and difference[10] > 1e-6


@pytest.mark.parametrize("name, label", COMPILED)
def test_compiles_to_one_graph_for_two_lengths(name, label):
    module, model = make(name, label, layers=2 if name in ("gemma2", "gpt_oss_sinks") else 1)       # these two alternate their masks
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for length in (16, 23):
        inputs = module.example_inputs(2, length)
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_graph_with_static_shapes(name):
    module, model = make(name, layers=1)
    inputs = module.example_inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name, label", CASES)
def test_bfloat16_is_close_to_float32(name, label):
    module, model = make(name, label)
    inputs = module.example_inputs()
    expected = model(*inputs)
    out = model.to(torch.bfloat16)(*inputs)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 0.05, f"relative error {error:.3f}"          # bf16 keeps 8 bits: 0.4% an operation, some dozens of them; measured 0.4% to 3%


@pytest.mark.parametrize("name, label", CASES)
def test_float64_is_close_to_float32(name, label):
    module, model = make(name, label)
    inputs = module.example_inputs()
    expected = model(*inputs)
    out = model.double()(*inputs)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, label", CASES)
def test_every_parameter_gets_a_gradient(name, label):
    module, model = make(name, label)
    inputs = module.example_inputs()
    model(*inputs).square().mean().backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_decoding_with_a_cache_equals_the_full_forward(name, compiled):
    module, model = make(name, layers=2)
    tokens, prompt = module.example_inputs(2, 12)[0], 5
    step = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    with torch.no_grad():
        expected = model(tokens)
        cache = model.new_cache(batch=2, capacity=20)           # larger than needed: empty slots must stay hidden
        for k, v in cache:
            k[:, ..., -3:, :], v[:, ..., -3:, :] = 1e3, 1e3     # what an earlier request may have left there
        parts = [step(tokens[:, :prompt], cache, torch.arange(prompt))]
        parts += [step(tokens[:, t: t + 1], cache, torch.tensor([t])) for t in range(prompt, 12)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CACHED)
def test_cache_without_positions_is_refused(name):
    module, model = make(name)
    with pytest.raises(ValueError, match="cache_position"):
        model(module.example_inputs()[0], model.new_cache(2, 16))


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(models.load(name).Config(), "max_positions")])
def test_too_many_tokens_say_so(name):
    module = models.load(name)
    model = module.build(max_positions=12)
    if name == "mpt_mha":
        model = module.build(max_positions=12, alibi=False)
    model(*module.example_inputs(1, 12))
    with pytest.raises(ValueError, match="max_positions=..."):
        model(*module.example_inputs(1, 13))
