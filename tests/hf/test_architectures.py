"""Hugging Face architectures, tiny and from their configs: every softmax attention core is fused, and the output is eager's.

Eager and sdpa attention, left padding, two lengths under dynamic=True with one compilation. No weights are downloaded.
"""

import logging
import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is an extra: pip install tileweld[hf]")
logging.getLogger("transformers").setLevel(logging.ERROR)

from tileweld.compiler.backend import rewrite, tileweld  # noqa: E402
from tileweld.compiler.options import Options  # noqa: E402
from tileweld.compiler.report import Report  # noqa: E402

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 128, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OWN_NAMES = {"n_embd": 64, "n_layer": 1, "n_head": 4}
ARCHITECTURES = {
    "llama": GROUPED, "mistral": {**GROUPED, "sliding_window": 16}, "qwen2": GROUPED, "qwen3": {**GROUPED, "head_dim": 16}, "phi3": GROUPED, "gpt_neox": {}, "falcon": {}, "bert": {}, "roberta": {},
    "gemma2": {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "num_hidden_layers": 2},
    "gpt2": OWN_NAMES, "bloom": {"n_layer": 1, "n_head": 4}, "mpt": {"d_model": 64, "n_layers": 1, "n_heads": 4, "max_seq_len": 128}, "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0},
    "vit": {"image_size": 32, "patch_size": 8}, "clip_text_model": {},
    "deepseek_v3": {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                    "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 0},
    "mixtral": {**GROUPED, **EXPERTS}, "gpt_oss": {**GROUPED, **EXPERTS, "head_dim": 16, "sliding_window": 16, "num_hidden_layers": 2},
}
EAGER_ONLY = {"bloom", "mpt", "gpt_oss", "gemma2"}  # transformers has no sdpa path for them
CASES = [(name, implementation) for name in ARCHITECTURES for implementation in ("eager", "sdpa") if implementation == "eager" or name not in EAGER_ONLY]
CORES = {"t5": 3, "gemma2": 2, "gpt_oss": 2}  # one a layer; T5: encoder, decoder, and the decoder's view of the encoder; two layers where a window alternates


def build(name, implementation):
    given = {**SIZES, **ARCHITECTURES[name]}
    if name == "vit":
        for key in ("vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"):
            del given[key]
    config = transformers.CONFIG_MAPPING[name](**given)
    config.use_cache = False
    torch.manual_seed(0)
    if name in ("t5", "clip_text_model"):
        family = transformers.T5ForConditionalGeneration if name == "t5" else transformers.CLIPTextModel
        model = family._from_config(config, attn_implementation=implementation)
    else:
        family = transformers.AutoModel if name in ("bert", "roberta", "vit") else transformers.AutoModelForCausalLM
        model = family.from_config(config, attn_implementation=implementation)
    for parameter in model.parameters():  # the default of 0.02 makes every attention nearly uniform, and any mask nearly right
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def inputs(name, length, batch=2):
    if name == "vit":
        return {"pixel_values": torch.randn(batch + (length > 20), 3, 32, 32)}
    ids = torch.randint(3, 128, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask, **({"decoder_input_ids": ids[:, : length // 2]} if name == "t5" else {})}


def output(result):
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def compiled(model, dynamic=None, aot=True, **options):
    """(compiled model, report, graphs); ``aot`` False runs the rewritten graph as it is, without AOT and lowering."""
    report, graphs = Report(), []

    def backend(gm, example_inputs):
        graphs.append(gm)
        if not aot:
            return rewrite(gm, example_inputs, Options.parse({"target": "reference", **options}), report).forward
        return tileweld(gm, example_inputs, options={"target": "reference", **options}, report=report)

    return torch.compile(model, backend=backend, dynamic=dynamic), report, graphs


def assert_close(ours, eager):
    """fp32, 1e-5 of the largest value."""
    assert not eager.isnan().any()
    assert (ours - eager).abs().max() <= 1e-5 * eager.abs().max()


@pytest.mark.parametrize("name,implementation", CASES)
def test_every_core_is_fused_at_two_lengths_with_one_compilation(name, implementation):
    model = build(name, implementation)
    run, report, graphs = compiled(model, dynamic=True, aot=implementation == "eager")  # the rest of the way is the same for both
    with torch.no_grad():
        for length in (40, 26):
            x = inputs(name, length)
            assert_close(output(run(**x)), output(model(**x)))
            number = len(graphs) if length == 40 else number
    assert len(graphs) == number, "the second length was compiled again"
    assert [r for r in report.refusals if r.rewrite == "attention"] == []
    assert report.counts["attention"] == CORES.get(name, 1)


@pytest.mark.parametrize("name", ["llama", "t5", "gpt_oss", "mistral"])
def test_static_shapes_and_generated_kernels(name):
    """The default target: C++ kernels where there is a compiler."""
    model = build(name, "eager")
    run, report, _ = compiled(model, target="auto")
    with torch.no_grad():
        x = inputs(name, 33)
        assert_close(output(run(**x)), output(model(**x)))
    assert report.counts["attention"] == CORES.get(name, 1)


def test_masks_are_formulas():
    """What HF writes as a [B, 1, T, T] tensor: causal, window and padding as one readable mask, with no tensor of that size."""
    run, report, _ = compiled(build("mistral", "eager"))
    with torch.no_grad():
        run(**inputs("mistral", 40))
    for fusion in report.fusions:
        if fusion.rewrite == "attention":
            assert "mask=(j <= i) & (i - j < 16) & (c0[b, j] != 0)" in fusion.detail
            assert "heads=4/2" in fusion.detail
            assert "modeling_mistral.py" in fusion.source


def test_gradients():
    """Training: gradients of all parameters equal eager's, in one graph."""
    model = build("llama", "eager").train()
    report = Report()
    run = torch.compile(model, backend=lambda gm, x: tileweld(gm, x, options={"target": "reference"}, report=report), fullgraph=True)
    x = inputs("llama", 20)
    keep = x["attention_mask"].bool()
    gradients = []
    for forward in (model, run):
        model.zero_grad()
        output(forward(**x))[keep].square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert report.counts["attention"] == 1
    for n in gradients[0]:
        torch.testing.assert_close(gradients[1][n], gradients[0][n], rtol=1e-4, atol=1e-5 * gradients[0][n].abs().max().item() + 1e-8)
