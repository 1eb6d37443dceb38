"""hf: targets: a tiny model for a name, that runs on its inputs, the same every time; what cannot be made says why."""

import pytest
import torch

from tileweld.compiler.errors import OptionError
from tileweld.compiler.targets import TargetError, parse_target
from tileweld.compiler.tiny import tiny_inputs, tiny_model

pytest.importorskip("transformers", reason="hf: targets need tileweld[hf]")

NAMES = ("llama mistral qwen2 qwen3 gemma2 phi3 gpt2 gpt_neox opt bloom mpt falcon bert t5 vit deepseek_v3 mixtral gpt_oss clip_text_model roberta "
         "whisper bart wav2vec2 olmo2 clip siglip swin convnext segformer mamba2 deepseek_v2 dots1 videomae speech_to_text patchtst decision_transformer bros gpt_neo").split()


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_model_runs_on_its_inputs(name):
    model = tiny_model(name)
    assert not model.training and sum(p.numel() for p in model.parameters()) < 5_000_000
    with torch.no_grad():
        out = model(**tiny_inputs(model, batch=2, length=9, pad=True))
    first = out[0]
    assert first.shape[0] == 2 and bool(first.isfinite().all())


@pytest.mark.parametrize("name,shapes", [
    ("clip", {"input_ids": (2, 9), "attention_mask": (2, 9), "pixel_values": (2, 3, 32, 32)}),          # two towers
    ("llava", {"input_ids": (2, 22), "pixel_values": (2, 3, 32, 32)}),                                   # six words and a placeholder for each of an image's 16 patches
    ("qwen2_vl", {"input_ids": (1, 10), "mm_token_type_ids": (1, 10), "pixel_values": (16, 384), "image_grid_thw": (1, 3)}),  # rows of patches, 2 x 2 of which are one feature
    ("videomae", {"pixel_values": (2, 16, 3, 32, 32)}),
    ("encodec", {"input_values": (2, 1, 4000)}),
    ("patchtst", {"past_values": (2, 32, 1)}),
])
def test_inputs_follow_the_signature(name, shapes):
    model = tiny_model(name)
    inputs = tiny_inputs(model, batch=2, length=9, pad=True)
    assert {n: tuple(x.shape) for n, x in inputs.items()} == shapes
    with torch.no_grad():
        model(**inputs)
    if name in ("llava", "qwen2_vl"):
        image = model.config.image_token_id
        changed = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
        assert int((inputs["input_ids"] == image).sum()) in (32, 4)
        assert not torch.equal(model(**inputs)[0], model(**changed)[0])  # the images are read


def test_stages_keep_their_proportions():
    swin, segformer = tiny_model("swin").config, tiny_model("segformer").config
    assert [*swin.depths] == [2, 2, 2, 2] and [*swin.num_heads] == [1, 2, 4, 8] and swin.embed_dim == 32
    assert [*segformer.hidden_sizes] == [16, 32, 80, 128] and [*segformer.num_attention_heads] == [1, 2, 5, 8]


def test_the_same_name_is_the_same_model_and_leaves_the_random_state():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    a, b = tiny_model("llama"), tiny_model("llama")
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_the_words_of_a_target_reach_the_model():
    target = parse_target("hf:llama:sdpa:pad", batch=3, length=8)
    assert target.call.config._attn_implementation == "sdpa"
    assert target.kwargs["input_ids"].shape == (3, 8) and target.kwargs["attention_mask"].sum(1).tolist() == [5, 8, 8]
    assert target.call.config.num_key_value_heads < target.call.config.num_attention_heads


def test_what_cannot_be_made_says_why():
    with pytest.raises(OptionError, match="unknown Hugging Face architecture 'llamma'.*near: .*llama"):
        tiny_model("llamma")
    with pytest.raises(TargetError, match="'bloom' with attention 'sdpa'.*does not support"):
        tiny_model("bloom", "sdpa")
