"""prune on models of Hugging Face whose modules have other names and shapes than Llama's: found by what they do, exact in float64, and reloaded where their config can say so."""
import pytest
import torch
import torch.nn.functional as F
from tileweld import convert
from tileweld.compiler.errors import ConversionError
from tileweld.convert.flow import trace
from tileweld.convert.linears import is_conv1d
from tileweld.convert.observe import Inputs, random_inputs
from torch import nn

transformers = pytest.importorskip("transformers")
SMALL = dict(num_hidden_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=61)
MODELS = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(intermediate_size=24, **SMALL)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=16, n_head=4, vocab_size=61, n_positions=32, bos_token_id=0, eos_token_id=0)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=24, num_key_value_heads=2, attention_bias=True, mlp_bias=True, **SMALL)),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(intermediate_size=24, **SMALL)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(intermediate_size=24, num_key_value_heads=2, pad_token_id=0, **SMALL)),
    "gptj": lambda: transformers.GPTJForCausalLM(transformers.GPTJConfig(n_layer=2, n_embd=16, n_head=4, rotary_dim=4, vocab_size=61, bos_token_id=0, eos_token_id=0)),
}
IDS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def weight(model, name):
    """[N, K], to be written to."""
    linear = model.get_submodule(name)
    return linear.weight.data.T if is_conv1d(linear) else linear.weight.data


def seen(model):
    with torch.no_grad():
        return trace(model, random_inputs(model))


def pruned(model, **kwargs):
    expected = logits(model)
    report = convert.prune(model, **kwargs)
    assert (logits(model) - expected).norm() <= 1e-10 * expected.norm()
    return report


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_dead_heads_and_channels_go(name, structured):
    model = made(name)
    flow = seen(model)
    assert len(flow.channels) == len(flow.attentions) == 2
    for n, (sources, downs) in enumerate(flow.channels.items()):
        weight(model, downs[0])[:, [1, 3, 8] + [11] * n] = 0
    for n, a in enumerate(flow.attentions):  # the first head of both layers, or of every group of two; one more of the second layer
        for h in (0, 2, 1 + n):
            weight(model, a.output)[:, 4 * h:4 * h + 4] = 0
    if name == "phi3" and not structured:  # it splits qkv_proj as the config says, for all layers
        expected = logits(model)
        with pytest.raises(ConversionError, match="left as it was.*structured=True"):
            convert.prune(model)
        assert torch.equal(logits(model), expected)
        return
    report = pruned(model, structured=structured)
    heads = [x for x in report.layers if x.what == "heads"]
    channels = [x for x in report.layers if x.what == "channels"]
    assert [x.before - x.after for x in channels] == ([3, 3] if structured else [3, 4])
    if heads[0].kv_before == 4:  # layer 0: 0, 1 and 2 are dead, layer 1: 0 and 2
        assert [x.after for x in heads] == ([2, 2] if structured else [1, 2])
    else:  # 2 KV heads: (0, 1), (2, 3); layer 0 keeps 3, layer 1 both 1 and 3
        assert [(x.after, x.kv_after) for x in heads] == ([(2, 2), (2, 2)] if structured else [(1, 1), (2, 2)])
    assert report.reloads is (structured and name in ("llama",)) and ("made from it has" in report.why_not) is not report.reloads
    assert report.reloads or report.why_not in str(report)


@pytest.mark.parametrize("name", ["bert", "gpt2", "neox", "phi3", "gptj"])
def test_channels_alone_reload_in_plain_transformers(name, tmp_path):
    model = made(name).float()
    for sources, downs in seen(model).channels.items():
        weight(model, downs[0])[:, :5] = 0
    report = convert.prune(model, structured=True)
    assert report.reloads and not report.why_not
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "neox"])
def test_a_bias_of_the_values_keeps_its_head(name):
    model = made(name)
    a = seen(model).attentions[0]
    linear, v = model.get_submodule(a.v[0]), weight(model, a.v[0])
    rows = {"bert": range(4, 8), "gpt2": range(36, 40), "neox": range(20, 24)}[name]  # values of head 1
    v[list(rows)] = 0
    assert pruned(model).layers[0].after == 4
    linear.bias.data[list(rows)] = 0
    assert pruned(model).layers[0].after == 3


def test_rows_of_the_first_layer_count_where_the_activation_is_zero_at_zero():
    model = made("bert")
    linear = model.bert.encoder.layer[0].intermediate.dense
    linear.weight.data[3] = 0
    assert pruned(model).layers[2].after == 24  # its bias is not zero
    linear.bias.data[3] = 0
    assert pruned(model).layers[2].after == 23 and linear.out_features == 23


class Block(nn.Module):
    """Embedding, one MLP whose middle is `between`, and a head."""

    def __init__(self, between, width=8):
        super().__init__()
        self.embed, self.between = nn.Embedding(61, 8), between
        self.one, self.two, self.three, self.head = nn.Linear(8, width), nn.Linear(8, width), nn.Linear(width, 8), nn.Linear(8, 61)
        self.scale = nn.Parameter(torch.randn(width))
        self.double().eval()

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.between(self, x))


