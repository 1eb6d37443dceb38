"""options gqa: exact where heads are redundant, what convert.to_gqa makes where they are not, and a reason wherever heads cannot be merged."""
import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tileweld import convert, models
from tileweld.compiler.errors import OptionError
from tileweld.compiler.explain import explain
from tileweld.compiler.options import Options

_spec = importlib.util.spec_from_file_location("gqa_model", Path(__file__).with_name("gqa_model.py"))
_shared = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)  # Dynamo looks a module up by its name
_spec.loader.exec_module(_shared)
Attention, far, model_of, rewritten, scramble, tokens = (getattr(_shared, name) for name in "Attention far model_of rewritten scramble tokens".split())


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["half", "neighbours", None]), st.booleans(), st.sampled_from([(4, 4, 2), (8, 4, 2), (6, 3, 1), (4, 4, 1)]))
def test_redundant_heads_merge_exactly(seed, rotary, bias, counts):
    heads, kv_heads, keep = counts
    model = model_of(seed=seed, heads=heads, kv_heads=kv_heads, rotary=rotary, bias=bias)
    for n, layer in enumerate(model.layers):
        scramble(layer, [j % keep for j in range(kv_heads)], seed=seed + n)  # not neighbours
    result, report = rewritten(model, tokens(), gqa=keep)
    assert report.counts["mha_to_gqa"] == 2 and far(result, model(tokens())) < 1e-10
    assert max(row.residual for row in report.merged) < 1e-6
    calls = [n for n in report.graphs[0].graph.nodes if n.target is torch.ops.tileweld.attention.default]
    assert all(n.args[1].meta["val"].shape[1] == n.args[2].meta["val"].shape[1] == keep for n in calls)


@pytest.mark.parametrize("rotary", ["half", "neighbours", None])
@pytest.mark.parametrize(("kv_heads", "keep", "bias"), [(4, 2, True), (4, 1, False), (6, 3, False)])
def test_what_is_lossy_is_what_convert_makes_of_the_weights(rotary, kv_heads, keep, bias):
    model = model_of(heads=kv_heads, kv_heads=kv_heads, rotary=rotary, bias=bias)
    twin = copy.deepcopy(model)
    made = convert.to_gqa(twin, keep)
    result, report = rewritten(model, tokens(), gqa=keep, passes={"bias_rules": False})  # which takes biases elsewhere first: a merge of other weights
    assert far(result, twin(tokens())) < 1e-9 and far(result, model(tokens())) > 1e-3
    assert [row.kv_bytes_after for row in report.merged] == [x.kv_bytes_after for x in made.layers]
    assert [row.residual for row in report.merged] == pytest.approx([x.residual for x in made.layers], rel=1e-6)
    assert [row.layer for row in report.merged] == ["layers.0", "layers.1"]


@pytest.mark.parametrize(("name", "overrides", "layers"), [("llama_gqa", dict(kv_heads=4), 2), ("minigpt", dict(kv_heads=4, layers=2), 2), ("gemma2", dict(kv_heads=4), 2), ("gpt_oss_sinks", dict(kv_heads=4), 2)])
def test_the_models_of_this_repository(name, overrides, layers):
    module = models.load(name)
    model, inputs = module.build(**overrides).double(), module.example_inputs(batch=2, length=16)
    result, report = rewritten(model, *inputs)
    assert report.counts["mha_to_gqa"] == layers and not [r for r in report.refusals if r.rewrite == "mha_to_gqa"]
    twin = copy.deepcopy(model)
    convert.to_gqa(twin, 2)
    first = lambda out: out[0] if isinstance(out, tuple) else out
    assert far(first(result), first(twin(*inputs))) < 1e-4  # some have float32 inside


