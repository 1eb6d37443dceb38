"""prune: exact on planted dead heads and channels, saves and reloads where a config can say so, and refuses what would change the model."""
import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tileweld import convert, models
from tileweld.compiler.errors import ConversionError

_spec = importlib.util.spec_from_file_location("attention_model", Path(__file__).with_name("attention_model.py"))
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
Attention, Base, tokens = _shared.Attention, _shared.Model, _shared.tokens


class Mlp(nn.Module):
    def __init__(self, act, gated, bias, width=12, hidden=24):
        super().__init__()
        self.act, self.intermediate_size = act, width
        self.up_proj, self.down_proj = nn.Linear(hidden, width, bias), nn.Linear(width, hidden, bias)
        if gated:
            self.gate_proj = nn.Linear(hidden, width, bias)

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x) if hasattr(self, "gate_proj") else self.act(self.up_proj(x)))


class Model(Base):
    """Attention and an MLP a layer, float64."""

    def __init__(self, act=F.silu, gated=True, mlp_bias=False, **kwargs):
        super().__init__(**kwargs)
        self.mlps = nn.ModuleList(Mlp(act, gated, mlp_bias) for _ in self.layers).double().eval()

    def forward(self, ids):
        x = self.embed(ids)
        for layer, mlp in zip(self.layers, self.mlps):
            x = x + layer(F.layer_norm(x, x.shape[-1:]))
            x = x + mlp(F.layer_norm(x, x.shape[-1:]))
        return x


