"""reassociate where expanded keys and values exceed expanded_kv: chunks merged by log-sum-exp, equal to the whole; and where they may not be taken."""

import copy

import pytest
import torch

import tileweld
from tileweld import models

from .conftest import error, rewritten
from .mla_block import Block, inputs

LIMIT = 2 * 8 * 4 * 30 * 128  # bytes of 128 keys: batch 2, float64, 4 heads, 15 + 15 numbers


def made(report):
    return [f.detail for f in report.fusions if f.rewrite == "reassociate"]


def check(block, args, limit=LIMIT, **options):
    with torch.no_grad():
        exact = block(*args)
    got, report = rewritten(block, *args, verify=True, expanded_kv=limit, **options)
    assert error(got, exact) <= 1e-10 * exact.abs().max(), error(got, exact)
    return report


@pytest.mark.parametrize("kind", [{}, dict(bias=True), dict(pad=4), dict(own_kv_products=True, bias=True), dict(split=True), dict(layout="neighbours", q_rank=12), dict(broken="sink"), dict(broken="finite"), dict(broken="gate")], ids=str)
def test_chunks_are_equal(kind):
    report = check(Block(**kind).double(), inputs(300, 60))
    (text,) = made(report)
    assert "chunks of" in text and "merged by log-sum-exp: expanded keys and values have" in text and "*B*Tk bytes" in text and f"expanded_kv={LIMIT}" in text
    targets = [str(n.target) for n in report.graphs[0].graph.nodes]
    assert targets.count("tileweld.attention_lse.default") == int(text.split()[0]) >= 2 and targets.count("tileweld.attention.default") == 0


def test_no_tensor_holds_all_keys_expanded():
    """What is expanded, [B, chunk, H (P + V)] and its parts, has at most the limit's bytes; as written, 360 keys have 2.8 times that."""
    args = inputs(300, 60)
    report = check(Block().double(), args)
    sizes = [n.meta["val"].numel() for n in report.graphs[0].graph.nodes if isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].shape[0] == 2 and n.meta["val"].dim() == 4 and n.meta["val"].shape[1] == 4]
    assert max(sizes) <= max(2 * 4 * 128 * 34, 2 * 4 * 300 * 19)  # keys of a chunk, or the queries


@pytest.mark.parametrize("limit", [1 << 30, 2 * 8 * 4 * 34 * 400])
def test_what_fits_stays_whole(limit):
    report = check(Block().double(), inputs(300, 60), limit)
    assert not made(report) and len([f for f in report.kept if f.rewrite == "reassociate"]) == 1


def test_expanded_keys_that_leave_are_not_cut():
    block, args = Block(broken="returned").double(), inputs(300, 60)
    got, report = rewritten(block, *args, expanded_kv=LIMIT)
    assert not made(report)


def test_where_absorbing_is_cheaper_nothing_is_expanded():
    report = check(Block().double(), inputs(1, 400))
    assert "chunks" not in made(report)[0]


def test_training_stays_whole():
    got, report = rewritten(Block().double(), *inputs(300, 60), grad=True, expanded_kv=LIMIT)
    assert not made(report)


def test_symbolic_prefixes_are_guarded():
    """The number of chunks is that of the first prefix; the last chunk takes what is left."""
    block, args = Block().double(), inputs(300, 60)
    for x in args[1:]:
        torch._dynamo.mark_dynamic(x, 1)
    report = check(block, args)
    assert "chunks of" in made(report)[0]


def test_the_model_with_a_prefix():
    """A prefill of 200 behind 100 cached tokens: kernels of both ways give eager's logits."""
    module = models.load("deepseek_mla")
    model = module.build(layers=1)
    tokens = torch.randint(1, 256, (2, 300), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2, 320)
    with torch.no_grad():
        model(tokens[:, :100], cache, torch.arange(100))
        exact = model(tokens[:, 100:], copy.deepcopy(cache), torch.arange(100, 300))
        torch._dynamo.reset()
        options = {"expanded_kv": 2 * 4 * 4 * 36 * 128}
        report = tileweld.explain(model, tokens[:, 100:], copy.deepcopy(cache), torch.arange(100, 300), options={**options, "verify": True})
        torch._dynamo.reset()
        got = torch.compile(model, backend="tileweld", options=options)(tokens[:, 100:], copy.deepcopy(cache), torch.arange(100, 300))
    assert "3 chunks of 128 keys" in made(report)[0], (made(report), report.kept)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", [2, 3])
def test_hugging_face_with_a_prefix(version):
    transformers = pytest.importorskip("transformers", reason="an optional dependency")
    config = getattr(transformers, f"DeepseekV{version}Config")(
        vocab_size=64, hidden_size=48, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=4, q_lora_rank=24,
        kv_lora_rank=32, qk_rope_head_dim=8, v_head_dim=10, qk_nope_head_dim=10, head_dim=8, n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=512)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    module, tokens = getattr(transformers, f"DeepseekV{version}ForCausalLM")(config).eval(), torch.randint(1, 64, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = module(input_ids=tokens, use_cache=False).logits[:, 60:]
        cache = transformers.DynamicCache(config=config)
        module(input_ids=tokens[:, :60], past_key_values=cache)
        options = {"expanded_kv": 4 * 4 * 28 * 128}
        torch._dynamo.reset()
        report = tileweld.explain(module, input_ids=tokens[:, 60:], past_key_values=copy.deepcopy(cache), options=options)
        torch._dynamo.reset()
        got = torch.compile(module, backend="tileweld", options=options)(input_ids=tokens[:, 60:], past_key_values=copy.deepcopy(cache)).logits
    assert "chunks of 128 keys" in made(report)[0], (made(report), [r.reason for r in report.refusals], report.kept)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
