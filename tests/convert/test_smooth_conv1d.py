"""smooth_ on Hugging Face's Conv1D, whose weight is [K, N]: what it does to nn.Linear, transposed; GPT-2 as a whole; and each place that must be left alone."""
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tileweld import convert
from tileweld.compiler.errors import ConversionError
from tileweld.convert.calibrate import input_maxima
from tileweld.convert.linears import is_linear, matrix
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from .smooth_inputs import X, seeded  # noqa: F401 (a fixture of every test here)

WIDTH = 32
TOKENS = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(2))


def gpt2(outliers=False, **options):
    """Norms and biases that are not one and zero, in which a fold left half done would not show."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=WIDTH, n_head=4, vocab_size=61, n_positions=32, bos_token_id=0, eos_token_id=0, **options)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.rand_like(parameter))
        else:
            parameter.mul_(5)
    if outliers:
        for block in model.transformer.h:
            for norm, reader in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
                norm.weight[[2, 11]] *= 100
                norm.bias[[2, 11]] *= 100
                reader.weight[[2, 11]] /= 100  # as trained models have it: the products are as large as others
    return model


def logits(model):
    return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_gpt2_computes_what_it_did(dtype, near, attention):
    model = gpt2(outliers=True, attn_implementation=attention).to(dtype)
    before, plain = logits(model), copy.deepcopy(model)
    report = convert.smooth_(model, TOKENS)
    assert float((logits(model) - before).abs().max()) < near * float(before.abs().max())
    assert {f.consumers: (f.kind, f.producer) for f in report.folds} == {(f"transformer.h.{n}.{layer}",): (kind, f"transformer.h.{n}.{producer}") for n in range(2) for layer, kind, producer in (
        ("attn.c_attn", "norm", "ln_1.weight"), ("mlp.c_fc", "norm", "ln_2.weight"), ("attn.c_proj", "attention", "attn.c_attn.weight"))}
    assert report.left_out.keys() == {"transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj", "lm_head"} and "tied" in report.left_out["lm_head"]
    for old, new in zip(plain.transformer.h, model.transformer.h):
        for way in (new, old):
            assert way.attn.c_attn.weight.shape == (WIDTH, 3 * WIDTH) and type(way.attn.c_attn) is Conv1D
        ratio = new.attn.c_attn.weight / old.attn.c_attn.weight  # [K, N]: s of the norm by row, and of the values' columns alone 1 / s of c_proj
        near_ones = dict(rtol=1e-4, atol=0) if dtype == torch.float32 else {}
        torch.testing.assert_close(ratio[:, : 2 * WIDTH], ratio[:, :1].expand(WIDTH, 2 * WIDTH), **near_ones)
        by_value = (ratio / ratio[:, :1])[0, 2 * WIDTH:]
        torch.testing.assert_close(1 / by_value, (new.attn.c_proj.weight / old.attn.c_proj.weight)[:, 0], **near_ones)
        torch.testing.assert_close(new.attn.c_attn.bias[: 2 * WIDTH], old.attn.c_attn.bias[: 2 * WIDTH], rtol=0, atol=0)
        torch.testing.assert_close(new.attn.c_attn.bias[2 * WIDTH:], old.attn.c_attn.bias[2 * WIDTH:] * by_value, **near_ones)
        assert by_value.std() > 0.01 and torch.equal(new.mlp.c_proj.weight, old.mlp.c_proj.weight)


def test_columns_of_what_will_be_quantised_are_nearer_to_each_other():
    model = gpt2(outliers=True)
    layers = {n: m for n, m in model.named_modules() if is_linear(m)}
    before = input_maxima(model, layers, TOKENS)
    report = convert.smooth_(model, TOKENS)
    after = input_maxima(model, layers, TOKENS)
    for fold in report.folds:
        for name in fold.consumers:
            assert after[name].max() < before[name].max() and float(after[name].max()) == pytest.approx(fold.largest_after, rel=1e-4) and float(before[name].max()) == pytest.approx(fold.largest_before)
            if fold.kind == "norm":
                assert after[name].max() / after[name].median() < 0.5 * before[name].max() / before[name].median()
    for name in report.left_out:
        torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("outliers", [True, False])
def test_dynamic_int8_is_nearer_afterwards(outliers):
    model = gpt2(outliers)
    exact, smooth = logits(model), copy.deepcopy(model)
    convert.smooth_(smooth, TOKENS)
    errors = []
    for made in (model, smooth):
        convert.quantize_(made, "dynamic")
        errors.append(float((logits(made) - exact).norm() / exact.norm()))
    assert errors[1] < (0.3 * errors[0] if outliers else 1.5 * errors[0]), errors


# ---------------------------------------------------------------- as nn.Linear


def linear(n, k, bias=True):
    return nn.Linear(k, n, bias)


class Plain(Conv1D):
    """Without a bias, as no class of transformers has it."""

    def __init__(self, nf, nx):
        super().__init__(nf, nx)
        self.bias = None

    def forward(self, x):
        return x @ self.weight


Plain.__name__ = "Conv1D"


def conv(n, k, bias=True):
    return (Conv1D if bias else Plain)(n, k)


class Block(nn.Module):
    """norm, q, k and v in one layer, output; gate and up, down; two products behind each other. packed: of each KV head its queries, its key and its value stand together. spoil: what stands in the way."""

    def __init__(self, make=conv, width=16, inner=24, heads=2, kv_heads=2, bias=True, packed=False, spoil=""):
        super().__init__()
        self.packed = packed
        self.config = SimpleNamespace(n_head=heads, n_head_kv=kv_heads)
        self.norm, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.d, self.spoil = width // heads, spoil
        self.sizes = [width, kv_heads * self.d, kv_heads * self.d]
        self.mixed, self.back = make(sum(self.sizes), width, bias), make(width, width, bias)
        self.gate, self.up, self.down, self.last = make(inner, width, bias), make(inner, width, bias), make(width, inner, bias), make(width, width, bias)
        self.gain, self.scalar = nn.Parameter(torch.tensor([2.0])), make(1, width, bias)
        if spoil == "shared module":
            self.again = self.gate
        if spoil == "shared bias":
            self.up.bias = self.gate.bias
        self.double()

    def attend(self, x):
        mixed = self.mixed(self.norm(x))
        if self.packed:
            q, k, v = (t.flatten(-2) for t in mixed.unflatten(-1, (self.config.n_head_kv, -1)).split([sum(self.sizes) // self.config.n_head_kv - 2 * self.d, self.d, self.d], -1))
        else:
            q, k, v = mixed.split(self.sizes, -1)
        q, k, v = (t.reshape(*t.shape[:2], -1, self.d).transpose(1, 2) for t in (q, k, v))
        if self.spoil == "normed values":
            v = F.normalize(v, dim=-1)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return self.back((q @ k.mT / self.d ** 0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(-2))

    def forward(self, x):
        x = x + self.attend(x)
        y = self.norm2(x)
        gate, up = F.silu(self.gate(y)), self.up(y)
        inner = {"square": lambda: up * up, "one weight": lambda: up.tanh() * self.gain, "scalar gate": lambda: up.tanh() * self.scalar(x), "escape": lambda: gate * up + up.sum()}.get(self.spoil, lambda: gate * up)()
        if self.spoil == "added to":  # what is added to the product is no bias, and not scaled with it
            inner = gate * torch.addmm(gate.flatten(0, 1), y.flatten(0, 1), self.up.weight).view_as(gate)
        z = self.down(inner)
        z = z + self.last(z) if self.spoil == "reader" else self.last(z)
        if self.spoil == "reader of the norm":
            z = z + y
        if self.spoil == "twice":
            z = z + self.gate(y).sum()
        if self.spoil == "shared module":
            z = z + self.again(y).sum()
        if self.spoil == "weight read":
            z = z + self.gate.weight.sum()
        if self.spoil == "transposed":  # a square weight, used the other way round
            z = z + F.linear(y, self.last.weight)
        if self.spoil == "also added":
            z = z + torch.addmm(y.flatten(0, 1), y.flatten(0, 1), self.last.weight).view_as(z)
        return z


def as_linear(model, **options):
    """The same weights as nn.Linear."""
    twin = Block(linear, **options)
    ours = dict(model.named_modules())
    for name, module in twin.named_modules():
        if is_linear(module):
            module.weight.copy_(matrix(ours[name]))
            if module.bias is not None:
                module.bias.copy_(ours[name].bias)
        elif name:
            module.load_state_dict(ours[name].state_dict())
    return twin


def moved(model, x=X, alpha=0.5):
    """(report, how far the result moved, relative)"""
    before = model(x)
    report = convert.smooth_(model, x, alpha)
    return report, float((model(x) - before).norm() / before.norm())


@settings(max_examples=12, deadline=None)
@given(heads=st.sampled_from([1, 2, 4]), d=st.sampled_from([2, 3, 8]), n_rep=st.sampled_from([1, 2]), inner=st.sampled_from([1, 5, 24]), bias=st.booleans(), packed=st.booleans(), alpha=st.sampled_from([0.0, 0.3, 0.5, 1.0]), seed=st.integers(0, 99))
def test_folds_as_nn_linear_does(heads, d, n_rep, inner, bias, packed, alpha, seed):
    torch.manual_seed(seed)
    options = dict(width=heads * d, inner=inner, heads=heads, kv_heads=heads // n_rep or 1, bias=bias, packed=packed)
    with torch.no_grad():
        model = Block(**options)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        twin, x = as_linear(model, **options), torch.randn(2, 4, heads * d, dtype=torch.float64) * torch.rand(heads * d).mul(6).exp()
        report, error = moved(model, x, alpha)
        expected, _ = moved(twin, x, alpha)
        assert error < 1e-9
        kinds = {f.consumers: f for f in report.folds}
        assert kinds.pop(("back",)).producer == "mixed.weight" and {n: f.kind for n, f in kinds.items()} == {("mixed",): "norm", ("gate", "up"): "norm", ("down",): "product", ("last",): "linear"}
        assert {f.consumers: f for f in expected.folds} == kinds  # the names of its attention say nothing, and nn.Linear's is not looked for
        for name, module in twin.named_modules():  # what is no attention of Conv1D is the same to the last bit
            if is_linear(module) and name not in ("mixed", "back"):
                assert torch.equal(matrix(model.get_submodule(name)), module.weight) and (not bias or torch.equal(model.get_submodule(name).bias, module.bias)), name
        assert torch.equal(model.norm.weight, twin.norm.weight) and torch.equal(model.norm2.weight, twin.norm2.weight)


# ---------------------------------------------------------------- what must be left alone


ALONE = [
    ("shared module", "gate", "tied to again.weight"), ("shared module", "up", "gate shares its input"), ("twice", "gate", "runs 2 times"), ("twice", "up", "gate shares its input, and it runs 2 times"), ("weight read", "gate", "also read outside"),
    ("reader", "last", "read by add.Tensor, which is no linear layer"), ("reader of the norm", "gate", "read by add.Tensor, which is no linear layer"), ("shared bias", "down", "no weight for each"), ("added to", "down", "no weight for each"),
    ("square", "down", "no weight for each"), ("one weight", "down", "no weight for each"), ("scalar gate", "down", "no weight for each"), ("escape", "down", "no weight for each"), ("transposed", "gate", "read by linear.default, which is no"),
    ("transposed", "last", "also read outside"), ("also added", "gate", "read by addmm.default, which is no"), ("normed values", "back", "another basis of the values")]
OF_CONV1D = ("normed values", "added to", "transposed", "also added")  # nn.Linear's attention is found by names alone, and its weight is no second argument of addmm


@pytest.mark.parametrize(("make", "spoil", "layer", "words"), [(make, *row) for row in ALONE for make in (conv, linear) if make is conv or row[0] not in OF_CONV1D])
def test_what_is_left_alone(make, spoil, layer, words):
    model = Block(make, spoil=spoil)
    plain = copy.deepcopy(model)
    report, error = moved(model)
    assert error < 1e-12 and words in report.left_out[layer], report.left_out
    ratio = matrix(model.get_submodule(layer)) / matrix(plain.get_submodule(layer))  # its columns may not be scaled
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert any(f.consumers == ("mixed",) for f in report.folds)  # the rest is folded


@pytest.mark.parametrize("why", ["shared attention", "tied", "runs twice"])
def test_gpt2_with_a_shared_conv1d(why):
    model = gpt2().double()
    first, second = model.transformer.h
    if why == "shared attention":
        second.attn.c_attn = first.attn.c_attn
    elif why == "tied":
        second.mlp.c_fc.weight = first.mlp.c_fc.weight
    else:
        first.mlp.register_forward_hook(lambda module, args, output: output + module.c_fc(args[0]).mean())
    before, plain = logits(model), copy.deepcopy(model)
    report = convert.smooth_(model, TOKENS)
    assert (logits(model) - before).norm() < 1e-12 * before.norm()
    layer, words, also = {"shared attention": ("attn.c_attn", "tied to transformer.h.1.attn.c_attn", "attn.c_proj"), "tied": ("mlp.c_fc", "tied to transformer.h.1.mlp.c_fc", None), "runs twice": ("mlp.c_fc", "runs 2 times", None)}[why]
    assert words in report.left_out[f"transformer.h.0.{layer}"] and torch.equal(first.get_submodule(layer).weight, plain.transformer.h[0].get_submodule(layer).weight)
    assert also is None or "cannot be told apart: it is also" in report.left_out[f"transformer.h.0.{also}"], report.left_out
    assert ("transformer.h.0.attn.c_attn",) in {f.consumers for f in report.folds} or why == "shared attention"


def test_a_conv1d_that_multiplies_otherwise_is_named():
    model = Block()
    model.up.forward = lambda x: F.linear(x, model.up.weight.T, model.up.bias)
    report, error = moved(model)
    assert error < 1e-12 and "no product x w with its weight" in report.left_out["up"] and "read by linear.default, which is no linear layer" in report.left_out["gate"]


def test_an_error_on_the_way_leaves_the_model(monkeypatch):
    model, calls = gpt2(), []
    before = {n: t.clone() for n, t in model.state_dict().items()}

    def fails(*args):
        calls.append(args)
        if len(calls) > 1:
            raise MemoryError("after the fold")
        return []

    monkeypatch.setattr(convert.smooth, "_outputs", fails)
    with pytest.raises(MemoryError, match="after the fold"):
        convert.smooth_(model, TOKENS)
    assert len(calls) == 2 and all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_sharded_and_missing_weights_are_refused():
    model = gpt2()
    model.transformer.h[0].mlp.c_fc.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    with pytest.raises(ConversionError, match=r"\[32, 32\], expected \[128, 32\]: sharded \(transformer.h.0.mlp.c_fc\)"):
        convert.smooth_(model, TOKENS)
    model.transformer.h[0].mlp.c_fc.weight = nn.Parameter(torch.empty(WIDTH, 4 * WIDTH, device="meta"))
    with pytest.raises(ConversionError, match="meta device.*transformer.h.0.mlp.c_fc"):
        convert.smooth_(model, TOKENS)