@pytest.mark.parametrize("shape", [(1, 7), (3, 1), (1, 1), (2, 9)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_shape(shape, dynamic):
    model = model_of(bias=True)
    for layer in model.layers:
        scramble(layer, [0, 1, 0, 1])
    ids = tokens(*shape)
    result, report = rewritten(model, ids, dynamic=dynamic)
    assert report.counts["mha_to_gqa"] == 2 and far(result, model(ids)) < 1e-10


def test_never_unless_asked_for_and_as_many_as_there_are_is_the_identity():
    model = model_of()
    for gqa in (None, 4):
        result, report = rewritten(model, tokens(), gqa=gqa)
        assert not report.counts["mha_to_gqa"] and not report.merged and not report.refusals and far(result, model(tokens())) < 1e-12


class Parallel(Attention):
    """Attention and MLP read one x, and one op multiplies for both."""

    def __init__(self, hidden, *rest):
        super().__init__(hidden, *rest)
        self.up, self.down = nn.Linear(hidden, 12), nn.Linear(12, hidden)

    def forward(self, x):
        return super().forward(x) + self.down(torch.tanh(self.up(x)))


def test_other_outputs_of_the_same_op_stay():
    model = model_of(Parallel)
    for layer in model.layers:
        scramble(layer, [0, 0, 1, 1])
    result, report = rewritten(model, tokens())
    assert report.counts["mha_to_gqa"] == 2 and far(result, model(tokens())) < 1e-10


class Alibi(Attention):
    def forward(self, x):
        q, k, v = self.heads_of(self.q_proj(x), self.heads), self.heads_of(self.k_proj(x), self.kv_heads), self.heads_of(self.v_proj(x), self.kv_heads)
        i = torch.arange(x.shape[1])
        slopes = 2.0 ** -torch.arange(1, self.heads + 1, dtype=x.dtype)
        bias = torch.where(i[:, None] >= i, 0.0, float("-inf")) + slopes[:, None, None] * (i - i[:, None])
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, bias.to(x.dtype)).transpose(1, 2).flatten(-2))


def test_a_score_that_knows_its_head_keeps_heads_in_place():
    for twins, exact in (([0, 0, 1, 1], True), ([0, 1, 0, 1], False)):
        model = model_of(Alibi, rotary=None)
        for layer in model.layers:
            scramble(layer, twins)
        result, report = rewritten(model, tokens())
        assert ["neighbours" in f.detail for f in report.fusions if f.rewrite == "mha_to_gqa"] == [True, True]
        assert (far(result, model(tokens())) < 1e-10) == exact


# ---------------------------------------------------------------- the report, options


def test_the_report_says_that_it_is_lossy_and_what_it_costs():
    with torch.no_grad():
        report = explain(model_of(), tokens(), options={"gqa": 2})
    text = str(report)
    assert "lossy" in text and "layers.0" in text and "512 -> 256 bytes a token" in text and "4 -> 2 KV heads" in text
    rows = json.loads(report.to_json())["merged"]
    assert len(rows) == 2 and 0 < rows[0]["key_error"] < 1 and rows[0]["kv_heads_after"] == 2


def test_verify_leaves_it_alone_and_values_are_checked():
    with torch.no_grad():
        assert explain(model_of(), tokens(), options={"gqa": 2, "verify": True, "strict": True}).counts["mha_to_gqa"] == 2
    for wrong in (0, -1, True, 2.0, "2"):
        with pytest.raises(OptionError, match="gqa"):
            Options.parse({"gqa": wrong})


class Wide(nn.Module):
    """Large enough for its weights to be worth keeping."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.a = Attention(160, 4, 4, 40, "half", True).to(dtype)

    def forward(self, x):
        return self.a(x)


def test_merged_once_and_again_when_a_weight_changes(monkeypatch):
    from tileweld.compiler.ir import merge_heads

    times, merge_layer = [], merge_heads.merge_layer
    monkeypatch.setattr(merge_heads, "merge_layer", lambda *args: times.append(1) or merge_layer(*args))
    model, x = Wide().eval(), torch.randn(2, 6, 160, dtype=torch.float64)
    scramble(model.a, [0, 1, 0, 1])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="tileweld", options={"gqa": 2})
    with torch.no_grad():
        assert far(compiled(x), model(x)) < 1e-10
        once = len(times)
        assert far(compiled(2 * x), model(2 * x)) < 1e-10 and len(times) == once
        scramble(model.a, [1, 0, 1, 0], seed=5)
        assert far(compiled(x), model(x)) < 1e-10 and len(times) == once + 1
        model.a.o_proj.weight.mul_(2)
        assert far(compiled(x), model(x)) < 1e-10 and len(times) == once + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_in_other_dtypes(dtype):
    model = Wide(torch.float64).eval()
    scramble(model.a, [0, 1, 0, 1])
    x = torch.randn(2, 6, 160, dtype=torch.float64)
    expected, small = model(x), copy.deepcopy(model).to(dtype)
    torch._dynamo.reset()
    with torch.no_grad():
        eager = far(small(x.to(dtype)).double(), expected)
        ours = far(torch.compile(small, backend="tileweld", options={"gqa": 2})(x.to(dtype)).double(), expected)
    assert ours <= 2 * eager + 1e-5
