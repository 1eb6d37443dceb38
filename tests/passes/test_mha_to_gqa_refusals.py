"""What options gqa refuses, each with its reason and a cure, and the graph as it was."""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tileweld import convert
from tileweld.compiler.errors import RefusalError
from tileweld.compiler.explain import explain

_spec = importlib.util.spec_from_file_location("gqa_model", Path(__file__).with_name("gqa_model.py"))
_shared = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)  # Dynamo looks a module up by its name
_spec.loader.exec_module(_shared)
Attention, far, model_of, rewritten, tokens = (getattr(_shared, name) for name in "Attention far model_of rewritten tokens".split())


def refused(model, *inputs, match, cure="", result=None, **kwargs):
    out, report = rewritten(model, *(inputs or (tokens(),)), **kwargs)
    rows = [r for r in report.refusals if r.rewrite == "mha_to_gqa"]
    assert rows and all(match in r.reason for r in rows) and not report.counts["mha_to_gqa"] and not report.merged, rows
    assert all(cure in r.cure for r in rows), rows
    expected = model(*(inputs or (tokens(),)))
    first = lambda x: x[0] if isinstance(x, tuple) else x
    assert far(first(out), first(expected)) < 1e-10
    return rows


@pytest.mark.parametrize("gqa", [3, 8])
def test_a_number_that_does_not_divide(gqa):
    assert "1, 2, 4" in refused(model_of(), match="does not divide its 4 KV heads", gqa=gqa)[0].cure
    with pytest.raises(Exception) as caught, torch.no_grad():
        explain(model_of(), tokens(), options={"gqa": gqa, "strict": True})
    assert isinstance(caught.value, RefusalError) or isinstance(getattr(caught.value, "inner_exception", caught.value.__cause__), RefusalError)


class Norm(Attention):
    def keys(self, x):
        k = self.heads_of(self.k_proj(x), self.kv_heads)
        return F.rms_norm(k, k.shape[-1:]).transpose(1, 2).flatten(-2)


class LengthNorm(Attention):
    def keys(self, x):
        return F.normalize(self.heads_of(self.k_proj(x), self.kv_heads), dim=-1).transpose(1, 2).flatten(-2)


class Clipped(Attention):
    def keys(self, x):
        return self.k_proj(x).clamp(-0.5, 0.5)


class Twice(Attention):
    def keys(self, x):
        return self.k_proj(x) + x[..., :16]


class Cross(Attention):
    def keys(self, x):
        return self.k_proj(x.roll(1, 1))


class Shared(Attention):
    def forward(self, x):
        q, k = self.heads_of(self.q_proj(x), self.heads), self.heads_of(self.k_proj(x), self.kv_heads)
        return self.o_proj(F.scaled_dot_product_attention(q, k, k, is_causal=True).transpose(1, 2).flatten(-2))


class Gated(Attention):
    def forward(self, x):
        return self.o_proj(self.context(x) * torch.sigmoid(x[..., :16]))

    def context(self, x):
        q, k, v = self.heads_of(self.q_proj(x), self.heads), self.heads_of(self.k_proj(x), self.kv_heads), self.heads_of(self.v_proj(x), self.kv_heads)
        return F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True).transpose(1, 2).flatten(-2)


class Unprojected(Gated):
    def forward(self, x):
        return F.pad(self.context(x), (0, 8))


class ReadTwice(Gated):
    def forward(self, x):
        context = self.context(x)
        return self.o_proj(context) + F.pad(context, (0, 8))


class Interleaved(Attention):
    """Heads that are not side by side: column d H + h."""

    def heads_of(self, x, n):
        return x.unflatten(-1, (self.head_dim, n)).permute(0, 3, 1, 2)


class Partial(Attention):
    def turn(self, x):
        half = x.shape[-1] // 2
        return torch.cat([super().turn(x[..., :half]), x[..., half:]], -1)


class Reflected(Attention):
    """Mixes pairs of dims by no rotation: a reflection."""

    def turn(self, x):
        half, (cos, sin) = x.shape[-1] // 2, self.tables(x)
        return x * torch.cat([cos, cos], -1) + torch.cat([x[..., half:], x[..., :half]], -1) * torch.cat([sin, sin], -1)


class Scaled(Attention):
    """Every dim of a head has a factor of its own."""

    def turn(self, x):
        return x * torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)