def kill_heads(layer, heads, how, seed=0):
    """o v = 0 for these query heads: zero columns of o, zero values, or two null spaces that meet."""
    d, n_rep = layer.head_dim, layer.heads // layer.kv_heads
    with torch.no_grad():
        o = layer.o_proj.weight.unflatten(1, (layer.heads, d))
        v = layer.v_proj.weight.unflatten(0, (layer.kv_heads, d))
        for h in heads:
            if how == "output":
                o[:, h] = 0
            elif how == "values":
                v[h // n_rep] = 0
                if layer.v_proj.bias is not None:
                    layer.v_proj.bias.unflatten(0, (layer.kv_heads, d))[h // n_rep] = 0
            else:  # o reads what v never writes: v has a direction less, o that one alone
                u = F.normalize(torch.randn(d, generator=torch.Generator().manual_seed(seed + h // n_rep), dtype=torch.float64), dim=0)
                project = torch.eye(d, dtype=torch.float64) - torch.outer(u, u)
                v[h // n_rep] = project @ v[h // n_rep]
                if layer.v_proj.bias is not None:
                    bias = layer.v_proj.bias.unflatten(0, (layer.kv_heads, d))
                    bias[h // n_rep] = project @ bias[h // n_rep]
                o[:, h] = torch.outer(o[:, h] @ u, u)


def logits(model, ids):
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


def pruned_exactly(model, **kwargs):
    ids = tokens()
    expected = logits(model, ids)
    report = convert.prune(model, **kwargs)
    assert torch.linalg.vector_norm(logits(model, ids) - expected) <= 1e-10 * torch.linalg.vector_norm(expected)
    return report


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["output", "values", "null space"]), st.sampled_from([None, "half", "neighbours"]), st.booleans(), st.sampled_from([(4, 4), (8, 4), (6, 2)]), st.booleans())
def test_heads_whose_values_never_reach_the_output_go(seed, how, rotary, bias, counts, structured):
    heads, kv_heads = counts
    torch.manual_seed(seed)
    model = Model(heads=heads, kv_heads=kv_heads, rotary=rotary, bias=bias)
    n_rep = heads // kv_heads
    groups = torch.randperm(kv_heads)[: int(torch.randint(0, kv_heads, ()))].tolist()
    for layer in model.layers:
        kill_heads(layer, [j * n_rep + r for j in groups for r in range(n_rep)], how, seed)
    report = pruned_exactly(model, structured=structured)
    left = kv_heads - len(groups)
    for layer in model.layers:
        assert (layer.heads, layer.kv_heads) == (left * n_rep, left)
        assert layer.q_proj.out_features == layer.o_proj.in_features == left * n_rep * 4 and layer.k_proj.out_features == layer.v_proj.out_features == left * 4
    assert [(x.before, x.after, x.kv_after) for x in report.layers[:2]] == [(heads, left * n_rep, left)] * 2


@pytest.mark.parametrize(("dead", "left"), [([0, 4, 8], (6, 3)), ([0, 1, 2, 3, 4, 5], (3, 1)), ([0], (9, 3)), ([0, 1, 3, 4, 5], (6, 2)), ([0, 1, 3, 4, 5, 6, 7], (2, 2)), (range(9), (1, 1)), ([], (9, 3))])
def test_every_kv_head_keeps_as_many_query_heads(dead, left):
    """9 heads, 3 KV heads: a KV head goes with the last of its query heads, of the others the fullest says how many stay."""
    model = Model(heads=9, kv_heads=3, layers=1)
    kill_heads(model.layers[0], dead, "output")
    pruned_exactly(model)
    assert (model.layers[0].heads, model.layers[0].kv_heads) == left


def test_structured_keeps_layers_alike():
    for structured, sizes in ((False, [(2, 2), (4, 4)]), (True, [(4, 4), (4, 4)])):
        model = Model()
        kill_heads(model.layers[0], [1, 3], "output")
        report = pruned_exactly(model, structured=structured)
        assert [(x.heads, x.kv_heads) for x in model.layers] == sizes and report.reloads is None
    model = Model()
    kill_heads(model.layers[0], [1, 3], "output"), kill_heads(model.layers[1], [2], "output")
    pruned_exactly(model, structured=True)
    assert [(x.heads, x.kv_heads) for x in model.layers] == [(3, 3), (3, 3)]


def kill_channels(mlp, channels, how):
    with torch.no_grad():
        for j in channels:
            if how == "down":
                mlp.down_proj.weight[:, j] = 0
            else:
                linear = getattr(mlp, f"{how}_proj")
                linear.weight[j] = 0
                if linear.bias is not None:
                    linear.bias[j] = 0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["down", "up", "gate"]), st.sampled_from([F.silu, F.relu, F.gelu, torch.tanh]), st.booleans(), st.booleans())
def test_channels_that_are_zero_or_unread_go(seed, how, act, gated, bias):
    torch.manual_seed(seed)
    model = Model(act=act, gated=gated or how == "gate", mlp_bias=bias, layers=1)
    channels = torch.randperm(12)[: int(torch.randint(1, 12, ()))].tolist()
    kill_channels(model.mlps[0], channels, how)
    report = pruned_exactly(model)
    mlp = model.mlps[0]
    assert mlp.up_proj.out_features == mlp.down_proj.in_features == mlp.intermediate_size == 12 - len(channels)
    assert mlp.down_proj.weight.shape == (24, 12 - len(channels)) and report.parameters_after < report.parameters_before


@pytest.mark.parametrize(("act", "how", "gated"), [(torch.sigmoid, "gate", True), (torch.cos, "gate", True), (torch.sigmoid, "up", False), (F.softplus, "up", False)])
def test_an_activation_that_is_not_zero_at_zero_keeps_its_channel(act, how, gated):
    model = Model(act=act, gated=gated, layers=1)
    kill_channels(model.mlps[0], [3, 5], how)
    report = pruned_exactly(model)
    assert model.mlps[0].up_proj.out_features == 12 and report.parameters_after == report.parameters_before
    kill_channels(model.mlps[0], [3, 5], "down")  # unread they go all the same
    pruned_exactly(model)
    assert model.mlps[0].up_proj.out_features == 10


def test_a_product_with_zero_is_zero_for_every_activation_and_biases_count():
    model = Model(act=torch.sigmoid, mlp_bias=True, layers=1)
    kill_channels(model.mlps[0], [3], "up")
    with torch.no_grad():
        model.mlps[0].up_proj.weight[7] = 0  # its bias is not
    pruned_exactly(model)
    assert model.mlps[0].up_proj.out_features == 11
    model = Model(bias=True, layers=1)
    kill_heads(model.layers[0], [1], "values")
    with torch.no_grad():
        model.layers[0].v_proj.weight[8:12] = 0  # head 2 gives its bias at every position
    pruned_exactly(model)
    assert model.layers[0].heads == 3


def test_a_silent_channel_is_not_a_dead_one():
    """relu may be zero on every token that was tried: only zero weights are a proof."""
    model = Model(act=F.relu, gated=False, mlp_bias=True, layers=1)
    with torch.no_grad():
        model.mlps[0].up_proj.bias[:6] = -1000
    assert pruned_exactly(model).parameters_before == sum(p.numel() for p in model.parameters())


def test_weights_that_are_not_finite_stay():
    model = Model(layers=1)
    kill_channels(model.mlps[0], [2], "down")
    with torch.no_grad():
        model.mlps[0].up_proj.weight[2, 0] = float("inf")
    with pytest.raises(ConversionError):  # NaN comes out before and after, so nothing can be held equal
        convert.prune(model)
    assert model.mlps[0].up_proj.out_features == 12


def llama(**kwargs):
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**dict(vocab_size=61, hidden_size=32, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                               initializer_range=0.3), **kwargs})
    return transformers.LlamaForCausalLM(config).eval()


def test_a_pruned_llama_reloads_with_equal_logits(tmp_path):
    import transformers

    model, ids = llama(), tokens()
    with torch.no_grad():
        for n, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight[:, 8 * n:8 * n + 8] = 0  # a query head of KV head 0
            layer.self_attn.o_proj.weight[:, 16:24] = 0  # one of KV head 1
            layer.mlp.down_proj.weight[:, n:5] = 0
    expected = logits(model, ids)
    report = convert.prune(model, structured=True)
    assert report.reloads and (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.intermediate_size) == (2, 2, 16)
    assert torch.allclose(logits(model, ids), expected, rtol=0, atol=1e-4 * expected.abs().max())
    pruned = logits(model, ids)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), pruned)
    greedy = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(again.generate(ids[:1], use_cache=True, **greedy), again.generate(ids[:1], use_cache=False, **greedy))


