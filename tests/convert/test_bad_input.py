"""What every conversion refuses alike: weights that are no plain numbers, calibration that does not fit, one module in two roles. The error names the layer, the model is bit for bit as it was."""
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tileweld import convert
from tileweld.compiler.errors import ConversionError
from torch import nn

IDS = torch.randint(31, (4, 8), generator=torch.Generator().manual_seed(1))


class Layer(nn.Module):
    """Pre-norm attention and a gated MLP."""

    def __init__(self, hidden=16, heads=4, d=4, width=24):
        super().__init__()
        self.num_heads = self.num_key_value_heads = heads
        self.d, self.input_norm, self.norm = d, nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, heads * d) for _ in range(3))
        self.o_proj = nn.Linear(heads * d, hidden)
        self.gate, self.up, self.down = nn.Linear(hidden, width), nn.Linear(hidden, width), nn.Linear(width, hidden)

    def forward(self, x):
        y = self.input_norm(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.d)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (t.repeat_interleave(self.num_heads // self.num_key_value_heads, 1) for t in (k, v))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(31, 16), nn.ModuleList(Layer() for _ in range(2))
        self.eval()

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def calibrated(calibration):
    return {
        "to_gqa": lambda model: convert.to_gqa(model, 2, calibration),
        "quantize_ llm_int8": lambda model: convert.quantize_(model, "llm_int8", calibration=calibration),
        "smooth_": lambda model: convert.smooth_(model, calibration),
    }


CONVERSIONS = {**calibrated(IDS), "prune": convert.prune, "quantize_": convert.quantize_}


def state(model):
    """Everything that could change: which module and parameter is where, its bits, and the counts."""
    tensors = {n: (id(p), p.detach().clone() if p.device.type != "meta" else None) for n, p in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))}
    counts = {n: (id(m), m.training, {k: v for k, v in vars(m).items() if type(v) in (int, list, tuple)}) for n, m in model.named_modules(remove_duplicate=False)}
    return tensors, counts, [len(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]


def bits(x):
    x = getattr(x, "full_tensor", lambda: x)()
    return x.dequantize() if x.is_quantized else x.as_subclass(torch.Tensor)


def refused(name, model, conversion=None):
    (tensors, *rest) = state(model)
    with pytest.raises(ConversionError) as caught:
        (conversion or CONVERSIONS[name])(model)
    (after, *others) = state(model)
    assert rest == others and {n: i for n, (i, _) in tensors.items()} == {n: i for n, (i, _) in after.items()}
    for n, (_, value) in tensors.items():
        assert value is None or torch.equal(bits(value), bits(after[n][1])), n
    return caught.value


@pytest.fixture(scope="module")
def mesh():
    """A process group of one, for sharded tensors; destroyed afterwards."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("layer", ["layers.1.k_proj", "layers.1.down"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_sharded(name, layer, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    model = Model()
    linear = model.get_submodule(layer)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))
    error = refused(name, model)
    assert error.where == layer and "DTensor" in error.what and "gather" in error.cure


class Packed(torch.Tensor):
    """As quantisation libraries have it: a subclass in the place of the weight."""


def _subclass(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed), requires_grad=False)


def _int8(linear):
    linear.weight = nn.Parameter(torch.zeros(linear.weight.shape, dtype=torch.int8), requires_grad=False)


def _torch_quantised(linear):
    linear.weight = nn.Parameter(torch.quantize_per_tensor(linear.weight.detach(), 0.1, 0, torch.qint8), requires_grad=False)


def _part(linear):
    linear.weight = nn.Parameter(linear.weight.detach()[:8])


def _meta(linear):
    linear.to("meta")


KINDS = {"subclass": (_subclass, "Packed"), "int8": (_int8, "int8"), "torch's own": (_torch_quantised, "qint8"), "a part of it": (_part, "sharded"), "meta": (_meta, "meta")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONVERSIONS)
def test_weights_that_are_no_plain_numbers(name, kind):
    model, (spoil, words) = Model(), KINDS[kind]
    spoil(model.layers[1].v_proj)
    error = refused(name, model)
    assert error.where == "layers.1.v_proj" and words in error.what and error.cure


CALIBRATIONS = {
    "one dim": (IDS[0], "shape"), "three dims": (IDS[None], "shape"), "no rows": (IDS[:0], "shape"), "one token": (IDS[:, :1], "shape"), "elsewhere": (IDS.to("meta"), "meta"), "not in the table": (IDS + 100, "the embedding has 31 rows"),
    "negative": (IDS - 200, "tokens lie in -1"), "words": ("some text", "str"), "elsewhere, by name": ({"ids": IDS.to("meta")}, "ids is on meta"), "sizes differ": ({"ids": IDS, "attention_mask": torch.ones(3, 8)}, "batch sizes"),
}


@pytest.mark.parametrize("kind", CALIBRATIONS)
@pytest.mark.parametrize("name", calibrated(None))
def test_calibration_that_does_not_fit(name, kind):
    calibration, words = CALIBRATIONS[kind]
    error = refused(name, Model(), calibrated(calibration)[name])
    assert words in str(error) and (error.where == "embed" or kind in ("words", "sizes differ"))


@pytest.mark.parametrize("name", calibrated(None))
def test_calibration_that_the_model_does_not_take(name):
    error = refused(name, Model(), calibrated({"tokens": IDS})[name])
    assert "tokens" in str(error) or "a required argument: 'ids'" in str(error)


@pytest.mark.parametrize("heads", [3, 8, 0])
def test_heads_that_do_not_divide(heads):
    error = refused("to_gqa", Model(), lambda model: convert.to_gqa(model, heads, IDS))
    assert not heads or error.where == "layers.0" and error.cure == "choose one of 1, 2, 4"


@pytest.mark.parametrize("name", ["to_gqa", "prune"])
def test_a_module_in_two_roles(name):
    model = Model()
    model.layers[1].k_proj = model.layers[0].q_proj
    assert "two roles" in (error := refused(name, model)).what and error.where == "layers.0.q_proj"
    model = Model()
    model.layers[1].v_proj.weight = model.layers[1].k_proj.weight
    assert "two roles" in (error := refused(name, model)).what and error.where == "layers.1.k_proj.weight"
    model = Model()
    forward = model.forward
    model.forward = lambda ids: model.layers[0](forward(ids))
    assert "runs 2 times" in (error := refused(name, model)).what and error.where == "layers.0"


def test_conversions_that_may_take_a_module_in_two_roles():
    """Its weight is rounded once for both; smooth_ leaves it as it is, and says so."""
    model = Model()
    model.layers[1].k_proj = model.layers[0].q_proj
    assert "tied to layers.1.k_proj.weight" in convert.smooth_(model, IDS).left_out["layers.0.q_proj"]
    convert.quantize_(model)
    assert model.layers[1].k_proj is model.layers[0].q_proj and isinstance(model.layers[1].k_proj, convert.Int8Linear)


@pytest.mark.parametrize("name", ["to_gqa", "quantize_"])
def test_numbers_that_are_not_finite(name):
    model = Model()
    model.layers[1].v_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ConversionError, match="inf or NaN") as caught:
        CONVERSIONS[name](model)
    assert caught.value.where in ("layers.1", "layers.1.v_proj") and model.layers[0].k_proj.out_features == 16
