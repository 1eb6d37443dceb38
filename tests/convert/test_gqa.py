"""to_gqa on whole models: exact where heads are redundant, Hugging Face checkpoints that reload, reports, skipped layers."""
import importlib.util
from pathlib import Path

import pytest
import torch

import tileweld
from tileweld import convert, models

_spec = importlib.util.spec_from_file_location("attention_model", Path(__file__).with_name("attention_model.py"))
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
Model, scramble, tokens = _shared.Model, _shared.scramble, _shared.tokens


def llama(**kwargs):
    import transformers

    config = transformers.LlamaConfig(**{**dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                                               initializer_range=0.3), **kwargs})
    return transformers.LlamaForCausalLM(config).eval()


def logits(model, ids):
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotary", ["half", "neighbours", None])
@pytest.mark.parametrize(("heads", "kv_heads", "keep"), [(4, 4, 2), (6, 3, 1), (4, 4, 1), (8, 4, 2)])
def test_redundant_heads_merge_exactly(heads, kv_heads, keep, rotary, bias):
    model, ids = Model(heads=heads, kv_heads=kv_heads, rotary=rotary, bias=bias), tokens()
    twins = [j % keep for j in range(kv_heads)]  # not neighbours: the grouping has to find them
    for n, layer in enumerate(model.layers):
        scramble(layer, twins, seed=n)
    expected = logits(model, ids)
    report = convert.to_gqa(model, keep, ids[:2])
    assert torch.linalg.vector_norm(logits(model, ids) - expected) <= 1e-10 * torch.linalg.vector_norm(expected)
    assert {x.groups for x in report.layers} == {tuple(tuple(range(g, kv_heads, keep)) for g in range(keep))}
    assert all(layer.k_proj.out_features == keep * 4 and layer.kv_heads == keep for layer in model.layers)
    assert max(x.residual for x in report.layers) < 1e-10 and report.uniform


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_methods_come_out_in_their_order(calibrated):
    errors = {}
    for name in ("mean", "aligned", "data"):
        torch.manual_seed(0)
        model, ids = Model(layers=1), tokens()
        with torch.no_grad():
            scramble(model.layers[0], [0, 0, 1, 1])
            for p in (model.layers[0].k_proj.weight, model.layers[0].v_proj.weight):
                p.add_(torch.randn_like(p), alpha=0.02)
        report = convert.to_gqa(model, 2, ids if calibrated else None, method=name, refit=False).layers[0]
        errors[name] = report.key_error + report.value_error
    assert errors["data"] < errors["aligned"] < errors["mean"]


def test_as_many_heads_as_there_are_is_the_identity():
    model, ids = Model(), tokens()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    report = convert.to_gqa(model, 4, ids)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert report.uniform and report.kv_bytes_before == report.kv_bytes_after


@pytest.mark.parametrize(("heads", "kv_heads", "keep", "kwargs"), [(4, 4, 2, {}), (6, 3, 1, {}), (4, 4, 1, dict(attention_bias=True, tie_word_embeddings=True))])
def test_a_saved_llama_reloads_with_equal_logits(tmp_path, heads, kv_heads, keep, kwargs):
    import transformers

    model, ids = llama(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8, hidden_size=48, **kwargs), tokens()
    if kwargs:  # transformers starts biases at 0
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.k_proj.bias.normal_(), layer.self_attn.v_proj.bias.normal_(), layer.self_attn.q_proj.bias.normal_()
    report = tileweld.convert.to_gqa(model, keep, ids)
    assert model.config.num_key_value_heads == keep and report.kv_bytes_after * kv_heads == report.kv_bytes_before * keep
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_key_value_heads == keep
    assert torch.equal(logits(again, ids), expected)
    greedy = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids[:1], use_cache=True, **greedy), model.generate(ids[:1], use_cache=False, **greedy))


