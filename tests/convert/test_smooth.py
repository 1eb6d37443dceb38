"""smooth_: the model computes what it did, in float64; each way of folding, and each place that must be left alone."""
import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tileweld import convert
from tileweld.compiler.errors import ConversionError
from tileweld.convert.smooth import _difference
from torch import nn

from .smooth_inputs import X, seeded  # noqa: F401 (a fixture of every test here)

_spec = importlib.util.spec_from_file_location("attention_model", Path(__file__).with_name("attention_model.py"))
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)


class Gated(nn.Module):
    """norm, gate and up, down; options spoil it."""

    def __init__(self, post=False, gemma=False, shared=False, twice=False, tied=False, escape=False, relu=False, bias=True, returned=False):
        super().__init__()
        self.norm = nn.LayerNorm(16) if bias else nn.RMSNorm(16, eps=1e-6)
        self.gate, self.up, self.down, self.next = nn.Linear(16, 24), nn.Linear(16, 24, bias=bias), nn.Linear(24, 16), nn.Linear(16, 16)
        self.spoiled = dict(post=post, shared=shared, twice=twice, escape=escape, relu=relu, returned=returned)
        self.gemma = nn.Parameter(torch.randn(16) * 0.1) if gemma else None
        if tied:
            self.table = nn.Embedding(24, 16)
            self.table.weight = self.gate.weight
        self.double()

    def forward(self, x):
        if self.gemma is not None:
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.gemma)
        else:
            y = self.norm(x)
        gate, up = F.silu(self.gate(y)), self.up(y)
        inner = F.relu(self.up(y)) if self.spoiled["relu"] else gate * up
        z = self.down(inner)
        z = z + (y if self.spoiled["post"] else x)
        if self.spoiled["twice"]:
            z = z + self.gate(x) @ self.down.weight.T
        if self.spoiled["shared"]:
            z = z + self.next(x * self.norm.weight)
        if self.spoiled["escape"]:
            z = z + up.sum(-1, keepdim=True)
        return (z, y) if self.spoiled["returned"] else z


def smoothed(model, inputs=X, alpha=0.5):
    """(the report, how far the result moved, relative)"""
    before = model(inputs)
    report = convert.smooth_(model, inputs, alpha)
    after = model(inputs)
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (after, before)))
    return report, max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"gemma": True}])
def test_identity(options, alpha):
    model = Gated(**options)
    plain = copy.deepcopy(model)
    report, moved = smoothed(model, alpha=alpha)
    assert moved < 1e-12 and not {"gate", "up", "down"} & report.left_out.keys()
    kinds = {f.consumers: (f.kind, f.producer) for f in report.folds}
    assert kinds[("gate", "up")][0] == "norm" and kinds[("down",)] == ("product", "up.weight")
    assert not torch.equal(model.up.weight, plain.up.weight) and kinds[("gate", "up")][1] == ("gemma" if options.get("gemma") else "norm.weight")
    assert "2 places, 3 linear layers" in str(report)
    if alpha == 0.5 and not options:
        ratio = (plain.gate.weight / model.gate.weight)[0]
        given = plain.norm(X).abs().flatten(0, 1).amax(0)
        largest = torch.cat([plain.gate.weight, plain.up.weight]).abs().amax(0)
        torch.testing.assert_close(1 / ratio, (given / largest).sqrt(), rtol=1e-5, atol=0)


def test_down_is_folded_into_up_and_never_into_the_gate():
    model = Gated()
    gate = model.gate.weight / model.gate.weight[:1]
    smoothed(model)
    after = model.gate.weight / model.gate.weight[:1]  # columns are scaled, rows are not
    torch.testing.assert_close(gate, after)


@pytest.mark.parametrize(("spoil", "layer", "words"), [
    ({"post": True}, "gate", "no linear layer"), ({"returned": True}, "gate", "returned by the model"), ({"tied": True}, "gate", "tied to table.weight"), ({"tied": True}, "up", "shares its input, and its weight is tied"),
    ({"shared": True}, "gate", "norm.weight is shared"), ({"twice": True}, "gate", "runs 2 times"), ({"twice": True}, "down", "also read outside"), ({"escape": True}, "down", "no weight for each"), ({"relu": True}, "down", "no weight for each")])
