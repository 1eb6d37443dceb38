"""Row maxima from the product that makes them: where they are passed on, where not, and that results are the same bits."""
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tileweld import convert
from torch import nn

from tileweld.compiler.ir.int8_linear import arguments

T = torch.ops.tileweld


def products(report):
    return [n for n in report.graphs[-1].graph.nodes if n.target in (T.linear.default, T.int8_linear.default)]


def maxima(node):
    return list(arguments(node.args)[14]) if node.target is T.int8_linear.default else list(node.args[9]) if len(node.args) > 9 else []


def row_max(node):
    return arguments(node.args)[13] if node.target is T.int8_linear.default else None


class MLP(nn.Module):
    def __init__(self, width=16, inner=24, dtype=torch.float32, act=F.silu):
        super().__init__()
        self.norm, self.gate, self.up, self.down, self.act = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width), act
        self.to(dtype)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(self.act(self.gate(y)) * self.up(y))


class Plain(nn.Module):
    """fc1, GELU, fc2; what is done in between is `between`'s."""

    def __init__(self, between=lambda h: h, inner=24, out=None):
        super().__init__()
        self.fc1, self.fc2, self.between = nn.Linear(16, inner), nn.Linear(out or inner, 16), between

    def forward(self, x):
        return self.fc2(self.between(F.gelu(self.fc1(x))))


def flat(x):
    return x if isinstance(x, (tuple, list)) else [x]


def both(rewriting, model, x, count, **options):
    """The report with the pass, after its result was held against the result without, bit by bit."""
    got, report = rewriting.rewritten(model, x, verify=True, **{"int8": "dynamic", **options})
    plain, without = rewriting.rewritten(model, x, passes_off=("row_max",), **{"int8": "dynamic", **options})
    for a, b in zip(flat(got), flat(plain), strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert report.counts["row_max"] == count and without.counts["row_max"] == 0 and not report.refusals, ([k.detail for k in report.kept], report.refusals)
    assert sum(row_max(n) is not None for n in products(report)) == count and not any(maxima(n) or row_max(n) is not None for n in products(without))
    return report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", [F.silu, F.gelu, F.relu])
def test_gated_mlps(rewriting, act, dtype):
    report = both(rewriting, MLP(dtype=dtype, act=act), torch.randn(3, 5, 16, dtype=dtype), 1)
    gated, down = products(report)
    assert maxima(gated) == [0] and row_max(down).target is operator.getitem and row_max(down).args == (gated, 1) and maxima(down) == []
    scale = row_max(down).meta["val"]
    assert scale.dtype == torch.float32 and scale.shape == (15,)


def test_a_mlp_without_gate_and_a_chain(rewriting):
    first, second = products(both(rewriting, Plain(), torch.randn(7, 16), 1))
    assert maxima(first) == [0] and row_max(second).args == (first, 1)
    chain = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 16))
    a, b, c = products(both(rewriting, chain, torch.randn(2, 3, 16), 2))
    assert row_max(b).args == (a, 1) and row_max(c).args == (b, 1) and [maxima(n) for n in (a, b, c)] == [[0], [0], []]


def test_views_with_the_same_rows_are_read_through(rewriting):
    both(rewriting, Plain(lambda h: h.unflatten(0, (2, 3)).reshape(6, 24).unsqueeze(0)), torch.randn(6, 16), 1)


def test_other_readers_keep_the_floats(rewriting):
    class Read(Plain):
        def forward(self, x):
            h = F.gelu(self.fc1(x))
            return self.fc2(h), h * 2

    first, _ = products(both(rewriting, Read(), torch.randn(5, 16), 1))
    assert sorted(u.args[1] for u in first.users) == [0, 1]


def test_products_of_one_output_share_its_maxima(rewriting):
    """As ops: from modules, products of one x are one op with two outputs by then."""
    (q, s), texts = T.quantize_rows(torch.randn(16, 16), 0), ("", 0.0, "x", ["a0"], [0, 0], "int8", 6.0, None)

    def shared(x):
        (h,) = T.int8_linear(x, [q], [s], [], [], *texts)
        (left,) = T.int8_linear(h, [q], [s], [], [], *texts)
        (right,) = T.int8_linear(h, [q], [s], [], [], *texts)
        return left, right, h

    report = both(rewriting, shared, torch.randn(5, 16), 2, int8=None)
    first, *rest = products(report)
    assert maxima(first) == [0] and len(rest) == 2 and {row_max(n).args for n in rest} == {(first, 1)}


def test_a_producer_of_floats(rewriting):
    report = both(rewriting, MLP(), torch.randn(5, 16), 1, int8={"scheme": "dynamic", "skip": ["gate", "up"]})
    gated, down = products(report)
    assert gated.target is T.linear.default and maxima(gated) == [0] and row_max(down).args == (gated, 1)