def test_the_config_given_to_the_model_and_bfloat16_weights():
    model, ids = llama().to(torch.bfloat16), tokens()
    parameters = {n: p.dtype for n, p in model.named_parameters()}
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    convert.to_gqa(model, 2, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert {n: p.dtype for n, p in model.named_parameters()} == parameters
    assert not model.model.layers[0].self_attn.k_proj.weight.requires_grad and model.model.layers[1].self_attn.k_proj.weight.requires_grad
    assert logits(model, ids).isfinite().all()


def test_padding_does_not_count():
    ids, results = tokens(), []
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    for fill in (0, 5):
        torch.manual_seed(0)
        model = llama()
        report = convert.to_gqa(model, 2, {"input_ids": torch.where(mask.bool(), ids, fill), "attention_mask": mask})
        results.append(model.model.layers[1].self_attn.o_proj.weight)
    assert report.calibration_tokens == 32
    assert torch.allclose(*results, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "overrides"), [("llama_gqa", dict(kv_heads=4)), ("minigpt", dict(kv_heads=4, layers=2)), ("gemma2", {}), ("gpt_oss_sinks", {}),
                                                 ("mpt_mha", dict(clip_qkv=None, qk_ln=False)), ("mpt_mha", dict(clip_qkv=None, qk_ln=False, alibi=False))])
def test_the_models_of_this_repository(name, overrides):
    module = models.load(name)
    model, inputs = module.build(**overrides), module.example_inputs(batch=2, length=16)
    whole = sum(p.numel() for p in model.parameters())
    report = convert.to_gqa(model, 1, inputs[0])
    out = model(*inputs)
    assert (out[0] if isinstance(out, tuple) else out).isfinite().all()
    assert report.uniform and model.config.kv_heads == 1 and sum(p.numel() for p in model.parameters()) < whole
    if hasattr(model, "new_cache") and name == "llama_gqa":
        cache, t = model.new_cache(2, 32), inputs[0].shape[1]
        assert torch.allclose(model(*inputs, cache, torch.arange(t)), out, atol=1e-5)


def test_alibi_heads_keep_their_places():
    model = models.load("mpt_mha").build(clip_qkv=None, qk_ln=False)
    report = convert.to_gqa(model, 2, tokens())
    assert all(x.groups == ((0, 1), (2, 3)) and "neighbours" in x.note for x in report.layers)


def test_max_residual_skips_layers():
    model, ids = Model(), tokens()
    scramble(model.layers[0], [0, 1, 0, 1])
    before = [p.clone() for p in model.layers[1].parameters()]
    report = convert.to_gqa(model, 2, ids, max_residual=1e-6)
    assert [x.converted for x in report.layers] == [True, False] and report.skipped == [report.layers[1]] and not report.uniform
    assert all(torch.equal(a, b) for a, b in zip(model.layers[1].parameters(), before))
    assert (model.layers[0].kv_heads, model.layers[1].kv_heads) == (2, 4)
    assert report.layers[1].residual > 1e-6 and report.layers[1].kv_bytes_after == report.layers[1].kv_bytes_before == 4 * 8 * 8
    assert "does not reload" in str(report) and "skipped" in str(report)
    again = convert.to_gqa(model, 2, ids)  # layers of two sizes are read as they are
    assert [x.kv_heads_before for x in again.layers] == [2, 4] and again.uniform


def test_a_hugging_face_model_with_skipped_layers_runs_and_is_finished_later():
    model, ids = llama(), tokens()
    first = convert.to_gqa(model, 2, ids, max_residual=0.0)
    assert len(first.skipped) == 2 and model.config.num_key_value_heads == 4
    report = convert.to_gqa(model, 2, ids)
    assert report.uniform and model.config.num_key_value_heads == 2


def test_the_report_reads_well():
    model = Model()
    text = str(convert.to_gqa(model, 2, tokens()))
    assert "layers.0" in text and "4 -> 2" in text and "512 -> 256 bytes a token" in text and "Lossy" in text
    redundant = Model()
    for layer in redundant.layers:
        scramble(layer, [0, 0, 1, 1])
    assert "Lossy" not in str(convert.to_gqa(redundant, 2, tokens()))


def test_the_same_call_gives_the_same_weights_and_leaves_modes_and_hooks_alone():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Model(kv_heads=16, heads=16, layers=1).train()
        convert.to_gqa(model, 4, tokens())
        assert model.training and model.layers[0].training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        results.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))
