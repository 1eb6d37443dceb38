"""Hugging Face's DeepSeek V2 and V3: their cache holds latents, which every step expands; a step absorbs, a prefill does not."""

import copy

import pytest
import torch

import tileweld

transformers = pytest.importorskip("transformers")
CONFIG = dict(vocab_size=64, hidden_size=48, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=4, kv_lora_rank=32,
              qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=16, head_dim=8, n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=256)


def model(version, attn="eager", **changes):
    config = getattr(transformers, f"DeepseekV{version}Config")(**{**CONFIG, "q_lora_rank": 24, **changes})
    config._attn_implementation = attn
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"DeepseekV{version}ForCausalLM")(config).eval()


@pytest.mark.parametrize("version, attn, changes", [
    (2, "eager", {}), (2, "sdpa", dict(q_lora_rank=None)), (3, "eager", dict(rope_interleave=False)),
    (3, "sdpa", dict(rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64})),
])
def test_a_step_absorbs_and_a_prefill_does_not(version, attn, changes):
    module, tokens = model(version, attn, **changes), torch.randint(1, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with torch.no_grad():
        exact = module(input_ids=tokens, use_cache=False).logits
        cache = transformers.DynamicCache(config=module.config)
        prefill = tileweld.explain(module, input_ids=tokens, use_cache=False)
        module(input_ids=tokens[:, :19], past_key_values=cache)
        layer = cache.layers[0]
        assert layer.keys.shape[-1] + layer.values.shape[-1] == 32 + 8 and layer.keys.shape[1] == 1  # latent and roped key, one for all heads
        step = tileweld.explain(module, input_ids=tokens[:, 19:], past_key_values=copy.deepcopy(cache), options={"verify": True})
        torch._dynamo.reset()
        got = torch.compile(module, backend="tileweld")(input_ids=tokens[:, 19:], past_key_values=copy.deepcopy(cache)).logits
    assert prefill.counts["reassociate"] == 0 and len(prefill.kept) == 1
    assert step.counts["reassociate"] == 1 and step.counts["attention"] == 1, [r.reason for r in step.refusals]
    torch.testing.assert_close(got, exact[:, 19:], rtol=1e-4, atol=1e-5)
