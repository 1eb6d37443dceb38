"""quantize_: what is replaced, what it computes, what is refused, what is freed; under torch.compile the same fusions as a float model."""
import copy
import functools
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tileweld import convert
from tileweld.compiler.backend import tileweld
from tileweld.compiler.errors import ConversionError, OptionError
from tileweld.compiler.ir.int8_linear import dequantized, quantized
from tileweld.compiler.ir.int8_scheme import SCHEMES, matches
from tileweld.compiler.report import Report


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, inner), nn.Linear(width, inner, bias=False), nn.Linear(inner, width)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """Tokens [B, T] to logits; the head may be tied."""

    def __init__(self, width=32, inner=48, layers=2, vocabulary=60, tied=False):
        super().__init__()
        self.table, self.blocks = nn.Embedding(vocabulary, width), nn.ModuleList(Block(width, inner) for _ in range(layers))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


IDS = torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compiled(model, **options):
    torch._dynamo.reset()
    report = Report()
    return torch.compile(model, backend=functools.partial(tileweld, report=report, options=options), fullgraph=True), report


def same(a, b, scheme="weight_only", dtype=torch.float32):
    """The same scheme on two ways: a last bit of an activation may round to another of its 255 steps, a half per cent of the largest."""
    limit = 0.01 if dtype == torch.bfloat16 else 1e-5 if scheme == "weight_only" else 5e-3
    assert (a - b).norm() <= limit * b.norm(), (a - b).norm() / b.norm()


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_eager_and_compiled_are_the_scheme(scheme, dtype):
    model = Model().to(dtype)
    exact, plain = copy.deepcopy(model).double()(IDS), copy.deepcopy(model)
    report = convert.quantize_(model, scheme)
    assert len(report.layers) == 6 + (scheme == "weight_only") and isinstance(model.blocks[0].gate, convert.Int8Linear)
    assert all(0 < layer.error < 0.02 and 35 < layer.sqnr_db < 55 for layer in report.layers)
    assert "lm_head" in report.left_out or scheme == "weight_only"
    run, compilation = compiled(model)
    found = run(IDS)
    for y in (model(IDS), found):
        assert y.dtype == dtype and (y.double() - exact).norm() < 0.03 * exact.norm()
    assert compilation.counts["int8"] == 4 + (scheme == "weight_only") and not [r for r in compilation.refusals if r.rewrite == "int8"]
    option, other = compiled(plain, int8=scheme)
    same(option(IDS), found, scheme, dtype)
    assert other.counts["int8"] == compilation.counts["int8"]


@pytest.mark.parametrize("group", [0, 16])
def test_weight_only_is_dequantised_weights(group):
    model = Model()
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(dequantized(*quantized(module.weight, group), torch.float32))
    convert.quantize_(model, "weight_only", group=group)
    torch.testing.assert_close(model(IDS), other(IDS))
    assert torch.equal(model.lm_head.weight, other.lm_head.weight) and model.lm_head.group == group
    torch.testing.assert_close(compiled(model)[0](IDS), other(IDS))


def test_bytes_and_float_weights_are_freed_on_the_way(monkeypatch):
    model = Model(128, 256, 3)
    weights = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, nn.Linear)]
    alive, original = [], convert.quantize._quantise
    monkeypatch.setattr(convert.quantize, "_quantise", lambda *a: (alive.append(sum(w() is not None for w in weights)), original(*a))[1])
    report = convert.quantize_(model, "weight_only", skip=["lm_head"])
    gc.collect()
    assert alive == [*range(10, 1, -1)] and sum(w() is not None for w in weights) == 1
    linears = sum(layer.bytes_before for layer in report.layers)
    assert sum(layer.bytes_after for layer in report.layers) < 0.27 * linears and report.bytes_after - report.bytes_before == sum(x.bytes_after - x.bytes_before for x in report.layers)
    assert "0.30x" in str(report) and "left out by skip" in str(report)


def test_a_tied_embedding_reads_the_same_rows():
    model = Model(tied=True)
    exact = model(IDS)
    report = convert.quantize_(model, "weight_only")
    assert isinstance(model.table, convert.Int8Embedding) and model.table.q is model.lm_head.q and report.bytes_after < 0.35 * report.bytes_before
    assert "reads the same int8 rows" in str(report)
    assert (model(IDS) - exact).norm() < 0.02 * exact.norm() and torch.equal(model.table(IDS), model.table.weight[IDS])
    torch.testing.assert_close(compiled(model)[0](IDS), model(IDS))
    other = Model(tied=True)
    assert isinstance(other.table, nn.Embedding) and convert.quantize_(other, "dynamic") and other.lm_head.weight is other.table.weight
    grouped = Model(tied=True)
    convert.quantize_(grouped, group=8)
    assert torch.equal(grouped.table(IDS), grouped.table.weight[IDS])