def test_modules_that_hold_int8_and_smoothed_ones(rewriting):
    torch.manual_seed(0)
    model = MLP().eval()
    with torch.no_grad():
        convert.smooth_(model, torch.randn(8, 16))
        convert.quantize_(model, "dynamic")
    both(rewriting, model, torch.randn(5, 16), 1, int8=None)


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_hostile_rows(rewriting, rows):
    x = torch.randn(rows, 16)
    if rows > 3:
        x[0], x[1, 3], x[2, 5], x[3] = 0, float("nan"), float("inf"), 1.5
    both(rewriting, Plain(), x, 1)


def test_sizes_may_be_symbols(rewriting):
    report = both(rewriting, MLP(), torch.randn(3, 5, 16), 1, dynamic=True)
    assert not isinstance(row_max(products(report)[1]).meta["val"].shape[0], int)


# ---------------------------------------------------------------- left alone


def left(rewriting, model, x, kept=None, **options):
    got, report = rewriting.rewritten(model, x, **{"int8": "dynamic", **options})
    assert report.counts["row_max"] == 0 and not report.refusals and report.counts["int8"] > 0
    assert not any(maxima(n) or row_max(n) is not None for n in products(report))
    found = [k.detail for k in report.kept if k.rewrite == "row_max"]
    assert len(found) == (kept is not None) and all(kept in detail for detail in found), found
    return got


def test_outliers_are_left_out_of_a_maximum(rewriting):
    left(rewriting, MLP(), torch.randn(5, 16), kept="columns that hold outliers", int8="llm_int8")


def test_weight_only_rounds_nothing(rewriting):
    left(rewriting, MLP(), torch.randn(5, 16), int8="weight_only")
    left(rewriting, MLP(), torch.randn(5, 16), int8={"scheme": "dynamic", "skip": ["down"]})  # the same, of floats


def test_rows_that_are_regrouped(rewriting):
    left(rewriting, Plain(lambda h: h.reshape(-1, 12), out=12), torch.randn(5, 16), kept="rows of [10, 12]")


@pytest.mark.parametrize("between", [lambda h: h[1:], lambda h: h.roll(1, 0), lambda h: h.cumsum(1), lambda h: F.layer_norm(h, (24,)), lambda h: h * torch.arange(24.0)])
def test_what_is_computed_in_between_has_another_maximum(rewriting, between):
    """A scale of columns goes into the epilogue, where it belongs to the maximum."""
    model, x = Plain(between), torch.randn(5, 16)
    got, report = rewriting.rewritten(model, x, int8="dynamic", verify=True)
    plain, _ = rewriting.rewritten(model, x, int8="dynamic", passes_off=("row_max",))
    assert torch.equal(got, plain) and not report.refusals
    first, second = products(report)
    assert (row_max(second) is None) or maxima(first) == [0] and "c" in first.args[8 if first.target is T.int8_linear.default else 7][0]


def test_the_pass_can_be_turned_off_and_needs_no_option_of_its_own(rewriting):
    left(rewriting, Plain(), torch.randn(5, 16), passes={"row_max": False})


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 6), st.sampled_from([1, 3, 16, 24]), st.sampled_from(["gelu", "relu", "silu", "tanh"]), st.booleans(), st.sampled_from([None, "mixed", "float"]), st.integers(0, 2**31))
def test_the_definition_with_and_without(rows, inner, act, has_bias, other, seed):
    """int8_linear on its definition: given row maxima are those it would find; what cannot use them raises."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    (q, s), captures = T.quantize_rows(draw(5, inner), 0), [draw(5)] if has_bias else []
    x = getattr(torch, act, None)(draw(rows, inner)) if hasattr(torch, act) else getattr(F, act)(draw(rows, inner))
    if rows > 1 and seed % 3 == 0:
        x[0, 0] = [float("nan"), float("inf"), 0.0][seed % 7 % 3]
    text = ["a0 + c0[j]" if has_bias else "a0"]
    call = lambda *rest: T.int8_linear(x, [q], [s], captures, [], "", 0.0, "x", text, [0, 0], "int8" if other is None else other, 6.0, *rest)  # noqa: E731
    most = x.abs().amax(1) if inner else x.new_zeros(rows)
    if other is not None:
        with pytest.raises(RuntimeError, match="row_max"):
            call(None, most)
        return
    (plain,), (out, own) = call(None), call(None, most, [0])
    assert torch.equal(plain.nan_to_num(7.0), out.nan_to_num(7.0)) and torch.equal(own.nan_to_num(7.0), out.abs().amax(1).nan_to_num(7.0))
    for wrong in (most[:, None], most.double(), torch.cat([most, most.new_ones(1)])):
        with pytest.raises(RuntimeError, match="row_max"):
            call(None, wrong)
    with pytest.raises(RuntimeError):
        torch.ops.tileweld.int8_linear(x.to("meta"), [q.to("meta")], [s.to("meta")], [], [], "", 0.0, "x", ["a0"], [0, 0], "int8", 6.0, None, None, [1])