def test_what_is_left_alone(spoil, layer, words):
    model = Gated(**spoil)
    plain = copy.deepcopy(model)
    try:
        report, moved = smoothed(model)
    except ConversionError as error:
        assert "no place" in str(error) and words in str(error)
        moved = 0
    else:
        assert words in report.left_out[layer], report.left_out
    assert moved < 1e-12
    old = getattr(plain, layer).weight
    rows = getattr(model, layer).weight / old  # its columns may not be scaled
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_output_goes_into_the_values_equal_within_a_group(kv_heads):
    model = _shared.Model(heads=4, kv_heads=kv_heads) if "heads" in _shared.Model.__init__.__code__.co_varnames else pytest.fail("attention_model.Model has no heads")
    tokens = torch.randint(0, _shared.VOCAB, (2, _shared.LENGTH))
    plain = copy.deepcopy(model)
    report, moved = smoothed(model, tokens)
    folds = [f for f in report.folds if f.kind == "attention"]
    assert moved < 1e-12 and folds and all(f.producer.endswith("v_proj.weight") and f.consumers[0].endswith("o_proj") for f in folds)
    name = folds[0].consumers[0]
    ratio = (model.get_submodule(name).weight / plain.get_submodule(name).weight)[0].view(kv_heads, 4 // kv_heads, -1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert ratio.std() > 0


class Packed(nn.Module):
    """Queries, keys and values of a head stand together in one layer, as in GPT-NeoX. normed: the values are normalised, so that no scale of theirs reaches the output."""

    def __init__(self, normed):
        super().__init__()
        self.norm, self.qkv, self.o = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.num_heads = self.num_kv_heads = 4
        self.normed = normed

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.qkv(self.norm(x)).unflatten(-1, (4, 3, 8)).unbind(-2))
        return x + self.o(F.scaled_dot_product_attention(q, k, F.normalize(v, dim=-1) if self.normed else v).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
def test_rows_of_the_values_are_told_apart_where_the_whole_is_too_coarse_to_say(dtype, normed):
    model, x = Packed(normed).to(dtype), torch.randn(2, 7, 32).mul(8).to(dtype)  # beside the residual, other rows would change a bfloat16 result by 2 %, and half of what attention adds
    plain = copy.deepcopy(model)
    report = convert.smooth_(model, x)
    assert ("attention" in {f.kind for f in report.folds}) == (not normed) and (not normed or "another basis of the values" in report.left_out["o"])
    after, before = (m.double()(x.double()) - x.double() for m in (model, plain))
    assert (after - before).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-12) * before.norm()


def test_after_smoothing_int8_activations_are_nearer():
    model = Gated(bias=False)
    model.norm.weight[2] = 80.0
    model, x = model.float(), X.float()
    exact, smooth = model(x), copy.deepcopy(model)
    convert.smooth_(smooth, x)
    errors = []
    for made in (model, smooth):
        convert.quantize_(made, "dynamic")
        errors.append(float((made(x) - exact).norm() / exact.norm()))
    assert errors[1] < 0.5 * errors[0], errors


def test_columns_without_values_or_weights_keep_their_scale():
    model = Gated()
    model.norm.weight[4], model.norm.bias[4] = 0.0, 0.0
    model.gate.weight[:, 5], model.up.weight[:, 5] = 0.0, 0.0
    plain = copy.deepcopy(model)
    assert smoothed(model)[1] < 1e-12 and torch.equal(model.gate.weight[:, 4], plain.gate.weight[:, 4]) and model.norm.weight[5] == plain.norm.weight[5]


def test_errors_leave_the_model():
    model = Gated()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for arguments, words in (((X, 2.0), "alpha is 2.0"), ((X, "0.5"), "alpha is '0.5'"), ((X, torch.nan), "alpha is nan"), (([],), "no batches"), ((X * torch.inf,), "inf or NaN"), ((X[..., :8],), "cannot be exported")):
        with pytest.raises(ConversionError, match=words):
            convert.smooth_(model, *arguments)
    with pytest.raises(ConversionError, match="no place to fold"):
        convert.smooth_(nn.Sequential(nn.Linear(16, 16).double()), X)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    model.float()
    convert.quantize_(model)
    with pytest.raises(ConversionError, match="int8 already.*smooth_ first"):
        convert.smooth_(model, X.float())


def test_a_fold_that_would_change_the_model_is_taken_back(monkeypatch):
    model = Gated()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    monkeypatch.setattr(convert.smooth._Exported, "_linear", lambda self, source: ("product", (("gate.weight", slice(None), 0.0),)) if source not in self.linears and source.target is torch.ops.aten.mul.Tensor else None)
    with pytest.raises(ConversionError, match="differs from the original"):
        convert.smooth_(model, X)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Phi3"])
def test_hugging_face_models(name):
    import transformers

    config = getattr(transformers, f"{name}Config")(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=61, max_position_embeddings=64, pad_token_id=0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().double()
    for parameter in model.parameters():  # norms that are not one, in which rounding to float32 does not show
        if parameter.dim() == 1:
            parameter.add_(torch.rand_like(parameter))
    tokens = torch.randint(0, 61, (2, 9))
    before = model(tokens, use_cache=False).logits
    report = convert.smooth_(model, tokens)
    after = model(tokens, use_cache=False).logits
    kinds = {f.kind for f in report.folds}
    assert (after - before).norm() < 1e-6 * before.norm() and {"norm", "attention"} <= kinds and ("product" in kinds or name == "Phi3"), report.left_out


def test_the_difference_of_outputs_sees_every_one():
    """A second output that is NaN passed; one that was NaN before is no difference."""
    x, nan, inf = torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf])
    assert _difference([x, x], [x, x]) == _difference([nan, inf], [nan, inf]) == _difference([], []) == 0
    assert not _difference([x, nan], [x, x]) <= 1 and not _difference([x, x], [x, nan]) <= 1 and not _difference([x, -inf], [x, inf]) <= 1
    assert _difference([x, 1.5 * x], [x, x]) == pytest.approx(0.5)
