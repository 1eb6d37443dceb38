"""hf: targets: a tiny model for a name, that runs on its inputs, the same every time; what cannot be made says why."""

import pytest
import torch

from tileweld.compiler.errors import OptionError
from tileweld.compiler.targets import TargetError, parse_target
from tileweld.compiler.tiny import tiny_inputs, tiny_model

pytest.importorskip("transformers", reason="hf: targets need tileweld[hf]")

NAMES = ("llama mistral qwen2 qwen3 gemma2 phi3 gpt2 gpt_neox opt bloom mpt falcon bert t5 vit deepseek_v3 mixtral gpt_oss clip_text_model roberta "
         "whisper bart wav2vec2 olmo2").split()


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_model_runs_on_its_inputs(name):
    model = tiny_model(name)
    assert not model.training and sum(p.numel() for p in model.parameters()) < 5_000_000
    with torch.no_grad():
        out = model(**tiny_inputs(model, batch=2, length=9, pad=True))
    first = out[0]
    assert first.shape[0] == 2 and bool(first.isfinite().all())


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