def test_layers_that_share_a_weight_or_are_one():
    a, b = nn.Linear(16, 16), nn.Linear(16, 16)
    b.weight = a.weight
    model = nn.Sequential(a, b, a)
    exact = model(torch.eye(16))
    convert.quantize_(model)
    assert model[0] is model[2] and model[0].q is model[1].q and (model(torch.eye(16)) - exact).norm() < 0.02 * exact.norm()


def test_dtypes_and_copies_keep_the_scales():
    model = Model()
    convert.quantize_(model, "dynamic", lm_head=True)
    scale = model.lm_head.scale.clone()
    half = copy.deepcopy(model).bfloat16()
    assert half.lm_head.scale.dtype == torch.float32 and torch.equal(half.lm_head.scale, scale) and half.blocks[0].gate.bias.dtype == half.lm_head.weight.dtype == torch.bfloat16
    assert half(IDS).dtype == torch.bfloat16 and not [*model.blocks[0].gate.parameters()] and "dynamic" in repr(model)


def test_which_layers():
    for arguments, names in (({"filter_fn": lambda module, name: "up" in name}, {"blocks.0.up", "blocks.1.up"}), ({"skip": ["blocks.*"]}, {"lm_head"}), ({"skip": ["blocks"]}, {"lm_head"}), ({"scheme": {"scheme": "weight_only", "skip": ["blocks.0", "lm_head"]}}, {"blocks.1.gate", "blocks.1.up", "blocks.1.down"})):
        model = Model()
        assert {layer.name for layer in convert.quantize_(model, **arguments).layers} == names == {n for n, m in model.named_modules() if isinstance(m, convert.Int8Linear)}


def test_mixed_models_say_why_gate_and_up_stay_floats():
    model = Model()
    convert.quantize_(model, skip=["up"])
    run, report = compiled(model)
    torch.testing.assert_close(run(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    assert sum("meet in one output" in r.reason for r in report.refusals) == 2


def test_columns_from_calibration_and_batches():
    model = Model()
    model.blocks[0].norm.weight[5] = 40.0
    alone, both = copy.deepcopy(model), copy.deepcopy(model)
    convert.quantize_(alone, "llm_int8")
    report = convert.quantize_(both, "llm_int8", calibration=[IDS[:1], IDS[1:]])
    assert both.blocks[0].gate.columns is both.blocks[0].up.columns and both.blocks[0].gate.columns.nonzero().flatten().tolist() == [5] and alone.blocks[0].gate.columns is None and "1 outlier columns" in str(report)
    one, two = both(IDS)[:1], both(IDS[:1])
    torch.testing.assert_close(one, two)  # batch-invariant
    run, report = compiled(both)
    same(run(IDS), both(IDS), "llm_int8")
    assert report.counts["int8"] == 4 and not report.refusals  # gate and up in one op
    for wrong, words in (([], "no batches"), (7, "calibration is a int"), (torch.full((1, 4), 60), "lie in 60..60"), ({"tokens": IDS}, "does not run on a batch")):
        before = state(fresh := Model())
        with pytest.raises(ConversionError, match=words):
            convert.quantize_(fresh, "llm_int8", calibration=wrong)
        assert all(torch.equal(before[name], t) for name, t in fresh.state_dict().items())
    with pytest.raises(ConversionError, match="takes no calibration"):
        convert.quantize_(Model(), "dynamic", calibration=IDS)


def wrong_model(kind):
    model = Model()
    if kind == "inf":
        model.blocks[1].down.weight[0, 0] = torch.inf
    elif kind == "double":
        model.double()
    elif kind == "hooks":
        model.blocks[1].down.register_forward_hook(lambda *a: None)
    elif kind == "meta":
        model.blocks[1].down = nn.Linear(48, 32, device="meta")
    return model


@pytest.mark.parametrize(("kind", "arguments", "words"), [
    ("inf", {}, r"inf or NaN \(blocks.1.down\)"), ("double", {}, "float64"), ("hooks", {}, "has hooks"), ("meta", {}, "meta device"), ("", {"group": 9}, "groups of 9 do not divide its 32 columns"),
    ("", {"filter_fn": lambda m, n: False}, "no linear layer to quantise.*left out")])
def test_all_or_nothing(kind, arguments, words):
    model = wrong_model(kind)
    before = dict(model.named_modules())
    with pytest.raises(ConversionError, match=words):
        convert.quantize_(model, **arguments)
    assert dict(model.named_modules()) == before


def test_wrong_arguments():
    for arguments in ({"scheme": "int4"}, {"scheme": ["dynamic"]}, {"group": -1}, {"scheme": "dynamic", "group": 8}, {"scheme": {"scheme": "dynamic", "threshhold": 1}}, {"scheme": "dynamic", "threshold": 5.0},
                      {"scheme": {"scheme": "weight_only", "group": 8}, "group": 16}):
        with pytest.raises(OptionError):
            convert.quantize_(Model(), **arguments)
    assert convert.quantize_(Model(), {"scheme": "weight_only", "skip": ["up"]}, group=8).scheme.group == 8
    with pytest.raises(ConversionError, match="single nn.Linear"):
        convert.quantize_(nn.Linear(4, 4))
    model = Model()
    convert.quantize_(model)
    with pytest.raises(ConversionError, match="no linear layer.*int8 already"):
        convert.quantize_(model)


@pytest.mark.parametrize(("pattern", "words"), [("lm_heads", "did you mean 'lm_head'"), ("block.0", "did you mean 'blocks.0'"), ("nothing", "its modules are table, blocks")])
def test_a_misspelt_layer_is_not_quantised_in_silence(pattern, words):
    model = Model()
    with pytest.raises(OptionError, match=words):
        convert.quantize_(model, skip=["up", pattern])
    assert isinstance(model.lm_head, nn.Linear)


@pytest.mark.parametrize(("name", "pattern", "is_meant"), [
    ("model.layers.0.mlp.down", "model.layers.0.mlp.down", True), ("model.layers.0.mlp.down", "mlp.down", True), ("model.layers.0.mlp.down", "layers.0", True), ("model.layers.0.mlp.down", "mlp", True),
    ("model.layers.0.mlp.down", "model.layers.0.*", True), ("model.layers.0.mlp.down", "layers.?", True), ("model.layers.0.mlp.down", "layers", True), ("model.layers.0.mlp.down", "layer", False),
    ("model.layers.0.mlp.down", "layers.1", False), ("model.layers.10.mlp.down", "layers.1", False), ("model.layers.0.mlp.down", "own", False), ("lm_head", "head", False), ("lm_head", "*head", True)])
def test_what_a_name_means(name, pattern, is_meant):
    assert matches(name, pattern) == is_meant


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.bias = nn.Parameter(torch.randn(4, 16, 16)), nn.Parameter(torch.zeros(16))


class MyLinear(nn.Linear):
    pass


def test_matrices_of_no_linear_layer_are_named():
    """A report without them would be of a model that is int8, when most of it may be experts in one tensor."""
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "experts": Packed(), "own": MyLinear(16, 16), "attention": nn.MultiheadAttention(16, 2), "conv": nn.Conv1d(4, 4, 3), "norm": nn.LayerNorm(16), "table": nn.Embedding(4, 16),
                           "normed": nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))})
    report = convert.quantize_(model)
    assert [layer.name for layer in report.layers] == ["a"]
    assert report.left_out.keys() == {"table", "experts.experts", "own.weight", "attention.in_proj_weight", "attention.out_proj.weight", "conv.weight", "normed.parametrizations.weight.original1"}
    assert "multiplies by itself" in report.left_out["attention.out_proj.weight"] and "forward may be another" in report.left_out["own.weight"] and "[4, 16, 16] of a Packed" in str(report)


