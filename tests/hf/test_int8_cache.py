"""tileweld.Int8Cache in Hugging Face models: beside the float cache, appended against at once, compiled against eager."""
import functools

import pytest
import torch

pytest.importorskip("transformers", reason="Hugging Face models need transformers")

import tileweld  # noqa: E402
from transformers import GemmaConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, StaticCache  # noqa: E402
from tileweld.compiler.backend import tileweld as backend  # noqa: E402
from tileweld.compiler.errors import UnsupportedError  # noqa: E402
from tileweld.compiler.report import Report  # noqa: E402

SIZES = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, max_position_embeddings=64)
LENGTH = 24


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def logits(run, cache, ids, steps):
    """of all positions of ids, in calls of so many tokens"""
    outs, start = [], 0
    with torch.no_grad():
        for n in steps:
            outs.append(run(ids[:, start:start + n], past_key_values=cache).logits)
            start += n
    return torch.cat(outs, 1)


OPTIONS = [{}, {"asymmetric": True}, {"keys": "channel"}, {"asymmetric": True, "keys": "channel"}, {"keys": "channel", "group": 4}, {"asymmetric": True, "keys": "channel", "group": 4}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_near_the_float_cache_and_the_same_however_it_is_filled(llama, options):
    ids = torch.randint(0, 128, (2, 12))
    exact = logits(llama, StaticCache(llama.config, LENGTH), ids, [12])
    at_once, appended = (logits(llama, tileweld.Int8Cache(llama.config, LENGTH, **options), ids, steps) for steps in ([9, 3], [9, 1, 1, 1]))
    torch.testing.assert_close(at_once, appended, atol=2e-5, rtol=1e-4)
    assert 1e-5 < (at_once - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_compiled_it_is_never_dequantised(llama, attention, options):
    llama.set_attn_implementation(attention)
    ids, report = torch.randint(0, 128, (1, 10)), Report()
    torch._dynamo.reset()
    compiled = torch.compile(llama, backend=functools.partial(backend, report=report), dynamic=False)
    caches = [tileweld.Int8Cache(llama.config, LENGTH, **options) for _ in range(2)]
    eager, ours = (logits(run, cache, ids, [8, 1, 1]) for run, cache in zip((llama, compiled), caches))
    torch.testing.assert_close(ours, eager, atol=2e-5, rtol=1e-4)
    ops = torch.ops.tileweld
    read = [n.args[1:3] for n in report.graphs[-1].graph.nodes if n.target is (ops.attention_keys.default if "group" in options else ops.attention.default)]
    assert len(report.graphs) == 2 and len(read) == 2 and all(x.meta["val"].dtype == torch.int8 for pair in read for x in pair)
    llama.set_attn_implementation("sdpa")


@pytest.mark.parametrize("kind", [{}, {"keys": "channel", "group": 4}], ids=str)
def test_generate(llama, kind):
    """Greedy, beams (the cache is reordered) and a second use after reset."""
    ids = torch.randint(1, 128, (1, 6))
    cache = tileweld.Int8Cache(llama.config, LENGTH, **kind)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, disable_compile=True)
    first = llama.generate(ids, past_key_values=cache, **options)
    assert first.shape == (1, 14) and (kind or cache.bytes == 2 * 2 * 2 * LENGTH * (16 + 4))
    cache.reset()
    assert torch.equal(llama.generate(ids, past_key_values=cache, **options), first)
    beams = llama.generate(ids, past_key_values=tileweld.Int8Cache(llama.config, LENGTH, **kind), num_beams=3, **options)
    assert beams.shape == (1, 14)


def test_a_sliding_window_is_the_mask():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()
    ids = torch.randint(0, 128, (1, 12))
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
    got = logits(model, tileweld.Int8Cache(model.config, LENGTH), ids, [7, 1, 1, 1, 1, 1])
    assert (got - exact).abs().max() < 0.02 * exact.abs().max()


def test_what_it_does_not_keep_is_refused():
    config = LlamaConfig(**SIZES)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedError, match="linear_attention"):
        tileweld.Int8Cache(config, LENGTH)
    config = LlamaConfig(**SIZES)
    config.attention_chunk_size = 8
    with pytest.raises(UnsupportedError, match="chunked"):
        tileweld.Int8Cache(config, LENGTH)
    for other in (GPT2Config(n_layer=3), GemmaConfig(num_hidden_layers=3)):
        assert len(tileweld.Int8Cache(other, 4).layers) == 3
    with pytest.raises(UnsupportedError, match="offload"):
        tileweld.Int8Cache(LlamaConfig(**SIZES), 4).layers[0].offload()