@pytest.mark.parametrize(("attention", "match", "rotary"), [
    (Norm, "QK-norm", "half"), (Norm, "QK-norm", None), (LengthNorm, "keys are also read by linalg_vector_norm", None), (Clipped, "keys", None), (Twice, "keys", None), (Cross, "different inputs", "half"), (Shared, "shared KV", None),
    (Gated, "output is read by", "half"), (Unprojected, "output is read by", "half"), (ReadTwice, "output is read by", "half"), (Interleaved, "side by side", None),
    (Partial, "part of the head", "half"), (Reflected, "something else than a rotation", "half"), (Scaled, "factors of their own", None)])
def test_layers_that_do_something_else(attention, match, rotary):
    refused(model_of(attention, rotary=rotary, **(dict(d=8) if attention is Partial else {})), match=match)


class Tables(nn.Module):
    """The table of cosines is an input: that both dims of a pair turn alike cannot be seen."""

    def __init__(self):
        super().__init__()
        self.a = Attention(24, 4, 4, 4, "half", False).double()

    def forward(self, x, cos, sin):
        q, k, v = (self.a.heads_of(p(x), 4) for p in (self.a.q_proj, self.a.k_proj, self.a.v_proj))
        turn = lambda y: y * cos + torch.cat([-y[..., 2:], y[..., :2]], -1) * sin
        return self.a.o_proj(F.scaled_dot_product_attention(turn(q), turn(k), v).transpose(1, 2).flatten(-2))


def test_a_table_of_unknown_origin():
    x, table = torch.randn(2, 6, 24, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    refused(Tables(), x, table, table, match="one angle", cure="to_gqa")


class Cached(nn.Module):
    """One layer that decodes: `how` the keys and values meet the cache."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.a = how, Attention(24, 4, 4, 4, None, False).double()

    def forward(self, x, k_cache, v_cache):
        q, k, v = (self.a.heads_of(p(x), 4) for p in (self.a.q_proj, self.a.k_proj, self.a.v_proj))
        if self.how == "cat":
            k, v = torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2)
        elif self.how == "copied":
            k, v = k_cache.index_copy(2, torch.arange(2, 5), k), v_cache.index_copy(2, torch.arange(2, 5), v)
        out = self.a.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return (out, k, v) if self.how != "read" else out


@pytest.mark.parametrize(("how", "match"), [("cat", "keys come from cat"), ("copied", "keys"), ("leaves", "a KV cache that leaves the graph")])
def test_a_kv_cache_keeps_its_heads(how, match):
    x, k, v = torch.randn(1, 3, 24, dtype=torch.float64), *torch.randn(2, 1, 4, 6, 4, dtype=torch.float64)
    (row,) = refused(Cached(how), x, k, v, match=match, cure="tileweld.convert.to_gqa(model, 2)")
    assert "cache" in row.reason


def test_training():
    (row, *_) = refused(model_of(), match="gradient", cure="no_grad", grad=True)
    model = model_of().requires_grad_(False)
    _, report = rewritten(model, tokens(), grad=True)
    assert report.counts["mha_to_gqa"] == 2


class Quantised(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.q = nn.Parameter((weight * 50).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.q.to(x.dtype) * 0.02)


def test_quantised_weights():
    model = model_of(layers=1)
    model.layers[0].k_proj = Quantised(model.layers[0].k_proj.weight)
    rows = refused(model, match="keys")
    assert "int8" in rows[0].reason or "projection" in rows[0].reason
    model = model_of(layers=1).float()
    convert.quantize_(model, "weight_only")
    _, report = rewritten(model, tokens())
    (row,) = [r for r in report.refusals if r.rewrite == "mha_to_gqa"]
    assert ("int8" in row.reason or "quantised" in row.reason) and "before quantising" in row.cure


def test_weights_that_are_no_parameters():
    def attend(x, wq, wk, wv, wo):
        q, k, v = (F.linear(x, w).unflatten(-1, (4, 4)).transpose(1, 2) for w in (wq, wk, wv))
        return F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2), wo)

    weights = [torch.randn(16, 24, dtype=torch.float64) for _ in range(3)] + [torch.randn(24, 16, dtype=torch.float64)]
    refused(attend, torch.randn(2, 5, 24, dtype=torch.float64), *weights, match="no parameter")