def test_attention_of_torch_keeps_the_projection_that_it_reads_itself():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    exact = model(x := torch.randn(2, 5, 16))
    assert {layer.name for layer in convert.quantize_(model).layers} == {"linear1", "linear2"}
    assert (model(x) - exact).norm() < 0.02 * exact.norm()


def test_gradients_pass_through_a_quantised_layer():
    model = Model()
    convert.quantize_(model, "dynamic")
    with torch.enable_grad():
        model(IDS).square().mean().backward()
    assert model.table.weight.grad.norm() > 0 and model.blocks[0].norm.weight.grad.norm() > 0


@pytest.mark.parametrize(("threshold", "found"), [(6.0, [5]), (math.inf, [])])
def test_a_calibrated_column_is_an_outlier_beside_its_layers_own_columns(threshold, found):
    """Far below 6.0, and four times what the other columns reach; none where outliers are turned off."""
    x = torch.full((3, 16), 0.01)
    x[:, 5] = 0.04
    model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    convert.quantize_(model, "llm_int8", threshold=threshold, calibration=x)
    assert model[0].columns.nonzero().flatten().tolist() == found


def test_a_calibration_that_takes_long_shows_a_bar(monkeypatch):
    from rich.progress import Progress

    shown = []
    monkeypatch.setattr(Progress, "start", lambda self: shown.append([(t.description, t.total, t.completed) for t in self.tasks]))
    for after, times in ((1e9, 0), (0.0, 3)):  # nobody looks at one of two seconds
        monkeypatch.setattr(convert.calibrate, "AFTER", after)
        convert.quantize_(Model(), "llm_int8", calibration=[IDS] * 3)
        assert len(shown) == times
    assert shown[1] == [("calibration", 3, 2)]
