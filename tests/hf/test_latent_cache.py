"""What models with latent attention keep of a token, and that a compiled decode over it gives their tokens.

transformers' own caches hold what is compressed (since they took the expansion behind the cache): the latent in `keys`, the one rotary key of all heads in
`values`, kv_lora_rank + qk_rope_head_dim numbers a token and layer. StaticCache keeps them in tensors of one size, which a compiled step updates in place:
tileweld adds no cache of its own. Should a version expand before it caches, these tests fail.
"""

import logging
import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is an extra: pip install tileweld[hf]")
logging.getLogger("transformers").setLevel(logging.ERROR)

from tileweld.compiler.backend import tileweld  # noqa: E402
from tileweld.compiler.report import Report  # noqa: E402

LAYERS, LATENT, ROPE = 2, 32, 8
SIZES = {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128, "vocab_size": 128, "max_position_embeddings": 128,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "q_lora_rank": 24, "kv_lora_rank": LATENT, "qk_nope_head_dim": 16, "qk_rope_head_dim": ROPE, "v_head_dim": 12}
DENSE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": LAYERS}
ARCHITECTURES = {"deepseek_v2": {**DENSE, "q_lora_rank": None}, "deepseek_v3": DENSE, "minicpm3": {}, "youtu": {}, "glm4_moe_lite": {**DENSE, "mlp_layer_types": ["dense"] * LAYERS}}


def build(name):
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[name](**{**SIZES, **ARCHITECTURES[name]}), attn_implementation="sdpa")
    for parameter in model.parameters():  # the default of 0.02 makes every attention nearly uniform
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def held(cache) -> int:
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cache_holds_a_latent_and_one_rotary_key_a_token(name):
    model, batch, length, capacity = build(name), 2, 9, 20
    ids = torch.randint(3, 128, (batch, length))
    with torch.no_grad():
        for cache, tokens in ((transformers.DynamicCache(config=model.config), length), (transformers.StaticCache(config=model.config, max_cache_len=capacity), capacity)):
            model(ids, past_key_values=cache)
            assert held(cache) == LAYERS * batch * tokens * (LATENT + ROPE)


def greedy(model, step, ids, cache, tokens):
    """(logits [tokens, B, vocab], tokens [tokens, B]) of a hand-written loop: a prefill by the model, every further token by ``step``."""
    logits, found = [], []
    out = model(ids, past_key_values=cache).logits[:, -1]
    for _ in range(tokens):
        logits.append(out)
        found.append(out.argmax(-1))
        out = step(found[-1][:, None], past_key_values=cache).logits[:, -1]
    return torch.stack(logits), torch.stack(found)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_a_compiled_step_over_a_static_cache_gives_the_same_tokens(name):
    """50 steps, one compilation: logits as those of the plain model with its growing cache."""
    model, report, compilations = build(name), Report(), []

    def backend(gm, example_inputs):
        compilations.append(gm)
        return tileweld(gm, example_inputs, report=report)

    torch._dynamo.reset()
    ids = torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        expected, tokens = greedy(model, model, ids, transformers.DynamicCache(config=model.config), 50)
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        got, same = greedy(model, torch.compile(model, backend=backend), ids, cache, 50)
    assert torch.equal(tokens, same)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert len(compilations) == 1, f"{len(compilations)} compilations: a shape or a number changes from step to step"
    assert held(cache) == LAYERS * 2 * 64 * (LATENT + ROPE)
    assert sum(k.op == "attention" and k.implementation.startswith("cpp:") for k in report.kernels) == LAYERS


def test_generate_with_a_compiled_forward():
    model = build("deepseek_v3")
    ids = torch.randint(3, 128, (1, 7))
    options = {"max_new_tokens": 12, "do_sample": False}
    torch._dynamo.reset()
    expected = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, backend="tileweld")
    got = model.generate(ids, cache_implementation="static", disable_compile=True, **options)  # disable_compile: of generate's own compilation by Inductor
    assert torch.equal(got, expected)
