"""What to_gqa refuses: an error that names the layer, and the model bit for bit as it was."""
import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tileweld import convert, models
from tileweld.compiler.errors import ConversionError, OptionError

_spec = importlib.util.spec_from_file_location("attention_model", Path(__file__).with_name("attention_model.py"))
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
Attention, Model, tokens = _shared.Attention, _shared.Model, _shared.tokens


def refused(model, *args, match, **kwargs):
    state = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters(remove_duplicate=False) if p.device.type != "meta"}
    plain = {n: {k: v for k, v in vars(m).items() if type(v) in (int, list)} for n, m in model.named_modules()}
    with pytest.raises(ConversionError, match=match) as caught:
        convert.to_gqa(model, *args, **kwargs)
    for name, p in model.named_parameters(remove_duplicate=False):
        assert p.device.type == "meta" or (id(p) == state[name][0] and torch.equal(p, state[name][1])), name
    assert plain == {n: {k: v for k, v in vars(m).items() if type(v) in (int, list)} for n, m in model.named_modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return caught.value


@pytest.mark.parametrize("heads", [3, 8, 0, -1, True, 2.0])
def test_a_number_of_heads_that_does_not_divide(heads):
    error = refused(Model(), heads, tokens(), match="num_kv_heads|do not divide")
    assert heads in (3, 8) and error.where == "layers.0" and "1, 2, 4" in error.cure or error.where is None


def test_an_unknown_method_lists_what_exists():
    with pytest.raises(OptionError, match="data"):
        convert.to_gqa(Model(), 2, method="median")


@pytest.mark.parametrize(("calibration", "match"), [
    (tokens()[0], "shape"), (tokens()[:, :1], "shape"), (tokens()[:0], "shape"), (tokens().float(), "float32"), (tokens().to("meta"), "meta"),
    (tokens() + 100, "100|rows"), (-1 - tokens(), "rows"), ("text", "str"), ({}, "dict"), ({"tokens": "x"}, "dict"),
    ({"input_ids": tokens(), "attention_mask": torch.ones(3, 12)}, "batch"),
    ({"input_ids": tokens(), "attention_mask": torch.ones(4, 12, device="meta")}, "attention_mask is on meta"), ({"input_ids": tokens().to("meta")}, "on meta"),
    ({"input_ids": tokens(), "attention_mask": torch.ones(4, 11)}, "attention_mask has shape"),
])
def test_calibration_that_does_not_fit(calibration, match):
    error = refused(Model(), 2, calibration, match=match)
    assert error.where == "embed" or not isinstance(calibration, torch.Tensor)


def test_refit_without_calibration():
    refused(Model(), 2, refit=True, match="calibration")


def test_qk_norm():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    error = refused(transformers.Qwen3ForCausalLM(config), 2, tokens(), match="q_norm")
    assert error.where == "model.layers.0.self_attn"
    refused(models.load("mpt_mha").build(), 2, tokens(), match="q_ln")


class Odd(Attention):
    """A layer whose code does something to keys or values that its children do not show."""

    def keys(self, x):
        return F.normalize(self.heads_of(self.k_proj(x), self.kv_heads), dim=-1).transpose(1, 2).flatten(-2)


class Clipped(Attention):
    def keys(self, x):
        return self.k_proj(x).clamp(-0.5, 0.5)


class Swapped(Attention):
    """Query head h reads KV head h % Hkv."""

    def forward(self, x):
        q, k, v = self.heads_of(self.q_proj(x), self.heads), self.heads_of(self.k_proj(x), self.kv_heads), self.heads_of(self.v_proj(x), self.kv_heads)
        k, v = (y.repeat(1, self.heads // self.kv_heads, 1, 1) for y in (self.turn(k), v))
        return self.o_proj(F.scaled_dot_product_attention(self.turn(q), k, v, is_causal=True).transpose(1, 2).flatten(-2))


class Gated(Attention):
    """A nonlinearity between values and output."""

    def forward(self, x):
        hook = self.v_proj.register_forward_hook(lambda m, a, y: torch.tanh(y))
        try:
            return super().forward(x)
        finally:
            hook.remove()


class Partial(Attention):
    """Rotary embedding over the first half of a head only."""

    def turn(self, x):
        half = x.shape[-1] // 2
        return torch.cat([super().turn(x[..., :half]), x[..., half:]], -1)


class Twice(Attention):
    def keys(self, x):
        return self.k_proj(x) + 0.1 * self.k_proj(x.flip(-1))


class Cross(Attention):
    def keys(self, x):
        return self.k_proj(x.roll(1, 1))


@pytest.mark.parametrize(("attention", "match", "kwargs", "rotary"), [
    *((a, m, k, r) for r in ("half", None) for a, m, k in (
        (Odd, "QK-norm", {}), (Clipped, "clipped", {}), (Swapped, "does not read KV head", dict(heads=8)), (Gated, "norm, cap or gate", {}),
        (Twice, "2 times", {}), (Cross, "different inputs", {}))),
    (Partial, "part of a head", dict(d=8), "half"),
])
def test_layers_that_do_something_else(attention, match, kwargs, rotary):
    error = refused(Model(attention=attention, rotary=rotary, **kwargs), 2, tokens(), match=match)
    assert error.where.startswith("layers.0")


def test_a_module_at_two_places():
    model = Model()
    model.layers[1] = model.layers[0]
    assert refused(model, 2, tokens(), match="module in two roles").where == "layers.0"
    model = Model()
    model.layers[1].k_proj = model.layers[0].k_proj
    assert refused(model, 2, tokens(), match="module in two roles").where == "layers.0.k_proj"
    model = Model()
    model.layers[0].v_proj.weight = model.layers[0].k_proj.weight
    assert refused(model, 2, tokens(), match="weight in two roles").where == "layers.0.k_proj.weight"


def test_a_module_that_runs_twice_or_never():
    class Looped(Model):
        def forward(self, ids):
            return self.layers[0](super().forward(ids))

    assert refused(Looped(), 2, tokens(), match="2 times").where == "layers.0"

    class Lazy(Model):
        def forward(self, ids):
            return self.layers[0](self.embed(ids))

    assert refused(Lazy(), 2, tokens(), match="0 times").where == "layers.1"


def test_shared_keys_or_values():
    model = Model()
    del model.layers[1].k_proj
    assert refused(model, 2, tokens(), match="shared or latent KV").where == "layers.1"


def test_weights_that_are_no_plain_floats():
    model = Model()

    class Sharded(torch.Tensor):
        pass

    model.layers[1].k_proj.weight = nn.Parameter(torch.zeros(16, 24).as_subclass(Sharded), requires_grad=False)
    assert refused(model, 2, tokens(), match="Sharded").where == "layers.1.k_proj"
    model = Model()
    model.layers[0].o_proj.weight = nn.Parameter(torch.zeros(24, 16, dtype=torch.int8), requires_grad=False)
    assert refused(model, 2, tokens(), match="int8").where == "layers.0.o_proj"
    model = Model()
    model.layers[0].v_proj.weight = nn.Parameter(torch.zeros(8, 24, dtype=torch.float64))
    assert refused(model, 2, tokens(), match="sharded").where == "layers.0.v_proj"

    model = Model()
    q = torch.quantize_per_tensor(torch.zeros(16, 24), 0.1, 0, torch.qint8)
    model.layers[1].v_proj.weight = nn.Parameter(q, requires_grad=False)
    assert refused_quantised(model).where == "layers.1.v_proj"

    class Quantised(nn.Linear):
        pass

    model = Model()
    model.layers[1].q_proj = Quantised(24, 16, bias=False).double()
    assert refused(model, 2, tokens(), match="Quantised").where == "layers.1.q_proj"
    model = Model()
    model.layers[0].q_proj = nn.Linear(24, 16, bias=False, device="meta")
    assert refused(model, 2, tokens(), match="meta").where == "layers.0.q_proj"


def refused_quantised(model):
    """As `refused`; torch cannot compare quantised tensors with NaN's rules, so they are compared dequantised."""
    with pytest.raises(ConversionError, match="qint8") as caught:
        convert.to_gqa(model, 2, tokens())
    return caught.value


@pytest.fixture
def one_process():
    """A process group of one, for sharded tensors; destroyed afterwards."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_sharded_weights(one_process):
    from torch.distributed.tensor import Shard, distribute_tensor

    model = Model()
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    linear = model.layers[1].k_proj
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), one_process, [Shard(0)]))
    for convert_it in (lambda: convert.to_gqa(model, 2, tokens()), lambda: convert.prune(model)):
        with pytest.raises(ConversionError, match="DTensor") as caught:
            convert_it()
        assert caught.value.where == "layers.1.k_proj" and "gather" in caught.value.cure
        assert all(torch.equal(p.full_tensor() if p is linear.weight else p, old[n]) for n, p in model.named_parameters())


def test_numbers_that_are_not_finite():
    model = Model()
    with torch.no_grad():
        model.layers[1].v_proj.weight[0, 0] = float("nan")
    with pytest.raises(ConversionError) as caught:
        convert.to_gqa(model, 2, tokens())
    assert caught.value.where == "layers.1" and model.layers[0].k_proj.out_features == 16


@pytest.mark.parametrize(("name", "match"), [("t5_bias", "KV heads"), ("alibi", "KV heads"), ("annotated_mha", "keyword arguments"), ("deepseek_mla", "its keys come from 2 linear layers"), ("bigbird", "KV heads")])
def test_models_without_kv_heads_of_their_own(name, match):
    refused(models.load(name).build(), 1, match=match)


def test_a_failure_at_the_very_end_takes_everything_back():
    class Fixed(Model):
        """Its code knows how many KV heads there are."""

        def forward(self, ids):
            x = super().forward(ids)
            assert self.layers[0].kv_heads == 4, "four heads, said the author"
            return x

    error = refused(Fixed(), 2, tokens(), match="four heads")
    assert "left as it was" in error.what
    copy.deepcopy(error)