def test_layers_that_differ_live_in_memory():
    model, ids = llama(), tokens()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, :5] = 0
    expected = logits(model, ids)
    report = convert.prune(model)
    assert report.reloads is False and "does not reload" in str(report) and model.config.intermediate_size == 20
    assert [x.mlp.up_proj.out_features for x in model.model.layers] == [15, 20]
    assert torch.allclose(logits(model, ids), expected, rtol=0, atol=1e-4 * expected.abs().max())


def test_qk_norm_of_a_head_is_no_hindrance():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    model = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 16:] = 0
    report = convert.prune(model, structured=True)
    assert report.reloads and (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)


# ---------------------------------------------------------------- refused, and then bit for bit as it was


def refused(model, match, **kwargs):
    state = {n: p.clone() for n, p in model.state_dict().items() if p.device.type != "meta"}
    plain = {n: {k: v for k, v in vars(m).items() if type(v) in (int, list)} for n, m in model.named_modules()}
    with pytest.raises(ConversionError, match=match) as caught:
        convert.prune(model, **kwargs)
    assert all(p.device.type == "meta" or torch.equal(p, state[n]) for n, p in model.state_dict().items())
    assert plain == {n: {k: v for k, v in vars(m).items() if type(v) in (int, list)} for n, m in model.named_modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return caught.value


def test_heads_that_know_their_number():
    model = models.load("mpt_mha").build(clip_qkv=None, qk_ln=False)
    with torch.no_grad():
        site = next(m for m in model.modules() if hasattr(m, "out_proj"))
        site.out_proj.weight[:, :16] = 0
    error = refused(model, "know their number|does not run with fewer")
    assert "attn" in error.where


class Normed(Mlp):
    def forward(self, x):
        y = self.act(self.up_proj(x))
        return self.down_proj(F.layer_norm(y, y.shape[-1:]))


def test_a_norm_over_all_channels():
    model = Model(layers=1)
    model.mlps[0] = Normed(F.silu, False, False).double()
    kill_channels(model.mlps[0], [1, 2], "down")
    report = pruned_exactly(model)
    assert report.left_out == {"mlps.0.up_proj": "native_layer_norm reads all of its channels"} and model.mlps[0].up_proj.out_features == 12 and len(report.layers) == 1
    assert "left: mlps.0.up_proj: native_layer_norm" in str(report)


def test_weights_that_are_no_plain_floats_and_modules_at_two_places():
    model = Model()
    model.mlps[1].up_proj.weight = nn.Parameter(torch.zeros(12, 24, dtype=torch.int8), requires_grad=False)
    assert refused(model, "int8").where == "mlps.1.up_proj"
    model = Model()
    model.mlps[0].down_proj = nn.Linear(12, 24, device="meta")
    assert refused(model, "meta").where == "mlps.0.down_proj"
    model = Model()
    model.mlps[1] = model.mlps[0]
    assert refused(model, "two roles").where == "mlps.0"
    model = Model()
    model.mlps[1].up_proj.weight = model.mlps[0].up_proj.weight
    assert refused(model, "weight in two roles").where.startswith("mlps.0.up_proj")


def test_a_model_without_either():
    refused(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), "no attention and no MLP")


def test_a_failure_at_the_very_end_takes_everything_back():
    class Fixed(Model):
        def forward(self, ids):
            x = super().forward(ids)
            assert self.mlps[0].up_proj.out_features == 12, "twelve, said the author"
            return x

    model = Fixed()
    kill_heads(model.layers[0], [0], "output"), kill_channels(model.mlps[1], [0], "down"), kill_channels(model.mlps[0], [0], "down")
    error = refused(model, "twelve")
    copy.deepcopy(error)