def beside(m, x):
    y = m.one(x).relu()
    return m.three(y) + y


TOGETHER = {
    "a sum over them": (lambda m, x: m.three(m.one(x).softmax(-1)), "softmax reads all of its channels"),
    "read elsewhere too": (beside, "add reads all of its channels"),
    "in place, a part": (lambda m, x: m.three(half_in_place(m.one(x))), "written in place"),
    "a scale of each": (lambda m, x: m.three(m.one(x) * m.scale), "mul reads all of its channels"),
    "turned around": (lambda m, x: m.three(m.one(x).flip(-1)), "flip reads all of its channels"),
    "the weight itself": (lambda m, x: m.three(F.relu(m.one(x))) + m.one.weight.sum(), "its weight is also read outside of it"),
    "only a half of them": (lambda m, x: m.three(torch.cat([m.one(x)[..., :4], m.one(x)[..., :4]], -1)), "cat reads all of its channels"),
}


def half_in_place(y):
    y[..., :4].mul_(2)
    return y


@pytest.mark.parametrize("name", TOGETHER)
def test_channels_that_hang_together_stay(name):
    between, reason = TOGETHER[name]
    model = Block(between)
    model.three.weight.data[:, 2] = 0
    flow = seen(model)
    assert not any(s.linear == "one" for sources in flow.channels for s in sources) and reason in flow.left_out["one"], flow.left_out
    with pytest.raises(ConversionError, match=f"no attention and no MLP.*one: .*{reason}"):
        convert.prune(model)


APART = {
    "stacked": (lambda m, x: m.three((lambda a, b: a * b.sigmoid())(*m.one(x).chunk(2, -1))), 16, 8),
    "neighbours": (lambda m, x: m.three((lambda y: F.silu(y[..., ::2]) * y[..., 1::2])(m.one(x))), 16, 8),
    "two layers and numbers": (lambda m, x: m.three((m.one(x) * 0.5 + 1 - m.two(x)).clamp(-1, 1)), 8, 8),
    "through other shapes": (lambda m, x: m.three(F.gelu(m.one(x).flatten(0, 1)).view(*x.shape)), 8, 8),
}


@pytest.mark.parametrize("name", APART)
def test_channels_that_meet_no_other_go(name):
    between, rows, width = APART[name]
    model = Block(between)
    model.one = nn.Linear(8, rows).double()
    model.three.weight.data[:, [2, 5]] = 0
    ids = IDS
    with torch.no_grad():
        expected = model(ids)
        if name == "through other shapes":  # its code says eight
            with pytest.raises(ConversionError, match="left as it was"):
                convert.prune(model)
            assert torch.equal(model(ids), expected)
            return
        report = convert.prune(model)
        torch.testing.assert_close(model(ids), expected)
    assert report.layers[0].after == width - 2 and model.one.out_features == rows * (width - 2) // width


def test_a_gate_without_rows_is_asked_with_other_values_than_the_models_own():
    """sigmoid(0) is a half: the channel is silent on every token only because relu(two) happens to be."""
    model = Block(lambda m, x: m.three(m.one(x).sigmoid() * m.two(x).relu()))
    model.one.weight.data[2] = model.one.bias.data[2] = 0
    model.two.bias.data[2] = -1000
    assert convert.prune(model).layers[0].after == 8
    model.two.weight.data[2] = model.two.bias.data[2] = 0
    assert convert.prune(model).layers[0].after == 7


def test_a_model_with_cross_attention_and_inputs_of_its_own():
    """T5: keys of the second attention come from the encoder; its heads stay, its channels go."""
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=1, d_model=16, num_heads=4, d_kv=4, d_ff=24, vocab_size=61)).eval().double()
    given = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    for block in (model.encoder.block[0], model.decoder.block[0]):
        block.layer[-1].DenseReluDense.wo.weight.data[:, [1, 4]] = 0
    with pytest.raises(ConversionError, match="does not run"):
        convert.prune(model)
    with torch.no_grad():
        expected = model(**given).logits
        report = convert.prune(model, structured=True, inputs=given)
        torch.testing.assert_close(model(**given).logits, expected)
    assert [(x.what, x.after) for x in report.layers] == [("heads", 4), ("heads", 4), ("channels", 22), ("channels", 22)] and report.reloads and model.config.d_ff == 22
    assert report.left_out == {"decoder.block.0.layer.1.EncDecAttention.o": "cross attention: queries, keys and values are made from different inputs"}


def test_a_model_of_images():
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4)).eval().double()
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weight(model, seen_on(model, pixels).attentions[0].output)[:, 4:8] = 0
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        report = convert.prune(model, inputs=pixels)
        torch.testing.assert_close(model(pixels).last_hidden_state, expected)
    assert [(x.what, x.after) for x in report.layers] == [("heads", 3), ("channels", 24)]


def seen_on(model, pixels):
    with torch.no_grad():
        return trace(model, Inputs((pixels,)))
